"""Time and memory of the two forms of sparse attention over the sequence length: the tables in docs/sparse.md.

One layer of V3.2's attention at about a tenth of its widths, forward and backward, float32, batch 1.
`python docs/measure_sparse.py`, some ten minutes on two cores.
"""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mintrain import sharding
from mintrain.config import Mesh
from mintrain.layers import sparse
from mintrain.layers.sparse import Keys, Queries, sparse_attention

HEADS, NOPE, ROPE, V, KV_LORA, INDEX_HEADS, INDEX_DIM, TOPK = 8, 16, 8, 16, 64, 4, 16, 128
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def inputs(seq: int) -> tuple[Queries, Keys, jax.Array]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    place, one = jnp.arange(seq, dtype=jnp.int32)[None], jnp.ones((1, seq), jnp.int32)
    queries = Queries(
        draw(1, seq, HEADS, NOPE + ROPE), draw(1, seq, INDEX_HEADS, INDEX_DIM), draw(1, seq, INDEX_HEADS), place, one
    )
    return (
        queries,
        Keys(draw(1, seq, KV_LORA + ROPE), draw(1, seq, INDEX_DIM), place, one),
        draw(KV_LORA, HEADS, NOPE + V),
    )


def compiled(form: str, seq: int) -> Callable:
    """Attention and both of its losses' gradients, or for "scores" the indexer alone."""
    sparse.GATHER_FROM = 0 if form == "gathered" else 1 << 30
    mesh = sharding.make_mesh(Mesh())
    everywhere = jax.sharding.PartitionSpec()

    def loss(arrays):
        vary = lambda tree: jax.tree.map(lambda x: jax.lax.pcast(x, "tensor", to="varying"), tree)
        queries, keys, up = arrays
        out, kl = sparse_attention(vary(queries), vary(keys), vary(up), NOPE, (NOPE + ROPE) ** -0.5, TOPK)
        return jax.lax.psum(jnp.sum(out * out) + jnp.sum(kl), "tensor")

    mapped = jax.shard_map(loss, mesh=mesh, in_specs=everywhere, out_specs=everywhere)
    arrays = jax.device_put(inputs(seq), jax.NamedSharding(mesh, everywhere))
    program = jax.jit(jax.grad(mapped, allow_int=True)).lower(arrays).compile()
    return program, arrays


def measure(form: str, seq: int) -> tuple[float, float]:
    """Seconds (the best of three) and MiB of temporary memory."""
    program, arrays = compiled(form, seq)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(program(arrays))
        seconds.append(time.perf_counter() - start)
    return min(seconds), program.memory_analysis().temp_size_in_bytes / 2**20


def exponent(values: list[float], lengths: tuple[int, ...]) -> float:
    """The slope between the last two lengths, on a logarithmic scale."""
    return math.log(values[-1] / values[-2]) / math.log(lengths[-1] / lengths[-2])


if __name__ == "__main__":
    found = {}
    for seq in LENGTHS:
        for form in ("masked", "gathered"):
            found[form, seq] = measure(form, seq)
            print(form, seq, *(f"{x:.4g}" for x in found[form, seq]), flush=True)
    print("\n| sequence | masked s | gathered s | ratio | masked MiB | gathered MiB | ratio |\n" + "|---" * 7 + "|")
    for seq in LENGTHS:
        (s, m), (gs, gm) = found["masked", seq], found["gathered", seq]
        print(f"| {seq} | {s:.3f} | {gs:.3f} | {s / gs:.2f} | {m:.0f} | {gm:.0f} | {m / gm:.2f} |")
    for form in ("masked", "gathered"):
        time_, memory = zip(*(found[form, seq] for seq in LENGTHS), strict=True)
        print(f"{form}: time ~ seq^{exponent(time_, LENGTHS):.2f}, memory ~ seq^{exponent(memory, LENGTHS):.2f}")
