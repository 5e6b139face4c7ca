"""The indexer and attention over what it chooses: exact choices, two forms with the same numbers, bounded memory."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec as P

from mintrain import sharding
from mintrain.config import Mesh
from mintrain.layers import indexer, sparse
from mintrain.layers.attend import attend
from mintrain.layers.cache import Latents
from mintrain.layers.mla import MLA
from mintrain.layers.sparse import Queries, sparse_attention

# ------------------------------------------------------------------------------------------- the choice

SCORES = hnp.arrays(np.float32, (2, 3, 7), elements=st.sampled_from([-1.5, -0.0, 0.0, 1e-30, 0.5, 0.5000001, 2.0]))
VISIBLE = hnp.arrays(np.bool_, (2, 3, 7))


def slow_choice(scores, visible, topk) -> np.ndarray:
    """Python's sort is stable: among equal scores the lowest index comes first."""
    mask = np.zeros(scores.shape, bool)
    for b, q in np.ndindex(scores.shape[:2]):
        seen = [k for k in range(scores.shape[2]) if visible[b, q, k]]
        mask[b, q, sorted(seen, key=lambda k: -scores[b, q, k])[:topk]] = True
    return mask


@settings(max_examples=100, deadline=None)
@given(scores=SCORES, visible=VISIBLE, topk=st.integers(1, 9))
def test_exactly_the_topk_visible_keys_are_chosen_and_ties_go_to_the_lowest_index(scores, visible, topk):
    weights, logits = np.ones((2, 3, 1), np.float32), scores[:, None]  # through the sum over heads: a zero has no sign
    summed = indexer.indexer_scores(jnp.asarray(logits), jnp.asarray(weights))
    expected = slow_choice(scores, visible, topk)
    assert np.all(expected.sum(-1) == np.minimum(topk, visible.sum(-1)))
    np.testing.assert_array_equal(indexer.top_mask(summed, jnp.asarray(visible), topk), expected)

    index, real = map(np.asarray, indexer.top_keys(summed, jnp.asarray(visible), topk))
    mask = np.zeros_like(expected)
    for b, q in np.ndindex(mask.shape[:2]):
        assert len(set(index[b, q])) == min(topk, 7)
        mask[b, q, index[b, q][real[b, q]]] = True
    np.testing.assert_array_equal(mask, expected)


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_scores_are_the_weighted_sum_of_rectified_products():
    q, k, w = random(0, 2, 5, 3, 8), random(1, 2, 7, 8), random(2, 2, 5, 3)
    products = np.einsum("bqnd,bkd->bqnk", *(x.astype(np.float64) for x in (q, k))) * 8**-0.5
    expected = np.einsum("bqnk,bqn->bqk", np.maximum(products, 0), w)
    ours = indexer.indexer_scores(indexer.indexer_logits(jnp.asarray(q), jnp.asarray(k)), jnp.asarray(w))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_the_kl_and_its_gradient_are_those_of_float64_and_exactly_zero_without_keys():
    scores, mask = 5 * random(0, 2, 4, 6), np.random.default_rng(1).random((2, 4, 6)) < 0.6
    mask[0, 1] = False
    target = np.exp(random(2, 2, 4, 6)) * mask
    target[1, 2, np.flatnonzero(mask[1, 2])[0]] = 0.0  # 0 log 0 = 0
    target /= np.maximum(target.sum(-1, keepdims=True), 1e-30)
    kl = lambda s: indexer.indexer_kl(s, jnp.asarray(target), jnp.asarray(mask))
    ours, gradient = kl(jnp.asarray(scores)), jax.grad(lambda s: jnp.sum(kl(s)))(jnp.asarray(scores))

    q = np.exp(scores.astype(np.float64)) * mask
    q /= np.maximum(q.sum(-1, keepdims=True), 1e-300)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(target > 0, target * np.log(target / q), 0).sum(-1)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    np.testing.assert_allclose(gradient, q - target, atol=1e-6)
    assert ours[0, 1] == 0 and not np.any(gradient[0, 1]) and not np.any(np.asarray(gradient)[~mask])


# --------------------------------------------------------------------------------------------- both forms

SEQ, TOPK, NOPE = 23, 5, 6
SEGMENTS = np.array([[1] * 9 + [2] * 12 + [0] * 2, [0] * SEQ], np.int32)  # two documents and padding; nothing at all
POSITIONS = np.array([[*range(9), *range(12), 0, 0], [0] * SEQ], np.int32)


