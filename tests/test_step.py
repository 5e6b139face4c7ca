"""Training: every mesh gives the numbers of one device, bad updates are skipped, and the loss is what it says."""

import dataclasses
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mintrain import arrays, carriers, logits, loss, sharding, step
from mintrain.config import Config, Data, Mesh, Model, Optim
from mintrain.loss import Batch
from mintrain.model import LM
from mintrain.optim import schedule

FLAGS = ("finite", "skipped", "lr")
GENTLE = dataclasses.replace(
    tiny.CONFIG.optim, lr=1e-3
)  # this model amplifies rounding: its norms divide small outputs
MUON = dataclasses.replace(tiny.CONFIG.optim, name="muon")


@cache
def first_state(model: Model, optim: Optim = tiny.CONFIG.optim, indexer: str = "sparse") -> step.State:
    """The state of step 0, as numpy arrays."""
    cfg = dataclasses.replace(tiny.CONFIG, model=model, optim=optim, indexer=indexer)
    return jax.tree.map(np.asarray, step.new_state(cfg, sharding.make_mesh(cfg.mesh)))


@cache
def compiled(cfg: Config):
    mesh = sharding.make_mesh(cfg.mesh)
    layouts = jax.tree.map(lambda x: x.sharding, step.abstract_state(cfg, mesh))
    return step.make_train_step(cfg, mesh), partial(tiny.on_mesh, cfg, mesh), layouts


def start(cfg: Config) -> step.State:
    """The same state on every mesh, in arrays that a step may take over."""
    return jax.device_put(jax.tree.map(np.array, first_state(cfg.model, cfg.optim, cfg.indexer)), compiled(cfg)[2])


def train(cfg: Config, batches: list[Batch]) -> tuple[np.ndarray, step.State]:
    """The numbers of each step (loss, gradient norm, and what else the model reports), and the last state."""
    train_step, place, _ = compiled(cfg)
    state, numbers = start(cfg), []
    for batch in batches:
        state, metrics = train_step(state, place(batch))
        numbers.append([float(x) for name, x in vars(metrics).items() if name not in FLAGS and x is not None])
    return np.array(numbers), state


def only(rows: int, batch: Batch) -> Batch:
    """The same shape, but only the first `rows` sequences count: the others are padding."""
    keep = lambda x: jnp.where(np.broadcast_to((np.arange(8) < rows)[:, None], x.shape), x, jnp.zeros_like(x))
    return dataclasses.replace(batch, weights=keep(batch.weights), segments=keep(batch.segments))


BATCHES = [tiny.batch(seed) for seed in range(5)]


@cache
def on_one_device(model: Model, optim: Optim, rows: int) -> tuple[np.ndarray, step.State]:
    cfg = dataclasses.replace(tiny.CONFIG, model=model, optim=optim)
    return train(cfg, [only(rows, batch) for batch in BATCHES])


# ------------------------------------------------------------------- what must not change the numbers


def describe(change: dict) -> str:
    names = {tiny.DEEPSEEK: "DeepSeek", tiny.GEMMA4: "Gemma 4"}
    short = {"mesh": sharding.describe, "optim": lambda optim: f"{optim.name} {optim.lr}", "model": names.get}
    return ", ".join(f"{name}={short.get(name, str)(value)}" for name, value in change.items())


