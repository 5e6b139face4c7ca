"""The dtype contract: what is declared float32 or boolean is never anything else, and a violation is a type error.

And what the contract is for: masks are applied once, and a query that sees no key gives exact zeros, never a NaN.
"""

import contextlib
import dataclasses
import inspect
import re
from types import SimpleNamespace
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float32, Int32, TypeCheckError, UInt32

from mintrain import arrays, logits, loss, sharding, step
from mintrain.block import Aux
from mintrain.config import Config
from mintrain.layers import (
    attend,
    attention,
    embedding,
    indexer,
    linear,
    mla,
    mlp,
    moe,
    norm,
    per_layer,
    rope,
    router,
    sparse,
)
from mintrain.loss import Batch
from mintrain.model import LM

# -------------------------------------------------------------------------------- what signatures declare

DECLARED = {  # function: (the checked parameters, what it returns)
    attend.visible: ({}, Bool),
    attend.attention_logits: ({}, Float32),
    attend.masked_softmax: (dict(logits=Float32, mask=Bool), Float32),
    attend.attend: (dict(mask=Bool), None),
    norm.inverse_rms: (dict(x=Float32), Float32),
    rope.angles: ({}, Float32),
    rope.rotate: (dict(angle=Float32), None),
    loss.output_logits: ({}, Float32),
    loss.log_sum_exp: (dict(logits=Float32), Float32),
    loss.token_loss: (dict(target_logit=Float32, log_z=Float32, weights=Float32), Float32),
    loss.target_statistics: (dict(table=Float32), Float32),
    linear.normal: ({}, Float32),
    linear.gather: (dict(weight=Float32), None),
    indexer.indexer_logits: ({}, Float32),
    indexer.indexer_scores: (dict(logits=Float32, weights=Float32), Float32),
    indexer.top_keys: (dict(scores=Float32, visible=Bool), None),
    indexer.top_mask: (dict(scores=Float32, visible=Bool), Bool),
    indexer.indexer_kl: (dict(scores=Float32, target=Float32, mask=Bool), Float32),
    sparse.gathered_logits: ({}, Float32),
    sparse.target: (dict(weights=Float32), Float32),
    sparse.masked: (dict(scores=Float32, mask=Bool), None),
    sparse.gathered: (dict(scores=Float32), None),
    router.router_logits: (dict(x=Float32, weight=Float32), Float32),
    router.router_scores: (dict(logits=Float32), Float32),
    router.choose: (dict(ranks=Float32), Int32),
    router.combine_weights: (dict(scores=Float32), Float32),
    router.expert_load: (dict(real=Bool), Float32),
    router.balance_loss: (dict(scores=Float32, real=Bool), Float32),
    router.balanced_bias: (dict(bias=Float32, load=Float32), Float32),
    step.add: (dict(total=Float32, part=Float32), Float32),
    step.logits: ({}, Float32),
    LM.output_table.fget: ({}, Float32),
}


def dtypes(annotation) -> list[tuple[str, ...]]:
    """The dtypes of each array in an annotation, also inside tuples and PyTree[...]."""
    if hasattr(annotation, "dtypes"):
        return [tuple(annotation.dtypes)]
    inner = (annotation.leaftype,) if hasattr(annotation, "leaftype") else get_args(annotation)
    return [found for part in inner for found in dtypes(part)] or [()]


@pytest.mark.parametrize("function", DECLARED, ids=lambda f: f.__qualname__)
def test_signatures_declare_the_contract(function):
    parameters, returned = DECLARED[function]
    annotations = inspect.get_annotations(function)
    for name, declared in {**parameters, **({"return": returned} if returned else {})}.items():
        assert set(dtypes(annotations[name])) == {tuple(declared.dtypes)}, name


def test_every_parameter_is_declared_float32():
    for model in (tiny.MODEL, tiny.GEMMA4, tiny.DEEPSEEK):
        shapes = jax.eval_shape(lambda model=model: LM.init(model, "bfloat16", key=jax.random.key(0)))
        assert all(weight.dtypes == ("float32",) for weight in arrays.weights(shapes))