def inputs(dtype: str = "float32"):
    """Queries, keys and the expansion of MLA with 4 heads, and an indexer with 3."""
    draw = lambda seed, *shape: jnp.asarray(random(seed, *shape), dtype)
    weights = jnp.asarray(random(2, 2, SEQ, 3))
    place = jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS)
    queries = Queries(draw(0, 2, SEQ, 4, NOPE + 8), draw(1, 2, SEQ, 3, 12), weights, *place)
    return queries, Latents(draw(3, 2, SEQ, 16 + 8), draw(4, 2, SEQ, 12), *place), draw(5, 16, 4, NOPE + 10)


def run(monkeypatch, form: str, topk: int | None, rows: int = SEQ, dtype: str = "float32"):
    """The output and the KL, and the gradients of a sum of both by what is float."""
    width = SEQ * 3 + 4 * (topk if form == "gathered" else SEQ)
    monkeypatch.setattr(sparse, "BLOCK", 2 * width * rows)
    monkeypatch.setattr(sparse, "GATHER_FROM", 0 if form == "gathered" else 1000)

    def total(arrays):
        out, kl = sparse_attention(*arrays, NOPE, 0.3, topk)
        return jnp.sum(jnp.sin(out.astype(jnp.float32) + 1.0)) + jnp.sum(kl), (out, kl)

    def sharded(arrays):
        (_, results), grads = jax.value_and_grad(total, has_aux=True, allow_int=True)(arrays)
        return results, jax.tree.map(lambda g: g if g.dtype == dtype or g.dtype == jnp.float32 else None, grads)

    mesh = sharding.make_mesh(Mesh())
    vary = lambda x: jax.lax.pcast(x, "tensor", to="varying")  # heads would be, on more devices
    local = lambda arrays: jax.tree.map(lambda x: jax.lax.pcast(x, "fsdp", to="varying"), arrays)
    inner = lambda a: sharded(local((dataclasses.replace(a[0], q=vary(a[0].q)), a[1], vary(a[2]))))
    mapped = jax.shard_map(inner, mesh=mesh, in_specs=P(), out_specs=P(("fsdp", "tensor")))
    return jax.tree.map(np.asarray, jax.jit(mapped)(jax.device_put(inputs(dtype), jax.NamedSharding(mesh, P()))))


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1))


@pytest.mark.parametrize("rows", [SEQ, 7, 1])  # one block; four, the last one padded; one for each query
@pytest.mark.parametrize("form", ["masked", "gathered"])
def test_both_forms_in_blocks_of_any_size_give_the_same_values_and_gradients(form, rows, monkeypatch):
    close(run(monkeypatch, form, TOPK, rows), run(monkeypatch, "masked", TOPK))