@pytest.mark.parametrize(
    "change",
    [
        dict(mesh=Mesh(replica=2, fsdp=2, tensor=2), per_device_batch_size=1, remat="none"),
        dict(mesh=Mesh(context=2, expert=2, fsdp=2), per_device_batch_size=1, remat="dots"),
        dict(mesh=Mesh(fsdp=2, context=2, tensor=2), per_device_batch_size=0.5),
        dict(mesh=Mesh(context=8), per_device_batch_size=0.25),
        pytest.param(dict(mesh=Mesh(fsdp=4, tensor=2), per_device_batch_size=1, optim=MUON), marks=pytest.mark.slow),
        dict(scan_layers=False),
        dict(accumulate=4),
        dict(model=tiny.DEEPSEEK, mesh=Mesh(expert=4, fsdp=2), per_device_batch_size=1),
        dict(model=tiny.DEEPSEEK, mesh=Mesh(expert=2, tensor=2, fsdp=2), per_device_batch_size=1),
        dict(model=tiny.DEEPSEEK, mesh=Mesh(expert=2, context=2, fsdp=2), per_device_batch_size=0.5),
        dict(model=tiny.DEEPSEEK, scan_layers=False, accumulate=2),
        dict(model=tiny.GEMMA4, optim=GENTLE, mesh=Mesh(context=2, tensor=2, fsdp=2), per_device_batch_size=0.5),
        dict(model=tiny.GEMMA4, optim=GENTLE, scan_layers=False, accumulate=2),
    ],
    ids=describe,
)
def test_the_numbers_are_those_of_one_device_scanned_in_one_batch(change):
    cfg = dataclasses.replace(tiny.CONFIG, **change)
    rows = cfg.batch_size
    expected, _ = on_one_device(cfg.model, cfg.optim, rows)
    ours, _ = train(cfg, [jax.tree.map(lambda x: x[:rows], batch) for batch in BATCHES])
    assert np.all(np.diff(expected[:, 0])), "the steps differ, so that a step that did nothing would show"
    np.testing.assert_allclose(ours, expected, rtol=1e-5)  # the largest expert load among them: the same routing


def test_a_run_starts_from_the_same_bits_on_every_mesh():
    cfg = dataclasses.replace(tiny.CONFIG, mesh=Mesh(fsdp=4, tensor=2), per_device_batch_size=1)
    state = step.new_state(cfg, sharding.make_mesh(cfg.mesh))
    jax.tree.map(np.testing.assert_array_equal, state, first_state(cfg.model))


@pytest.mark.parametrize("model", [tiny.MODEL, tiny.GEMMA4, tiny.DEEPSEEK], ids=["Gemma", "Gemma 4", "DeepSeek"])
@pytest.mark.parametrize("optim", [tiny.CONFIG.optim, MUON], ids=lambda o: o.name)
def test_training_changes_every_parameter_and_of_buffers_only_the_bias_of_routers(model, optim):
    _, state = on_one_device(model, optim, 8)
    before, after = (arrays.weights(m) for m in (first_state(model, optim).model, state.model))
    for old, new in zip(before, after, strict=True):
        stays = old.buffer and not old.path.endswith("router.bias")
        assert np.array_equal(old.value, new.value) == stays, old.path
    arrays.check(state.model)


def test_moments_in_bfloat16_take_half_the_memory_and_train_as_well():
    narrow = dataclasses.replace(tiny.CONFIG.optim, moments="bfloat16")
    expected, wide_state = on_one_device(tiny.MODEL, tiny.CONFIG.optim, 8)
    ours, state = on_one_device(tiny.MODEL, narrow, 8)
    moments = lambda s: [x for x in jax.tree.leaves(s.opt) if x.ndim]
    assert {str(x.dtype) for x in moments(state)} == {"bfloat16"}
    assert sum(x.nbytes for x in moments(state)) * 2 == sum(x.nbytes for x in moments(wide_state))
    arrays.check(state.model)
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)  # the first loss is before any update
    np.testing.assert_allclose(ours[:, 0], expected[:, 0], rtol=2e-3)
    assert np.any(ours != expected)


@pytest.mark.parametrize("model", [tiny.GEMMA4, tiny.DEEPSEEK], ids=["Gemma", "DeepSeek"])
def test_a_layers_gradients_in_the_dtype_they_are_made_in_are_those_of_its_weights(model):
    cfg = dataclasses.replace(tiny.CONFIG, model=model, compute_dtype="bfloat16")
    mesh = sharding.make_mesh(cfg.mesh)
    batch = jax.tree.map(lambda x: x[0], tiny.on_mesh(cfg, mesh, BATCHES[0]))
    state = step.new_state(cfg, mesh)
    shapes = carriers.carrier_shapes(step.abstract_model(cfg, mesh))
    plain = step.sharded_loss(cfg, mesh, state.model)
    ours = step.sharded_loss(cfg, mesh, carriers.carry(state.model, shapes))
    counts = step.count(batch)
    value = lambda model: plain(model, batch, counts)[0]
    compile = partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})  # every rounding as written
    expected, wanted = compile(jax.value_and_grad(value))(state.model)
    value = lambda carried: ours(carriers.carry(state.model, carried), batch, counts)[0]
    got, gradients = compile(jax.value_and_grad(value))(carriers.zeros(shapes))
    assert got == expected
    narrow = 0
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(carriers.layers(wanted)), strict=True):
        narrow += ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours.astype(jnp.float32), theirs)
    assert narrow > 5


