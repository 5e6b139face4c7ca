"""The two stages of training an indexer, multi-token prediction, and what padding must not change."""

import dataclasses
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mintrain import arrays, config, optim, options, sharding, step
from mintrain.config import Config, ConfigError, Model, Optim
from mintrain.loss import Batch, ahead

CFG = dataclasses.replace(tiny.CONFIG, model=tiny.DEEPSEEK)
WARMUP = dataclasses.replace(CFG, indexer="warmup", steps=20, optim=Optim(lr=3e-2, warmup=1, weight_decay=0.1))
MESH = sharding.make_mesh(CFG.mesh)


def fresh(cfg: Config) -> step.State:
    return step.new_state(cfg, MESH)


def losses_and_gradients(cfg: Config, batch: Batch, part: str) -> tuple[float, list[arrays.Weight]]:
    """One part of the report, and its gradient by every weight."""
    state = fresh(cfg)
    micro = jax.tree.map(lambda x: x[0], tiny.on_mesh(cfg, MESH, batch))
    loss = step.sharded_loss(cfg, MESH, state.model)
    of = lambda model: getattr(loss(model, micro, step.count(micro))[1], part)
    value, grads = jax.jit(jax.value_and_grad(of))(state.model)
    return float(value), list(arrays.weights(grads))


# ---------------------------------------------------------------------------------------------- warm-up


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_the_warmup_changes_nothing_but_the_indexers_and_halves_their_kl(optim):
    cfg = dataclasses.replace(WARMUP, optim=dataclasses.replace(WARMUP.optim, name=optim))
    train_step, state = step.make_train_step(cfg, MESH), fresh(cfg)
    before = jax.tree.map(np.array, state.model)
    batches, kls = [tiny.on_mesh(cfg, MESH, tiny.batch(seed)) for seed in range(4)], []
    for i in range(20):
        state, metrics = train_step(state, batches[i % 4])
        kls.append(float(metrics.indexer_kl))
    assert kls[16] < 0.5 * kls[0], kls  # the same batch
    for old, new in zip(arrays.weights(before), arrays.weights(state.model), strict=True):
        assert np.array_equal(old.value, new.value) == ("indexer" not in old.path), old.path


def test_the_warmup_sees_every_key_and_the_sparse_stage_does_not():
    """The same parameters: with all keys visible the loss does not depend on the indexer, with topk it does."""
    batch = tiny.batch(0)
    dense = dataclasses.replace(CFG, model=without_indexer(tiny.DEEPSEEK))
    nll = {cfg: losses_and_gradients(cfg, batch, "nll")[0] for cfg in (WARMUP, CFG)}
    state = fresh(CFG).model
    kept = {w.path: w.value for w in arrays.weights(state)}
    plain = step.abstract_state(dense, MESH).model
    model = jax.tree.unflatten(jax.tree.structure(plain), [kept[w.path] for w in arrays.weights(plain)])
    micro = jax.tree.map(lambda x: x[0], tiny.on_mesh(dense, MESH, batch))
    _, report = jax.jit(step.sharded_loss(dense, MESH, model))(model, micro, step.count(micro))
    np.testing.assert_allclose(nll[WARMUP], report.nll, rtol=1e-6)
    assert abs(nll[CFG] - report.nll) > 1e-3


def without_indexer(model: Model) -> Model:
    plain = lambda layer: dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, indexer=None))
    stages = tuple(dataclasses.replace(s, pattern=tuple(map(plain, s.pattern))) for s in model.stages)
    return dataclasses.replace(model, stages=stages, mtp=tuple(map(plain, model.mtp)))


def test_the_optimizer_keeps_nothing_of_what_it_does_not_train():
    paths = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(fresh(WARMUP).opt) if leaf.ndim]
    assert paths and all("indexer" in path for path in paths)
    assert any("indexer" not in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(fresh(CFG).opt))


# ----------------------------------------------------------------------------------------- sparse training


