"""Models of each family that train in milliseconds. All their dims differ, so that a swapped axis is an error."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mintrain import sharding, step
from mintrain.config import (
    MLA,
    MLP,
    Attention,
    Config,
    Data,
    Indexer,
    Layer,
    Model,
    MoE,
    Optim,
    Rope,
    Yarn,
    stages,
)
from mintrain.loss import Batch
from mintrain.model import LM

LOCAL = Attention(heads=12, kv_heads=4, head_dim=10, scale=10**-0.5, qk_norm=True, window=5)
GLOBAL = dataclasses.replace(LOCAL, kv_heads=2, head_dim=14, window=None, softcap=20.0, k_is_v=True, v_norm=True)
PATTERN = (Layer(LOCAL, MLP(28)), Layer(GLOBAL, MLP(28), scalar=True))
MODEL = Model(vocab=74, embed=40, stages=stages(PATTERN * 2), norm_offset=1.0, final_softcap=30.0)

# Later layers share keys and values, have wider MLPs and experts beside them; every layer has an input of its own.
MOE = MoE(experts=8, topk=2, width=12, activation="gelu", normalise=True, learned_scales=True, balance=0.1)
LATER = tuple(
    dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, shares_kv=True), mlp=MLP(36), moe=MOE)
    for layer in PATTERN
)
GEMMA4 = Model(vocab=74, embed=40, stages=stages(PATTERN + LATER), per_layer_input=22)


def latent(topk: int) -> MLA:
    rope, indexer = Rope(yarn=Yarn(factor=4.0, original=8)), Indexer(heads=3, head_dim=12, topk=topk)
    return MLA(heads=4, q_lora=24, kv_lora=16, nope=6, rope_dim=8, v=10, rope=rope, indexer=indexer)


ROUTED = MoE(
    **dict(experts=8, topk=3, width=20, score="sigmoid", groups=4, kept_groups=2, normalise=True, scaling=2.5),
    **dict(bias_rate=0.01, balance=0.1),
)
# 16 keys of which 3 are chosen are gathered, and of which 5 are chosen masked: sparse.GATHER_FROM.
DENSE = Layer(latent(3), MLP(28, "silu"), post_norms=False)
SPARSE = Layer(latent(5), MLP(20, "silu"), ROUTED, post_norms=False)
DEEPSEEK = Model(
    vocab=74, embed=40, stages=stages((DENSE, SPARSE, SPARSE)), embed_scale=False, tied=False, mtp=(SPARSE,)
)

CONFIG = Config(
    model=MODEL,
    data=Data(seq_len=16),
    # A different learning rate in each of the first steps; an update that does not blow up rounding errors.
    optim=Optim(lr=1e-2, warmup=3, eps=1e-3),
    steps=5,
    per_device_batch_size=8,
    compute_dtype="float32",
)


def new_model() -> LM:
    """Arbitrary parameters on a mesh of one device, made without compiling anything."""
    state = step.abstract_state(CONFIG, sharding.make_mesh(CONFIG.mesh))
    rng = np.random.default_rng(0)
    draw = lambda x: jax.device_put(rng.normal(scale=0.3, size=x.shape).astype(np.float32), x.sharding)
    return jax.tree.map(draw, state.model)


def batch(seed: int, rows: int = 8, seq: int = 16) -> Batch:
    """Two documents in each row, of which the second starts at token 7; a fifth of the targets does not count."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MODEL.vocab, (rows, seq + 1)).astype(np.int32)
    weights = (rng.random((rows, seq)) < 0.8).astype(np.float32)
    place = np.broadcast_to(np.arange(seq, dtype=np.int32), (rows, seq))
    positions, segments = np.where(place < 7, place, place - 7), 1 + (place >= 7)
    arrays = tokens[:, :-1], tokens[:, 1:], positions.astype(np.int32), segments.astype(np.int32), weights
    return Batch(*(jax.numpy.asarray(a) for a in arrays))


def on_mesh(cfg: Config, mesh: jax.sharding.Mesh, rows: Batch) -> Batch:
    """The microbatches of `cfg` on their devices."""
    abstract = step.abstract_batch(cfg, mesh)
    return jax.tree.map(lambda x, s: jax.device_put(np.asarray(x).reshape(s.shape), s.sharding), rows, abstract)


def dealt(length: int, devices: int) -> np.ndarray:
    """Where the tokens come from that lie one after the other on the devices of `context`."""
    parts = np.arange(length).reshape(2 * devices, -1)
    return parts[[i for device in range(devices) for i in (device, 2 * devices - 1 - device)]].reshape(-1)


def sharded(function: Callable, model: LM, *out_specs: P) -> Callable:
    """`function(model, tokens, positions, segments)` inside `shard_map`, on the mesh that `model` lies on."""
    layout = NamedSharding(model.norm.scale.sharding.mesh, P(*sharding.BATCH[1:]))
    in_specs = (sharding.specs(model), *[layout.spec] * 3)
    mapped = jax.jit(jax.shard_map(function, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs))
    return lambda *inputs: mapped(model, *jax.device_put(inputs, layout))
