"""Experts: the router's choices, no token lost and none computed twice, any split over devices, and balance."""

import dataclasses
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

from mintrain import costs, sharding, step
from mintrain.collectives import ragged_all_to_all
from mintrain.config import Config, Data, Mesh, Model, MoE, stages
from mintrain.layers import moe, router

V2 = MoE(experts=8, topk=3, width=12, groups=4, kept_groups=2, scaling=16.0)
PLAIN = MoE(experts=8, topk=2, width=12, activation="gelu")
ROUTERS = {"V2": V2, "V3": tiny.ROUTED, "Gemma 4": tiny.MOE, "plain": PLAIN}


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --------------------------------------------------------------------------------------------- the router


def slow_choice(ranks, c: MoE) -> np.ndarray:
    """One token at a time, by Python's stable sort."""
    chosen = []
    for row in ranks:
        groups = np.split(row, c.groups)
        of_group = [sorted(group, reverse=True)[: 2 if c.score == "sigmoid" else 1] for group in groups]
        kept = sorted(range(c.groups), key=lambda g: -np.float32(sum(of_group[g])))[: c.kept_groups]
        allowed = [e for e in range(c.experts) if e // (c.experts // c.groups) in kept]
        chosen.append(sorted(allowed, key=lambda e: -row[e])[: c.topk])
    return np.array(chosen)


@pytest.mark.parametrize("c", ROUTERS.values(), ids=ROUTERS)
@settings(max_examples=50, deadline=None)
@given(ranks=hnp.arrays(np.float32, (5, 8), elements=st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0])))
def test_the_best_experts_of_the_best_groups_are_chosen_and_ties_go_to_the_lowest_index(c, ranks):
    np.testing.assert_array_equal(router.choose(jnp.asarray(ranks), c), slow_choice(ranks, c))