# ------------------------------------------------------------------------- updates that are not finite


def infinite_loss(batch: Batch) -> Batch:
    return dataclasses.replace(batch, weights=batch.weights.at[0, 0].set(jnp.inf))


def infinite_gradient(batch: Batch) -> Batch:
    """The loss is finite: two large terms that nearly cancel. The square of the gradient's norm overflows."""
    return dataclasses.replace(batch, weights=batch.weights.at[0, :2].set(jnp.asarray([1e25, -1e25])))


@pytest.mark.parametrize("spoil", [infinite_loss, infinite_gradient])
def test_an_update_that_is_not_finite_is_skipped_and_counted_and_changes_nothing(spoil):
    train_step, place, _ = compiled(tiny.CONFIG)
    state, metrics = train_step(start(tiny.CONFIG), place(BATCHES[0]))
    assert metrics.finite and metrics.skipped == 0
    before = jax.tree.map(np.array, state)

    state, metrics = train_step(state, place(spoil(BATCHES[1])))
    assert np.isfinite(metrics.loss) == (spoil is infinite_gradient)
    assert not np.isfinite(metrics.grad_norm) and not metrics.finite
    assert (metrics.skipped, state.skipped, state.step) == (1, 1, 2)
    jax.tree.map(np.testing.assert_array_equal, (state.model, state.opt), (before.model, before.opt))

    state, metrics = train_step(state, place(BATCHES[2]))
    expected, expected_metrics = train_step(jax.device_put(before, compiled(tiny.CONFIG)[2]), place(BATCHES[2]))
    jax.tree.map(np.testing.assert_array_equal, (state.model, state.opt), (expected.model, expected.opt))
    for name in ("loss", "grad_norm", "lr", "finite"):
        assert getattr(metrics, name) == getattr(expected_metrics, name), name
    assert (metrics.skipped, state.step) == (1, 3)


# --------------------------------------------------------------------------------------------- the loss


def test_an_untrained_model_knows_nothing():
    numbers, _ = on_one_device(tiny.MODEL, tiny.CONFIG.optim, 8)
    assert abs(numbers[0, 0] - math.log(tiny.MODEL.vocab)) < 0.7


def test_evaluation_gives_the_loss_of_training():
    mesh = sharding.make_mesh(tiny.CONFIG.mesh)
    nll = step.make_eval_step(tiny.CONFIG, mesh)(start(tiny.CONFIG).model, tiny.on_mesh(tiny.CONFIG, mesh, BATCHES[0]))
    numbers, _ = on_one_device(tiny.MODEL, tiny.CONFIG.optim, 8)
    np.testing.assert_allclose(nll / BATCHES[0].weights.sum(), numbers[0, 0], rtol=1e-6)


NO_LAYERS = Model(vocab=74, embed=12, stages=(), norm_offset=1.0)


def slow_loss(model: LM, batch: Batch, count: float, z_loss: float):
    """The whole logits of a model without layers, and optax's cross entropy."""
    x = model.embedding.table[batch.tokens] * model.cfg.embed**0.5
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + model.cfg.norm_eps)
    table = (model.head or model.embedding).table
    scores = jnp.einsum("bsd,d,vd->bsv", x, 1.0 + model.norm.scale, table)
    cap = model.cfg.final_softcap
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    nll = optax.softmax_cross_entropy_with_integer_labels(scores, batch.targets)
    z = jax.nn.logsumexp(scores, axis=-1) ** 2
    return jnp.sum(batch.weights * (nll + z_loss * z)) / count