def test_no_gradient_of_the_language_model_reaches_an_indexer():
    for part in ("nll", "mtp_nll", "balance"):
        _, grads = losses_and_gradients(CFG, tiny.batch(0), part)
        for weight in grads:
            assert "indexer" not in weight.path or not np.any(weight.value), (part, weight.path)
        assert any(np.any(weight.value) for weight in grads)


@pytest.mark.parametrize("cfg", [CFG, WARMUP], ids=lambda cfg: cfg.indexer)
def test_no_gradient_of_an_indexer_reaches_the_model(cfg):
    _, grads = losses_and_gradients(cfg, tiny.batch(0), "indexer_kl")
    for weight in grads:
        assert np.any(weight.value) == ("indexer" in weight.path), weight.path


def test_both_losses_fall_in_the_sparse_stage():
    cfg = dataclasses.replace(CFG, steps=40, optim=Optim(lr=1e-2, warmup=2))
    train_step, state, numbers = step.make_train_step(cfg, MESH), fresh(cfg), []
    batches = [tiny.on_mesh(cfg, MESH, tiny.batch(seed)) for seed in range(2)]
    for i in range(40):
        state, metrics = train_step(state, batches[i % 2])
        assert metrics.finite
        numbers.append((float(metrics.loss), float(metrics.mtp_loss), float(metrics.indexer_kl)))
    first, last = np.mean(numbers[:4], axis=0), np.mean(numbers[-4:], axis=0)
    assert np.all(last < [0.8, 0.95, 0.9] * first), (first, last)


def test_a_large_gradient_of_one_group_does_not_shrink_the_other():
    """Indexers are clipped apart: their step is that of a model whose other gradients are small."""
    cfg = dataclasses.replace(CFG, optim=Optim(lr=1e-2, warmup=1, clip=1e-3, eps=1.0, weight_decay=0.0))
    state = fresh(cfg)
    model, _ = eqx.partition(state.model, optim.trainable(cfg, state.model))
    grads = jax.tree.map(jnp.ones_like, model)
    transform = optim.optimizer(cfg.optim, cfg.steps, model)
    large = jax.tree.unflatten(
        jax.tree.structure(grads), [w.value * (1 if "indexer" in w.path else 100) for w in arrays.weights(grads)]
    )
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(lambda grads: transform.update(grads, state.opt, model)[0])
        updates, after = update(grads), update(large)
    for a, b in zip(arrays.weights(updates), arrays.weights(after), strict=True):
        np.testing.assert_allclose(a.value, b.value, rtol=1e-4, err_msg=a.path)


# ------------------------------------------------------------------------------------- configs, and padding


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model=tiny.MODEL, indexer="warmup"), "indexer=warmup trains nothing"),
        (dict(model=without_indexer(tiny.DEEPSEEK), indexer="warmup"), "indexer=warmup trains nothing"),
        (dict(mtp_weight=0.0), "mtp_weight=0.0 trains nothing"),
    ],
)
def test_a_config_that_would_train_nothing_is_an_error(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(CFG, **change)
    with pytest.raises(ConfigError, match="trains nothing"):
        Optim(lr=0.0)


def test_padding_changes_no_loss_and_no_load():
    """Four rows alone, and the same four with four rows of padding; and the padding's tokens do not matter."""
    four = jax.tree.map(lambda x: x[:4], tiny.batch(0))
    pad = lambda x, fill: jnp.concatenate([x, jnp.full_like(x, fill)])
    cfg = dataclasses.replace(CFG, per_device_batch_size=4)
    reports = []
    for fill, rows in ((None, cfg), (0, CFG), (7, CFG)):
        batch = four
        if fill is not None:
            batch = Batch(
                *(pad(x, fill) for x in (four.tokens, four.targets)),
                *(pad(x, 0) for x in list(vars(four).values())[2:]),
            )
        state, micro = fresh(rows), jax.tree.map(lambda x: x[0], tiny.on_mesh(rows, MESH, batch))
        reports.append(jax.jit(step.sharded_loss(rows, MESH, state.model))(state.model, micro, step.count(micro)))
    for other in reports[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), reports[0], other)