def test_fields_of_batch_state_and_metrics_are_declared():
    classes = (Batch, step.State, step.Metrics, loss.Report, Aux)
    fields = {f.name: f.type for c in classes for f in dataclasses.fields(c)}
    ints = ("tokens", "targets", "positions", "segments", "step", "skipped")
    floats = ("weights", "loss", "grad_norm", "lr", "nll", "mtp_nll", "mtp_loss", "balance", "indexer_kl", "load")
    declared = dict.fromkeys(ints, Int32) | dict.fromkeys((*floats, "expert_load"), Float32)
    for name, dtype in {**declared, "finite": Bool, "key": UInt32}.items():
        assert set(dtypes(fields[name])) - {()} == {tuple(dtype.dtypes)}, name
    assert [dtypes(f.type) for f in dataclasses.fields(loss.Counts)] == [[tuple(Float32.dtypes)]] * 2


# ------------------------------------------------------------------ wrong dtypes, one argument at a time


def z(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


MASK, LOGITS = z(2, 3, 5, dtype=bool), z(2, 4, 6, 3, 5)
SCORES, SEEN, CHOICE = z(2, 3, 5), z(2, 3, 5, dtype=bool), z(3, 2, dtype=jnp.int32)
QUERIES = dict(q=z(2, 3, 4, 8), index_q=z(2, 3, 6, 7), index_weights=z(2, 3, 6))
QUERIES |= dict.fromkeys(("positions", "segments"), z(2, 3, dtype=jnp.int32))
Q, K, IDS = z(2, 4, 6, 3, 8), z(2, 4, 5, 8), z(2, 3, dtype=jnp.int32)
CALLS = {  # every argument of these calls is right
    attend.masked_softmax: dict(logits=LOGITS, mask=MASK),
    attend.attend: dict(q=Q, k=K, v=K, mask=MASK, scale=1.0, softcap=None),
    norm.inverse_rms: dict(x=z(2, 5), eps=1e-6),
    rope.rotate: dict(x=z(2, 5, 3, 8), angle=z(2, 3, 4)),
    loss.log_sum_exp: dict(logits=z(2, 7)),
    loss.token_loss: dict(target_logit=z(3), log_z=z(3), weights=z(3)),
    loss.target_statistics: dict(x=z(3, 4), table=z(7, 4), targets=z(3, dtype=jnp.int32), softcap=None),
    linear.gather: dict(spec="embed ff -> embed ff", weight=z(3, 4), dtype=jnp.dtype("bfloat16")),
    indexer.indexer_scores: dict(logits=z(2, 4, 3, 5), weights=z(2, 3, 4)),
    indexer.top_keys: dict(scores=SCORES, visible=SEEN, topk=2),
    indexer.top_mask: dict(scores=SCORES, visible=SEEN, topk=2),
    indexer.indexer_kl: dict(scores=SCORES, target=SCORES, mask=SEEN),
    sparse.target: dict(weights=z(2, 1, 4, 3, 5)),
    sparse.masked: dict(
        queries=sparse.Queries(**QUERIES), expanded=(z(2, 4, 5, 8), z(2, 4, 5, 9)), scores=SCORES, mask=SEEN, scale=1.0
    ),
    sparse.gathered: dict(
        **dict(queries=sparse.Queries(**QUERIES), compressed=z(2, 5, 12), up=z(10, 4, 15), scores=SCORES),
        **dict(chosen=(z(2, 3, 2, dtype=jnp.int32), z(2, 3, 2, dtype=bool)), nope=6, scale=1.0),
    ),
    router.router_logits: dict(x=z(3, 4), weight=z(4, 8)),
    router.router_scores: dict(logits=z(3, 8), kind="sigmoid"),
    router.choose: dict(ranks=z(3, 8), c=tiny.ROUTED),
    router.combine_weights: dict(scores=z(3, 8), index=CHOICE, c=tiny.ROUTED),
    router.expert_load: dict(index=CHOICE, real=z(3, dtype=bool), experts=8),
    router.balance_loss: dict(scores=z(3, 8), index=CHOICE, real=z(1, 3, dtype=bool)),
    router.balanced_bias: dict(bias=z(8), load=z(8), rate=0.1),
    step.add: dict(total={"w": z(3)}, part={"w": z(3)}),
    Batch: dict(tokens=IDS, targets=IDS, positions=IDS, segments=IDS, weights=z(2, 3)),
    norm.RMSNorm: dict(scale=z(4), offset=0.0, eps=1e-6),
    attention.Attention: dict(
        **dict(q=z(2, 3, 4, 6), k=z(2, 3, 6), v=z(2, 3, 6), o=z(3, 4, 6, 2), q_norm=None, k_norm=None),
        **dict(cfg=tiny.LOCAL, eps=1e-6),
    ),
    mlp.MLP: dict(gate=z(2, 3), up=z(2, 3), down=z(3, 2), activation="gelu"),
    embedding.Embedding: dict(table=z(2, 3)),
    norm.LayerNorm: dict(scale=z(4), bias=z(4), eps=1e-6),
    sparse.Queries: QUERIES,
    indexer.Indexer: dict(
        **dict(q=z(2, 3, 4), k=z(5, 4), k_norm=norm.LayerNorm(z(4), z(4), 1e-6), head_weights=z(5, 3)),
        **dict(rope=tiny.latent(3).rope, rope_dim=8, topk=3),
    ),
    mla.MLA: dict(
        **dict(q=z(2, 3, 4), q_a=z(2, 5), q_norm=None, q_b=z(5, 3, 4), kv_a=z(2, 7), kv_b=z(6, 3, 8), o=z(3, 9, 2)),
        **dict(kv_norm=norm.RMSNorm(z(6), 0.0, 1e-6), indexer=None, cfg=tiny.latent(3), warmup=False),
    ),
    router.Router: dict(weight=z(4, 8), scale=z(4), expert_scale=z(8), bias=z(8), cfg=tiny.ROUTED, eps=1e-6),
    moe.MoE: dict(
        **dict(router=router.Router(z(4, 8), None, None, tiny.ROUTED, 1e-6, None), cfg=tiny.ROUTED),
        **dict(gate_up=z(8, 4, 2, 3), down=z(8, 3, 4)),
    ),
    per_layer.PerLayerGate: dict(gate=z(2, 3), out=z(3, 2), norm=norm.RMSNorm(z(2), 0.0, 1e-6)),
    per_layer.PerLayerInputs: dict(
        embedding=embedding.Embedding(z(7, 6)), projection=z(2, 6), norm=norm.RMSNorm(z(3), 0.0, 1e-6)
    ),
}
CHECKED = {f: tuple(parameters) for f, (parameters, _) in DECLARED.items() if parameters and f in CALLS} | {
    Batch: ("tokens", "targets", "positions", "segments", "weights"),
    norm.RMSNorm: ("scale",),
    attention.Attention: ("q", "k", "v", "o"),
    mlp.MLP: ("gate", "up", "down"),
    embedding.Embedding: ("table",),
    norm.LayerNorm: ("scale", "bias"),
    sparse.Queries: ("index_weights",),
    indexer.Indexer: ("q", "k", "head_weights"),
    mla.MLA: ("q", "q_a", "q_b", "kv_a", "kv_b", "o"),
    router.Router: ("weight", "scale", "expert_scale", "bias"),
    moe.MoE: ("gate_up", "down"),
    per_layer.PerLayerGate: ("gate", "out"),
    per_layer.PerLayerInputs: ("projection",),
}


def wrong(x: jax.Array) -> jax.Array:
    """bfloat16 instead of float32, an additive float mask instead of a boolean one, floats instead of integers."""
    if x.dtype == jnp.float32:
        return x.astype(jnp.bfloat16)
    return jnp.where(x, 0.0, -jnp.inf) if x.dtype == jnp.bool_ else x.astype(jnp.float32)


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_the_right_dtypes_pass(function):
    with contextlib.suppress(NameError, TypeError):  # some ask for a mesh axis, once their arguments are checked
        function(**CALLS[function])


@pytest.mark.parametrize("function, name", [(f, n) for f, names in CHECKED.items() for n in names])
def test_a_wrong_dtype_is_a_type_error_that_names_the_argument(function, name):
    arguments = {**CALLS[function], name: jax.tree.map(wrong, CALLS[function][name])}
    with pytest.raises(TypeCheckError, match=rf"{function.__name__}(?s:.*)typechecking parameter '{name}'"):
        function(**arguments)


def test_a_wrong_shape_is_a_type_error_too():
    with pytest.raises(TypeCheckError, match="parameter 'mask'"):
        attend.masked_softmax(LOGITS, z(2, 5, 3, dtype=bool))
    with pytest.raises(TypeCheckError, match="parameter 'k'"):
        attend.attention_logits(Q, z(2, 5, 4, 8), 1.0, None)
    with pytest.raises(TypeCheckError, match="parameter 'weights'"):
        Batch(IDS, IDS, IDS, IDS, z(3, 2))


def test_check_finds_weights_that_were_changed_behind_the_type_checker():
    shapes = jax.eval_shape(lambda: LM.init(tiny.MODEL, "float32", key=jax.random.key(0)))
    arrays.check(shapes)
    cast = lambda path, x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if ".mlp.down" in path else x.dtype)
    changed = jax.tree.map_with_path(lambda p, x: cast(jax.tree_util.keystr(p), x), shapes)
    with pytest.raises(TypeError, match=r"stages\[0\]\[0\]\.mlp\.down is bfloat16, declared float32"):
        arrays.check(changed)
    grow = lambda path, x: jax.ShapeDtypeStruct((*x.shape[:-1], 29) if ".mlp.up" in path else x.shape, x.dtype)
    changed = jax.tree.map_with_path(lambda p, x: grow(jax.tree_util.keystr(p), x), shapes)
    with pytest.raises(TypeError, match=r"stages\[0\]\[0\]\.mlp\.up has ff=29, but .*\.gate has ff=28"):
        arrays.check(changed)


