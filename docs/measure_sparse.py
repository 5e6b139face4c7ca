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
from mintrain.layers.cache import Latents
from mintrain.layers.indexer import indexer_kl, indexer_scores, top_keys
from mintrain.layers.sparse import Queries, sparse_attention

HEADS, NOPE, ROPE, V, KV_LORA, INDEX_HEADS, INDEX_DIM, TOPK = 8, 16, 8, 16, 64, 4, 16, 128
GATHERED = sparse.gathered
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)


def inputs(seq: int) -> tuple[Queries, Latents, jax.Array]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    place, one = jnp.arange(seq, dtype=jnp.int32)[None], jnp.ones((1, seq), jnp.int32)
    queries = Queries(
        draw(1, seq, HEADS, NOPE + ROPE), draw(1, seq, INDEX_HEADS, INDEX_DIM), draw(1, seq, INDEX_HEADS), place, one
    )
    return (
        queries,
        Latents(draw(1, seq, KV_LORA + ROPE), draw(1, seq, INDEX_DIM), place, one),
        draw(KV_LORA, HEADS, NOPE + V),
    )


def indexer_alone(queries, compressed, up, scores, chosen, nope, scale):
    """`sparse.gathered` without the attention: what the scores, the choice and the KL cost."""
    index, real = chosen
    even = jnp.where(real, 1 / TOPK, 0.0)
    return queries.q[..., :V], indexer_kl(jnp.take_along_axis(scores, index, axis=-1), even, real)


def no_scores(logits, weights):
    """Zeros: with `any_keys`, the attention without the scores and the choice."""
    return jnp.zeros_like(logits[:, 0])


def any_keys(scores, visible, topk):
    """Keys from all over the sequence, a fixed pattern."""
    shape = (*scores.shape[:2], topk)
    at = jnp.arange(shape[1] * topk, dtype=jnp.int32).reshape(1, shape[1], topk) * 7919 % scores.shape[2]
    index = jnp.broadcast_to(at, shape)
    return index, jnp.take_along_axis(visible, index, axis=-1)


def compiled(form: str, seq: int) -> tuple[Callable, tuple]:
    """The output's square and the KL with their gradients by all inputs, and the inputs."""
    sparse.GATHER_FROM = 1 << 30 if form == "masked" else 0
    sparse.gathered = indexer_alone if form == "indexer alone" else GATHERED
    given = form == "choice given"
    sparse.indexer_scores, sparse.top_keys = (no_scores, any_keys) if given else (indexer_scores, top_keys)
    mesh = sharding.make_mesh(Mesh())
    everywhere = jax.sharding.PartitionSpec()

    def loss(arrays):
        vary = lambda tree: jax.tree.map(lambda x: jax.lax.pcast(x, "tensor", to="varying"), tree)
        queries, keys, up = arrays
        out, kl = sparse_attention(vary(queries), vary(keys), vary(up), NOPE, (NOPE + ROPE) ** -0.5, TOPK)
        return jax.lax.psum(jnp.sum(out * out) + jnp.sum(kl), "tensor")

    mapped = jax.shard_map(loss, mesh=mesh, in_specs=everywhere, out_specs=everywhere)
    arrays = jax.device_put(inputs(seq), jax.NamedSharding(mesh, everywhere))
    program = jax.jit(jax.value_and_grad(mapped, allow_int=True)).lower(arrays).compile()
    return program, arrays


def measure(form: str, seq: int) -> tuple[float, float]:
    """Seconds (the best of up to three, as long as they take less than ten together) and MiB of temporary memory."""
    program, arrays = compiled(form, seq)
    seconds = []
    while len(seconds) < 3 and sum(seconds) < 10:
        start = time.perf_counter()
        jax.block_until_ready(program(arrays))
        seconds.append(time.perf_counter() - start)
    return min(seconds), program.memory_analysis().temp_size_in_bytes / 2**20


def exponent(values: list[float], lengths: tuple[int, ...]) -> float:
    """The slope between the last two lengths, on a logarithmic scale."""
    return math.log(values[-1] / values[-2]) / math.log(lengths[-1] / lengths[-2])


if __name__ == "__main__":
    forms, found = ("masked", "gathered", "indexer alone", "choice given"), {}
    for seq in LENGTHS:
        for form in forms:
            found[form, seq] = measure(form, seq)
            print(form, seq, *(f"{x:.4g}" for x in found[form, seq]), flush=True)
    heads = ("sequence", "masked s", "gathered s", "ratio", "indexer alone s", "gathered, choice given s", "masked MiB")
    print("\n| " + " | ".join((*heads, "gathered MiB")) + " |\n" + "|---" * 8 + "|")
    for seq in LENGTHS:
        (s, m), (gs, gm), (indexer, _), (given, _) = (found[form, seq] for form in forms)
        print(f"| {seq} | {s:.3f} | {gs:.3f} | {s / gs:.2f} | {indexer:.3f} | {given:.3f} | {m:.0f} | {gm:.0f} |")
    for form in forms:
        time_, memory = zip(*(found[form, seq] for seq in LENGTHS), strict=True)
        print(
            f"{form}: growth exponents of time {exponent(time_, LENGTHS):.2f}, memory {exponent(memory, LENGTHS):.2f}"
        )