@pytest.mark.parametrize("form", ["masked", "gathered"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_and_queries_that_see_nothing_give_exact_zeros(form, dtype, monkeypatch):
    (out, kl), (queries, keys, _) = run(monkeypatch, form, TOPK, dtype=dtype)
    padding = SEGMENTS == 0
    for x in (out, kl, queries.q, queries.index_q, queries.index_weights, keys.compressed, keys.index_k):
        assert np.isfinite(x.astype(np.float32)).all()
        assert not np.any(x[padding]) and np.any(x[~padding])


def test_with_as_many_keys_as_there_are_attention_is_dense_to_the_last_bit(monkeypatch):
    queries, keys, up = inputs()
    mask = sparse.visible(queries.positions, keys.positions, queries.segments, keys.segments, None)
    scores = jnp.asarray(random(6, 2, SEQ, SEQ))
    np.testing.assert_array_equal(indexer.top_mask(scores, mask, SEQ), mask)
    np.testing.assert_array_equal(indexer.top_mask(scores, mask, SEQ + 1), mask)
    k, v = sparse.expand(keys.compressed, up, NOPE)
    dense = attend(jnp.moveaxis(queries.q, 1, 2)[:, :, None], k, v, mask, 0.3, None)[:, :, 0]
    (masked, _), _ = run(monkeypatch, "masked", SEQ)
    (warmup, _), _ = run(monkeypatch, "masked", None)
    np.testing.assert_array_equal(masked, warmup)
    np.testing.assert_allclose(masked, jnp.moveaxis(dense, 1, 2), atol=1e-6)
    close(run(monkeypatch, "gathered", SEQ), run(monkeypatch, "masked", None))


def test_a_key_that_is_not_chosen_changes_nothing(monkeypatch):
    """The output and the KL of a query depend on its topk keys alone, by both paths."""
    queries, keys, up = inputs()
    mask = sparse.visible(queries.positions, keys.positions, queries.segments, keys.segments, None)
    scores = indexer.indexer_scores(indexer.indexer_logits(queries.index_q, keys.index_k), queries.index_weights)
    chosen = np.asarray(indexer.top_mask(scores, mask, TOPK))
    for form in ("masked", "gathered"):
        (before, kl), _ = run(monkeypatch, form, TOPK)
        for key in (0, 4, 12):
            changed = keys.compressed.at[:, key].add(3.0)
            spoilt = lambda dtype, c=changed: (queries, dataclasses.replace(keys, compressed=c), up)
            monkeypatch.setitem(globals(), "inputs", spoilt)
            (after, kl_after), _ = run(monkeypatch, form, TOPK)
            monkeypatch.undo()
            differs = np.any(after != before, axis=(2, 3)) | (kl_after != kl)
            assert not np.any(differs & ~chosen[:, :, key]) and np.any(differs)


# ------------------------------------------------------------------------------------------------ memory


def largest(jaxpr) -> dict[tuple, int]:
    """The shapes of all arrays of a program."""
    found = {}
    for eqn in jaxpr.eqns:
        for var in (*eqn.invars, *eqn.outvars):
            shape = getattr(var.aval, "shape", ())
            found[shape] = math.prod(shape)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= largest(inner)
    return found


@pytest.mark.parametrize("form", ["masked", "gathered"])
def test_queries_by_keys_by_heads_never_exist_for_the_whole_sequence(form, monkeypatch):
    seq, heads, topk, block = 256, 4, 8, 1 << 14
    monkeypatch.setattr(sparse, "BLOCK", block)
    monkeypatch.setattr(sparse, "GATHER_FROM", 0 if form == "gathered" else 1000)
    ones = lambda *shape: jnp.ones(shape)
    place = jnp.zeros((1, seq), jnp.int32)
    queries = Queries(ones(1, seq, heads, 10), ones(1, seq, 3, 8), ones(1, seq, 3), place, place)
    keys = Latents(ones(1, seq, 12), ones(1, seq, 8), place, place)
    loss = lambda q, k: sum(jnp.sum(x) for x in sparse_attention(q, k, ones(8, heads, 13), 6, 1.0, topk))
    monkeypatch.setattr(sparse, "psum", lambda x, axis: x)
    grad = partial(jax.grad(loss, argnums=(0, 1), allow_int=True))
    sizes = largest(jax.make_jaxpr(grad)(queries, keys).jaxpr)
    shape = max(sizes, key=sizes.get)
    assert sizes[shape] <= max(2 * block, seq * heads * 16), shape  # a block, or what grows with seq alone


# ---------------------------------------------------------------------------------------------- in a layer


@pytest.mark.parametrize("topk", [3, 6])
def test_the_sequence_may_be_split_over_devices(topk):
    """MLA with its indexer gives the same output and KL where `context` splits the sequence."""
    cfg = tiny.latent(topk)
    layer = MLA.init(cfg, 40, False, key=jax.random.key(0))
    x = random(0, 2 * 24, 40)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24))
    results = []
    for mesh in (Mesh(), Mesh(context=4, tensor=2)):
        devices = sharding.make_mesh(mesh)
        rows = P(sharding.DATA_AXES, "context")

        def apply(layer, x, positions):
            out, kl, _ = layer(x.reshape(-1, 40), positions, positions * 0 + 1)
            return out.reshape(2, -1, 40), jax.lax.psum(kl, sharding.ALL_TOKENS)

        in_specs = (sharding.specs(layer), rows, rows)
        mapped = jax.shard_map(apply, mesh=devices, in_specs=in_specs, out_specs=(rows, P()))
        order = tiny.dealt(24, mesh.context)
        arrays = layer, x.reshape(2, 24, 40)[:, order], positions[:, order]
        out, kl = jax.jit(mapped)(*jax.device_put(arrays, sharding.named(devices, in_specs)))
        results.append((np.asarray(out)[:, np.argsort(order)], np.asarray(kl)))
    close(*results)