# --------------------------------------------------------------------------------- the whole train step

TWO_LAYERS = dataclasses.replace(tiny.MODEL, stages=(dataclasses.replace(tiny.MODEL.stages[0], repeats=1),))
WHOLE = dataclasses.replace(tiny.CONFIG, model=TWO_LAYERS, compute_dtype="bfloat16", remat="none")
SPARSE = dataclasses.replace(WHOLE, model=tiny.DEEPSEEK)


def trace_train_step(in_bfloat16: str | None = None, cfg: Config = WHOLE):
    """Trace everything that a step computes, on no device at all. `in_bfloat16`: a parameter that the state has so."""
    mesh = sharding.abstract_mesh(cfg.mesh)
    state = step.abstract_state(cfg, mesh)
    cast = lambda w: jax.ShapeDtypeStruct(w.value.shape, "bfloat16", sharding=w.value.sharding)
    leaves = [cast(w) if in_bfloat16 == w.path else w.value for w in arrays.weights(state.model)]
    model = jax.tree.unflatten(jax.tree.structure(state.model), leaves)
    state = eqx.tree_at(lambda s: s.model, state, model)
    return jax.eval_shape(step.make_train_step(cfg, mesh), state, step.abstract_batch(cfg, mesh))


def trace_loss(cfg: Config = WHOLE):
    """The forward pass alone, which is half of the time."""
    mesh = sharding.abstract_mesh(cfg.mesh)
    model = step.abstract_state(cfg, mesh).model
    sharded_loss = step.sharded_loss(cfg, mesh, model)

    def loss_of(model, batch):
        return sharded_loss(model, jax.tree.map(lambda x: x[0], batch), step.count(batch))

    jax.eval_shape(loss_of, model, step.abstract_batch(cfg, mesh))