def test_a_bias_chooses_and_does_not_weigh():
    c = MoE(experts=4, topk=2, width=1, score="sigmoid", normalise=True, scaling=2.5, bias_rate=0.1)
    scores = jax.nn.sigmoid(jnp.asarray([[2.0, 1.0, 0.0, -1.0]]))
    biased = router.choose(scores + jnp.asarray([[0.0, -9.0, 0.0, 9.0]]), c)
    np.testing.assert_array_equal(biased, [[3, 0]])
    chosen = np.asarray(scores)[0, [3, 0]]
    np.testing.assert_allclose(router.combine_weights(scores, biased, c), [2.5 * chosen / chosen.sum()], rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_balance_loss_is_the_papers_formula_and_padding_does_not_count(kind):
    batch, seq, experts, topk = 3, 7, 5, 2
    scores = router.router_scores(jnp.asarray(random(0, batch * seq, experts)), kind)
    index = jax.lax.top_k(scores, topk)[1]
    real = np.arange(seq)[None] < np.array([[7], [4], [0]])

    def slow(scores, index):
        total = 0.0
        for row in range(batch):
            tokens = [row * seq + t for t in range(seq) if real[row, t]]
            for e in range(experts):
                f = experts / topk * np.mean([e in index[t] for t in tokens]) if tokens else 0.0
                p = np.mean([scores[t, e] / scores[t].sum() for t in tokens]) if tokens else 0.0
                total += len(tokens) * f * p
        return total

    ours = alone(router.balance_loss)(scores, index, jnp.asarray(real))
    np.testing.assert_allclose(ours, slow(np.asarray(scores, np.float64), np.asarray(index)), rtol=1e-6)
    even = jnp.asarray(np.stack([np.arange(20) % 5, (np.arange(20) + 1) % 5], axis=1), jnp.int32)
    uniform = alone(router.balance_loss)(jnp.ones((20, 5)), even, jnp.ones((4, 5), bool))
    np.testing.assert_allclose(uniform / 20, 1.0, rtol=1e-6)


def alone(function):
    """`function` on a mesh of one device, its arguments varying over every axis as real ones do."""
    mesh = sharding.make_mesh(Mesh())
    vary = lambda *a: jax.tree.map(lambda x: jax.lax.pcast(x, sharding.AXES, to="varying"), a)
    mapped = jax.shard_map(
        lambda *a: jax.tree.map(lambda y: y[None], function(*vary(*a))),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(sharding.AXES),
    )
    return lambda *a: jax.tree.map(lambda y: y[0], jax.jit(mapped)(*a))


def test_scores_and_gradients_of_more_tokens_than_a_block_are_those_of_float64(monkeypatch):
    monkeypatch.setattr(router, "BLOCK", 4)
    layer, x = router.Router.init(tiny.ROUTED, tiny.DEEPSEEK, key=jax.random.key(0)), random(1, 13, 40)

    def value(layer, x):
        scores = layer(x)[2]
        return jnp.sum(jnp.sin(scores)), scores

    (by_layer, by_x), scores = alone(jax.grad(value, argnums=(0, 1), has_aux=True))(layer, x)
    x, w = x.astype(np.float64), np.asarray(layer.weight, np.float64)
    wanted = 1 / (1 + np.exp(-x @ w))
    back = np.cos(wanted) * wanted * (1 - wanted)
    np.testing.assert_allclose(scores, wanted, atol=1e-6)
    np.testing.assert_allclose(by_x, back @ w.T, atol=1e-6)
    np.testing.assert_allclose(by_layer.weight, x.T @ back, atol=1e-5)


# -------------------------------------------------------------------------------------------- the experts


def slow_experts(layer: moe.MoE, x: np.ndarray, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One token and one expert at a time, in float64."""
    x, gate_up, down = (np.asarray(a, np.float64) for a in (x, layer.gate_up, layer.down))
    silu = lambda y: y / (1 + np.exp(-y))
    out = np.zeros(x.shape)
    for t, k in np.ndindex(index.shape):
        e = index[t, k]
        gate, up = np.einsum("d,dpf->pf", x[t], gate_up[e])
        out[t] += weights[t, k] * (silu(gate) * up) @ down[e]
    return out


@pytest.mark.parametrize(
    "mesh", [Mesh(), Mesh(expert=8), Mesh(expert=4, fsdp=2), Mesh(expert=2, tensor=2, context=2)], ids=sharding.describe
)
@pytest.mark.parametrize("skewed", [False, True])
def test_experts_on_any_mesh_are_those_of_float64_and_no_token_is_lost(mesh, skewed):
    """Also where all tokens of all devices want the same experts."""
    c, model = tiny.ROUTED, tiny.DEEPSEEK
    layer = moe.MoE.init(c, model, key=jax.random.key(0))
    x = random(1, 16, 5, 40)
    if skewed:
        x = np.abs(x)  # inputs of one sign, so that three experts win everywhere
        lean = jnp.full_like(layer.router.weight, -0.1).at[:, jnp.asarray([1, 0, 3])].set(0.1)
        layer = dataclasses.replace(layer, router=dataclasses.replace(layer.router, weight=lean))
    devices = sharding.make_mesh(mesh)
    tokens, specs = P(sharding.DATA_AXES + ("context",), None, None), sharding.specs(layer)

    def apply(layer, x):
        flat = x.reshape(-1, 40)
        out, load, _ = layer(flat, flat, jnp.isfinite(x[..., 0]))
        index, weights, _ = layer.router(flat)
        shape = lambda y: y.reshape(*x.shape[:2], -1)
        return shape(out), shape(index), shape(weights), jax.lax.psum(load, sharding.ALL_TOKENS)

    out_specs = (tokens, tokens, tokens, P())
    mapped = jax.jit(jax.shard_map(apply, mesh=devices, in_specs=(specs, tokens), out_specs=out_specs))
    placed = jax.device_put((layer, x), sharding.named(devices, (specs, tokens)))
    out, index, weights, load = (np.asarray(y).reshape(-1, y.shape[-1]) for y in mapped(*placed))
    np.testing.assert_array_equal(
        load[:, 0] if load.ndim > 2 else load.ravel(), np.bincount(index.ravel(), minlength=8)
    )
    assert not skewed or np.array_equal(np.flatnonzero(load.ravel()), [0, 1, 3])
    np.testing.assert_allclose(out, slow_experts(layer, x.reshape(-1, 40), index, weights), atol=2e-5)


def test_grouped_matmul_on_a_cpu_is_ragged_dot_with_its_gradients():
    rows, weights, sizes = random(0, 40, 6), random(1, 3, 6, 5), jnp.asarray([16, 0, 16], jnp.int32)

    def total(multiply, rows, weights):
        out = multiply(jnp.asarray(rows), jnp.asarray(weights))
        return jnp.sum(jnp.sin(out[:32])), out[:32]  # the others are beyond the last expert's rows

    ours = partial(total, lambda r, w: moe.grouped_matmul(r, w, sizes, 8))
    theirs = partial(total, lambda r, w: jax.lax.ragged_dot(r, w, sizes))
    for a, b in zip(
        *(jax.tree.leaves(jax.value_and_grad(f, (0, 1), has_aux=True)(rows, weights)) for f in (ours, theirs)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_is_multiplied_grows_with_the_experts_of_a_token_and_not_with_all():
    def flops(**change) -> int:
        layer = dataclasses.replace(tiny.SPARSE, moe=dataclasses.replace(PLAIN, width=64, **change))
        model = Model(vocab=74, embed=40, stages=stages((layer,)))
        return costs.forward_flops(Config(model, data=Data(seq_len=512), per_device_batch_size=8))

    one_expert = 2 * 3 * 40 * 64 * 512 * 8
    rise = lambda a, b: (flops(**b) - flops(**a)) / one_expert
    assert rise(dict(experts=8, topk=1), dict(experts=8, topk=2)) == 1 + 1 / (3 * 64)  # with the weighted sum
    assert rise(dict(experts=8, topk=2), dict(experts=32, topk=2)) == 24 / (3 * 64)  # the router


@pytest.mark.parametrize("topk", [2, 3])
def test_what_is_multiplied_on_each_of_four_devices_is_a_fourth_with_experts_used_alike(topk):
    """Though each has room for all rows that could come: those of all four. The backward pass multiplies twice."""
    layer = dataclasses.replace(tiny.SPARSE, moe=dataclasses.replace(PLAIN, width=64, experts=4, topk=topk))
    model = Model(vocab=74, embed=40, stages=stages((layer,)))
    cfg = Config(model, data=Data(seq_len=512), per_device_batch_size=8, remat="none")

    def counted(cfg: Config) -> int:
        mesh = sharding.abstract_mesh(cfg.mesh)
        arguments = step.abstract_state(cfg, mesh), step.abstract_batch(cfg, mesh)
        return costs.matmul_flops(step.make_train_step(cfg, mesh).trace(*arguments).jaxpr)

    one, four = counted(cfg), counted(dataclasses.replace(cfg, mesh=Mesh(expert=4), per_device_batch_size=2))
    assert 4 * four == pytest.approx(one, rel=0.05)
    assert 1 < one / (3 * costs.forward_flops(cfg)) < 1.1  # blocks that are not full


# ------------------------------------------------------------------------------------------- the exchange


def exchange(sizes: np.ndarray, rows: np.ndarray, capacity: int, lower: str | None = None):
    """`rows` [device, row, width] after `ragged_all_to_all`, or the program for another platform."""
    mesh = sharding.make_mesh(Mesh(expert=len(sizes)))
    send = lambda rows: ragged_all_to_all(rows[0], jnp.asarray(sizes), capacity, "expert")[None]
    mapped = jax.jit(jax.shard_map(send, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    placed = jax.device_put(rows, jax.NamedSharding(mesh, P("expert")))
    return (
        np.asarray(mapped(placed))
        if lower is None
        else mapped.trace(placed).lower(lowering_platforms=(lower,)).as_text()
    )


@settings(max_examples=15, deadline=None)
@given(sizes=hnp.arrays(np.int32, (4, 4), elements=st.integers(0, 5)))
def test_the_exchange_sends_every_row_to_its_place(sizes):
    rows = random(0, 4, 20, 3)
    ours = exchange(sizes, rows, 20)
    ends = np.cumsum(sizes, axis=1)
    for target in range(4):
        sent = [
            rows[source, ends[source, target] - sizes[source, target] : ends[source, target]] for source in range(4)
        ]
        expected = np.concatenate(sent)
        np.testing.assert_array_equal(ours[target, : len(expected)], expected)
        assert not np.any(ours[target, len(expected) :])


def test_a_tpu_gets_its_own_exchange_and_grouped_matmul():
    assert "ragged_all_to_all" in exchange(np.full((4, 4), 2, np.int32), random(0, 4, 8, 3), 8, "tpu")
    multiply = jax.jit(lambda r, w, s: moe.grouped_matmul(r, w, s, 8))
    shapes = jnp.ones((16, 6)), jnp.ones((2, 6, 5)), jnp.asarray([8, 8], jnp.int32)
    assert "ragged_dot" in multiply.trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()


# ------------------------------------------------------------------------------------------------ balance


def test_the_bias_rises_where_the_load_is_low():
    bias, load = jnp.zeros(4), jnp.asarray([8.0, 1.0, 3.0, 0.0])
    np.testing.assert_allclose(router.balanced_bias(bias, load, 0.01), [-0.01, 0.01, 0.0, 0.01])


def test_the_bias_brings_a_skewed_load_from_above_3_to_below_1_3_within_200_steps():
    """The train step itself, with nothing but the bias to balance and a learning rate that moves nothing else."""
    c = MoE(experts=8, topk=2, width=12, score="sigmoid", normalise=True, bias_rate=0.005)
    layer = dataclasses.replace(tiny.SPARSE, moe=c)
    cfg = dataclasses.replace(
        tiny.CONFIG,
        model=Model(vocab=74, embed=40, stages=stages((layer,)), embed_scale=False, tied=False),
        optim=dataclasses.replace(tiny.CONFIG.optim, lr=1e-9),
        per_device_batch_size=32,
        data=Data(seq_len=32),
    )
    mesh = sharding.make_mesh(cfg.mesh)
    state, loads = skewed(step.new_state(cfg, mesh)), []
    train_step = step.make_train_step(cfg, mesh)
    for i in range(200):
        state, metrics = train_step(state, tiny.on_mesh(cfg, mesh, tiny.batch(i, rows=32, seq=32)))
        loads.append(float(metrics.expert_load))
    assert loads[0] > 3 and np.mean(loads[-10:]) < 1.3, loads[:: len(loads) // 10]


def skewed(state: step.State) -> step.State:
    """Two experts are liked better by the router: a common direction of the inputs, and weights along it."""
    router_ = state.model.stages[0][0].moe.router
    table = state.model.embedding.table
    direction = jnp.ones(table.shape[1]) / table.shape[1] ** 0.5
    towards = jnp.zeros(8).at[jnp.asarray([2, 5])].set(0.6)
    leaves = {id(router_.weight): router_.weight + (direction[:, None] * towards[None])[None], id(table): table + 0.7}
    return jax.tree.map(lambda x: jax.device_put(leaves[id(x)], x.sharding) if id(x) in leaves else x, state)
