"""What a decoded token costs, in bytes kept and in time: `python docs/measure_decode.py`.

The times are of models with four layers of one kind, on this machine's CPU, at the end of contexts of growing length.
Every round decodes a token with each model in turn; the table has the medians, relative to the first row of the column.
"""

import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mintrain import generate, options, sharding, step
from mintrain.config import MLA, MLP, Attention, Config, Indexer, Layer, Mesh, Model, Stage
from mintrain.layers.cache import empty

CONFIGS = Path(__file__).parents[1] / "configs"
RELEASED = (
    "gemma2_27b",
    "gemma3_27b",
    "gemma4_31b",
    "gemma4_e4b",
    "deepseek2_236b",
    "deepseek3_671b",
    "deepseek32_671b",
)
LENGTHS = (1024, 4096, 16_384, 65_536)
ROUNDS = 9
HEADS = dict(heads=8, kv_heads=4, head_dim=128, scale=128**-0.5)
LATENT = dict(heads=16, q_lora=384, kv_lora=512, nope=128, rope_dim=64, v=128)
KINDS = {
    "local, window 512": Attention(**HEADS, window=512),
    "global": Attention(**HEADS),
    "latent": MLA(**LATENT),
    "latent, 256 keys chosen": MLA(**LATENT, indexer=Indexer(heads=4, head_dim=64, topk=256)),
}


def cache_bytes(model: Model, length: int) -> int:
    total = 0
    for stage in model.stages:
        for layer in stage.pattern:
            kept = jax.eval_shape(lambda c=layer.attention: empty(c, 1, length, generate.CHUNK, jnp.dtype("bfloat16")))
            total += stage.repeats * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
    return total


def sizes() -> None:
    print(
        f"| KiB kept per token | {' | '.join(f'{length // 1024}k' for length in (4096, 32_768, 131_072))} | all heads |"
    )
    print("|---|---|---|---|---|")
    for name in RELEASED:
        model = options.read(CONFIGS / f"{name}.py").model
        row = [f"{cache_bytes(model, length) / length / 1024:.1f}" for length in (4096, 32_768, 131_072)]
        every = 0
        for layer in model.layers:
            a = layer.attention
            every += a.heads * (a.nope + a.rope_dim + a.v) if isinstance(a, MLA) else 2 * a.heads * a.head_dim
        print(f"| {name} | {' | '.join(row)} | {2 * every / 1024:.0f} |")


def decoder(attention: Attention | MLA, length: int):
    """A function that decodes one token behind `length - 1` others."""
    model = Model(512, 1024, (Stage((Layer(attention, MLP(1024)),), 4),))
    cfg = Config(model, compute_dtype="float32")
    mesh = sharding.make_mesh(Mesh())
    lm = step.new_state(cfg, mesh).model
    state = [generate.new_caches(mesh, model, "float32", 1, length, 1)()]
    layouts = sharding.specs(lm), jax.tree.map(lambda x: x.sharding.spec, state[0])
    advance = generate.make_advance(mesh, *layouts, generate.Sampling(temperature=0))
    held = np.arange(length)[-state[0].stages[0][0].positions.shape[-1] :]  # the tokens that are still there
    slots = np.zeros(len(held), np.int32)
    slots[held % len(held)] = held
    places = lambda c: [c.stages[0][0].positions, c.stages[0][0].segments]
    filled = [
        jax.device_put(np.broadcast_to(x, (4, 1, len(held))), places(state[0])[0].sharding)
        for x in (slots, slots * 0 + 1)
    ]
    state[0] = eqx.tree_at(places, state[0], filled)
    inputs = tuple(np.full((1, 1), value, np.int32) for value in (7, length - 1, 1))
    key = jax.random.key(0)

    def decode() -> float:
        start = time.perf_counter()
        token, _, state[0] = advance(lm, state[0], inputs, key)
        jax.block_until_ready(token)
        return time.perf_counter() - start

    decode()
    return decode, sum(x.nbytes for x in jax.tree.leaves(state[0])) / length / 4


def times() -> None:
    print(f"\n| ms a token (bytes kept per token and layer) | {' | '.join(KINDS)} |")
    print("|---" * (len(KINDS) + 1) + "|")
    for length in LENGTHS:
        made = [decoder(attention, length) for attention in KINDS.values()]
        taken = [[decode() for decode, _ in made] for _ in range(ROUNDS)]
        row = [f"{1e3 * ms:.1f} ({size:.0f})" for ms, (_, size) in zip(np.median(taken, axis=0), made, strict=True)]
        print(f"| {length // 1024}k | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    sizes()
    times()