def careless(function):
    """`function`, but what it returns is bfloat16."""
    return lambda *a, **k: jax.tree.map(lambda x: x.astype(jnp.bfloat16), function(*a, **k))


def instead(module, **functions) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(module), **functions})


def bfloat16_gradients(*args, **kwargs):
    inner = jax.value_and_grad(*args, **kwargs)
    return lambda *a: (inner(*a)[0], jax.tree.map(lambda g: g.astype(jnp.bfloat16), inner(*a)[1]))


def additive(*args, visible=attend.visible) -> jax.Array:
    return jnp.where(visible(*args), 0.0, -jnp.inf).astype(jnp.float32)


MISTAKES = {  # what the error must say: the mistake
    "return value of .*attention_logits": (attend, "jnp", instead(jnp, einsum=careless(jnp.einsum))),
    "return value of .*masked_softmax": (attend, "jnp", instead(jnp, exp=careless(jnp.exp))),
    "parameter 'logits'": (attend, "attention_logits", careless(attend.attention_logits)),
    "parameter 'mask'": (attend, "visible", additive),
    "return value of .*inverse_rms": (norm, "jnp", instead(jnp, mean=careless(jnp.mean))),
    "parameter 'angle'": (attention, "angles", careless(rope.angles)),
    "return value of .*output_logits": (loss, "jnp", instead(jnp, einsum=careless(jnp.einsum))),
    "parameters of .*log_sum_exp": (loss, "output_logits", careless(loss.output_logits)),
    "parameter 'target_logit'": (loss, "target_statistics", careless(loss.target_statistics)),
    "return value of .*microbatch": (step, "jax", instead(jax, value_and_grad=bfloat16_gradients)),
}