# Each device has 37 rows of the vocabulary and 32 tokens: one chunk, 3 of 13 rows, 10 of 4 rows, and one for each row.
@pytest.mark.parametrize("chunk", [1 << 24, 13 * 32, 100, 32])
@pytest.mark.parametrize("softcap, z_loss, tied", [(None, 0.0, True), (1.5, 0.01, False)])
def test_the_chunked_loss_and_its_gradients_are_those_of_float64(chunk, softcap, z_loss, tied, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    model = dataclasses.replace(NO_LAYERS, final_softcap=softcap, tied=tied)
    cfg = Config(model, Mesh(fsdp=4, tensor=2), Data(seq_len=16), z_loss=z_loss, compute_dtype="float32")
    mesh, batch = sharding.make_mesh(cfg.mesh), only(7, tiny.batch(0))
    parameters = LM.init(model, "float32", key=jax.random.key(0))
    parameters = jax.tree.map(lambda w: 2 * w + 0.1, parameters)  # the norm's scale starts at zero

    layouts = sharding.named(mesh, sharding.specs(parameters))
    tokens = NamedSharding(mesh, P(*sharding.BATCH[1:]))
    ours = jax.jit(jax.value_and_grad(step.sharded_loss(cfg, mesh, parameters), has_aux=True))
    placed = jax.device_put(parameters, layouts), jax.device_put(batch, tokens)
    (value, _), grads = ours(*placed, step.count(batch))

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        double = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)
        slow = jax.value_and_grad(slow_loss)
        expected, expected_grads = slow(double, batch, float(batch.weights.sum()), z_loss)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())
    jax.tree.map(close, grads, expected_grads)


def test_a_batch_in_which_nothing_counts_has_loss_zero_and_no_gradient():
    train_step, place, _ = compiled(tiny.CONFIG)
    _, metrics = train_step(start(tiny.CONFIG), place(only(0, BATCHES[0])))
    assert (metrics.loss, metrics.grad_norm, metrics.finite) == (0, 0, True)


# ---------------------------------------------------------------------------------------- the whole model


def test_no_logit_depends_on_a_later_token():
    model = tiny.new_model()
    tokens = np.random.default_rng(0).integers(0, tiny.MODEL.vocab, (2, 16))
    before = np.asarray(logits(model, tokens))
    for t in (1, 7, 15):
        changed = tokens.copy()
        changed[:, t] = (changed[:, t] + 1) % tiny.MODEL.vocab
        after = np.asarray(logits(model, changed))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.all(np.any(after[:, t:] != before[:, t:], axis=-1))  # the global layers see all that came before


# ------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    "optim, steps, expected",
    [
        # warm-up from lr / warmup to lr in `warmup` updates; half-way down the cosine; the end, and after it
        (
            Optim(lr=2.0, warmup=4, schedule="cosine", final_lr=0.1),
            20,
            {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 12: 2.0 * 0.55, 20: 0.2, 30: 0.2},
        ),
        # warm-up, stable until 15 of 20 updates, then linear
        (
            Optim(lr=2.0, warmup=4, schedule="wsd", decay_fraction=0.25, final_lr=0.0),
            20,
            {0: 0.5, 3: 2.0, 4: 2.0, 10: 2.0, 15: 2.0, 16: 1.6, 19: 0.4, 20: 0.0, 30: 0.0},
        ),
        # no warm-up, and a warm-up longer than the run
        (Optim(lr=2.0, warmup=0, final_lr=0.0), 10, {0: 2.0, 5: 1.0, 10: 0.0}),
        (Optim(lr=2.0, warmup=100), 10, {0: 0.2, 4: 1.0, 9: 2.0}),
    ],
)
def test_the_learning_rate_at_key_steps(optim, steps, expected):
    lr = schedule(optim, steps)
    ours = {count: float(lr(jnp.int32(count))) for count in expected}
    assert ours == pytest.approx(expected, abs=1e-6)