def test_a_batch_of_nothing_but_padding_is_finite_and_changes_no_parameter():
    batch = tiny.batch(0)
    batch = dataclasses.replace(batch, segments=batch.segments * 0, weights=batch.weights * 0)
    cfg = dataclasses.replace(CFG, optim=dataclasses.replace(CFG.optim, weight_decay=0.0))
    state = fresh(cfg)
    before = jax.tree.map(np.array, state.model)
    state, metrics = step.make_train_step(cfg, MESH)(state, tiny.on_mesh(cfg, MESH, batch))
    assert metrics.finite and metrics.loss == metrics.indexer_kl == metrics.balance == metrics.grad_norm == 0
    jax.tree.map(np.testing.assert_array_equal, before, state.model)


# --------------------------------------------------------------------------------- multi-token prediction


def test_the_further_token_is_predicted_within_a_document_alone():
    """MTP's sum counts what a slow loop counts, and no target beyond a document or a row."""
    batch = tiny.batch(3)
    mesh = sharding.make_mesh(config.Mesh(context=2, fsdp=2))
    spec = jax.sharding.PartitionSpec(sharding.DATA_AXES, "context")
    for depth in (1, 2):
        mapped = jax.shard_map(lambda b, d=depth: ahead(b, d), mesh=mesh, in_specs=spec, out_specs=spec)
        ours = jax.jit(mapped)(jax.device_put(batch, jax.NamedSharding(mesh, spec)))
        tokens, targets, weights = map(np.asarray, ours)
        for row in range(8):
            for i in range(16):
                j = i + depth
                inside = j < 16 and batch.segments[row, i] == batch.segments[row, j]
                assert weights[row, i] == (batch.weights[row, j] if inside else 0)
                if inside:
                    assert (tokens[row, i], targets[row, i]) == (batch.targets[row, j - 1], batch.targets[row, j])


def test_mtp_learns_to_predict_the_token_after_the_next():
    """A cycle of tokens: after training both heads know it, and the further one was not given its target."""
    seq = np.arange(8 * 17).reshape(8, 17) * 5 % 74
    arrays_ = seq[:, :-1], seq[:, 1:], np.tile(np.arange(16), (8, 1)), np.ones((8, 16))
    batch = Batch(*(jnp.asarray(a, jnp.int32) for a in arrays_), jnp.ones((8, 16)))
    cfg = dataclasses.replace(CFG, steps=60, optim=Optim(lr=1e-2, warmup=2))
    train_step, state = step.make_train_step(cfg, MESH), fresh(cfg)
    for _ in range(60):
        state, metrics = train_step(state, tiny.on_mesh(cfg, MESH, batch))
    assert metrics.loss < 0.5 and metrics.mtp_loss < 0.5


# ------------------------------------------------------------------------------- the bug report's smoke model


@pytest.mark.slow
def test_the_smoke_model_of_the_bug_report_trains_in_bfloat16_with_a_finite_falling_loss():
    cfg = options.read(Path(__file__).parents[1] / "configs" / "deepseek3_tiny.py")
    assert cfg.compute_dtype == "bfloat16" and cfg.indexer == "sparse" and len(cfg.model.layers) == 61
    cfg = dataclasses.replace(cfg, steps=8, per_device_batch_size=1, optim=Optim(lr=3e-3, warmup=2))
    rng, seq = np.random.default_rng(0), cfg.data.seq_len
    tokens = rng.integers(0, 50, (1, seq + 1))
    arrays_ = tokens[:, :-1], tokens[:, 1:], np.arange(seq)[None], np.ones((1, seq))
    batch = Batch(*(jnp.asarray(a, jnp.int32) for a in arrays_), jnp.ones((1, seq)))
    train_step, state, losses = step.make_train_step(cfg, MESH), fresh(cfg), []
    for _ in range(8):
        state, metrics = train_step(state, tiny.on_mesh(cfg, MESH, batch))
        assert metrics.finite and metrics.indexer_kl > 0
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 1, losses