SPARSE_MISTAKES = {  # the same in a DeepSeek-V3.2
    "return value of .*Indexer.__call__": (indexer, "jnp", instead(jnp, einsum=careless(jnp.einsum))),
    "return value of .*indexer_logits": (
        *(indexer, "jax"),
        instead(jax, nn=instead(jax.nn, relu=careless(jax.nn.relu))),
    ),
    "return value of .*indexer_scores": (indexer, "jnp", instead(jnp, sum=careless(jnp.sum))),
    "parameter 'logits'": (sparse, "indexer_logits", careless(indexer.indexer_logits)),
    "parameter 'scores'": (sparse, "indexer_scores", careless(indexer.indexer_scores)),
    "parameter 'visible'": (sparse, "visible", additive),
    "parameter 'mask'": (sparse, "top_mask", lambda s, v, k: jnp.where(indexer.top_mask(s, v, k), 0.0, -jnp.inf)),
    "return value of .*gathered_logits": (sparse, "jnp", instead(jnp, einsum=careless(jnp.einsum))),
    "parameter 'target'": (sparse, "target", careless(sparse.target)),
    "return value of .*router_logits": (router, "jnp", instead(jnp, einsum=careless(jnp.einsum))),
    "return value of .*combine_weights": (router, "jnp", instead(jnp, take_along_axis=careless(jnp.take_along_axis))),
}


@pytest.mark.parametrize("cfg", [WHOLE, SPARSE], ids=["Gemma", "DeepSeek"])
def test_the_train_step_keeps_the_contract(cfg):
    trace_train_step(cfg=cfg)


@pytest.mark.parametrize("message", SPARSE_MISTAKES)
def test_a_mistake_in_a_deepseek_is_an_error_when_the_train_step_is_traced(message, monkeypatch):
    monkeypatch.setattr(*SPARSE_MISTAKES[message])
    with pytest.raises(TypeCheckError, match=message):
        trace_loss(SPARSE)


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_anywhere_in_the_train_step_is_an_error_when_it_is_traced(message, monkeypatch):
    monkeypatch.setattr(*MISTAKES[message])
    with pytest.raises(TypeCheckError, match=message):
        trace_train_step() if "microbatch" in message else trace_loss()


@pytest.mark.parametrize("path", ["stages[0][1].mlp.down", "stages[0][0].mlp_norm.scale", "embedding.table"])
def test_a_bfloat16_parameter_is_an_error_when_the_train_step_is_traced(path):
    with pytest.raises(TypeError, match=re.escape(f"{path} is bfloat16, declared float32")):
        trace_train_step(path)


def test_a_bfloat16_moment_is_an_error_that_names_the_optimizer_state():
    abstract = step.abstract_state(tiny.CONFIG, sharding.abstract_mesh(tiny.CONFIG.mesh))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    cast = lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
    with pytest.raises(TypeCheckError, match="parameter 'opt'"):
        dataclasses.replace(state, opt=jax.tree.map(cast, state.opt))


# -------------------------------------------------------------------------------- masks and attention


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def documents(length: int):
    """Segments and positions as any packing might produce them, and some as none would."""
    ints = lambda largest: st.lists(st.integers(0, largest), min_size=length, max_size=length)
    return st.tuples(ints(2), ints(6)).map(lambda pair: np.array(pair, np.int32))


@settings(max_examples=60, deadline=None)
@given(query=documents(4), key=documents(7), window=st.one_of(st.none(), st.integers(1, 5)))
def test_visible_is_what_a_slow_loop_says(query, key, window):
    (query_segments, query_positions), (key_segments, key_positions) = query, key
    inputs = query_positions, key_positions, query_segments, key_segments
    ours = attend.visible(*(jnp.asarray(x)[None] for x in inputs), window)
    for q in range(4):
        for k in range(7):
            one_document = query_segments[q] == key_segments[k] and query_segments[q] != 0
            back = query_positions[q] - key_positions[k]
            assert ours[0, q, k] == (one_document and back >= 0 and (window is None or back < window))


def slow_attention(q, k, v, mask, scale, softcap):
    """One query head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, n, g, i in np.ndindex(q.shape[:-1]):
        scores = scale * k[b, n] @ q[b, n, g, i]
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max()) * mask[b, i]
        out[b, n, g, i] = weights @ v[b, n] / max(weights.sum(), 1e-300)
    return out


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_is_what_float64_says(softcap):
    q, k, v = random(0, 2, 3, 4, 5, 6), random(1, 2, 3, 7, 6), random(2, 2, 3, 7, 6)
    mask = np.random.default_rng(3).random((2, 5, 7)) < 0.5
    ours = attend.attend(*map(jnp.asarray, (q, k, v, mask)), 0.7, softcap)
    np.testing.assert_allclose(ours, slow_attention(q, k, v, mask, 0.7, softcap), atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_sees_nothing_and_what_nothing_sees_gives_exact_zeros(dtype):
    q, k, v = (jnp.asarray(random(i, *s), dtype) for i, s in enumerate([(2, 3, 4, 5, 6), (2, 3, 7, 6), (2, 3, 7, 6)]))
    mask = np.random.default_rng(3).random((2, 5, 7)) < 0.7
    mask[0, 2], mask[1] = False, False  # one query, and a whole sequence, see nothing
    mask[:, :, 4] = False  # one key is seen by nothing

    def total(q, k, v):
        out = attend.attend(q, k, v, jnp.asarray(mask), 30.0, 50.0)
        return jnp.sum(jnp.sin(out.astype(jnp.float32) + 1.0)), out  # a gradient that is nowhere zero

    (_, out), (dq, dk, dv) = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    for x in (out, dq):
        assert np.isfinite(x).all() and np.any(x[0])
        assert not np.any(x[0, :, :, 2]) and not np.any(x[1])
    for x in (dk, dv):
        assert np.isfinite(x).all() and np.any(x[0])
        assert not np.any(x[0, :, 4]) and not np.any(x[1])


# ---------------------------------------------------------------------------------- the whole model


@pytest.fixture(scope="module")
def model():
    return tiny.new_model()


def test_packed_documents_give_the_logits_of_each_document_alone(model):
    tokens = np.random.default_rng(0).integers(0, tiny.MODEL.vocab, (2, 16))
    lengths = [7, 9]
    positions = jnp.asarray([[*range(7), *range(9)]] * 2, jnp.int32)
    segments = jnp.asarray([[1] * 7 + [2] * 9] * 2, jnp.int32)
    packed = np.asarray(logits(model, tokens, positions, segments))
    for length, ours in zip(lengths, np.split(packed, [7], axis=1), strict=True):
        document = tokens[:, :7] if length == 7 else tokens[:, 7:]
        np.testing.assert_allclose(ours, logits(model, document), atol=2e-5)


def test_padding_changes_nothing(model):
    tokens = np.random.default_rng(1).integers(0, tiny.MODEL.vocab, (2, 16))
    positions = jnp.asarray([[*range(16)]] * 2, jnp.int32)
    segments = jnp.asarray([[1] * 9 + [0] * 7] * 2, jnp.int32)
    padded = np.asarray(logits(model, tokens, positions, segments))
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[:, :9], logits(model, tokens[:, :9]), atol=2e-5)
    tokens[:, 9:] = 3
    np.testing.assert_array_equal(padded[:, :9], np.asarray(logits(model, tokens, positions, segments))[:, :9])
