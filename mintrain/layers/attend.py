"""Who sees whom, and attention itself. Logits and softmax are float32 by declaration, masks boolean.

batch: sequences.  query, key: positions on either side.  kv_heads, group: the query heads that share a key head.
head: width of a query and key.  value: of a value.  Heads stand before positions, as the matrix products want them.
The logits of all queries never exist: a block's are made, used, and made again in the backward pass; on a TPU inside a
kernel (splash.py), which is held to the plain form here.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int32, PyTree

from mintrain import watch
from mintrain.layers.splash import fits, splash_attention

BLOCK = 1 << 24  # float32 logits of one block of queries on one device: 64 MiB


def visible(
    query_positions: Int32[Array, "batch query"],
    key_positions: Int32[Array, "batch key"],
    query_segments: Int32[Array, "batch query"],
    key_segments: Int32[Array, "batch key"],
    window: int | None,
) -> Bool[Array, "batch query key"]:
    """True where a query sees a key: in its own document, not after it, and fewer than `window` tokens back.

    Segment 0 is padding: it sees nothing and nothing sees it. Positions count within a document.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    same = (query_segments[:, :, None] == key_segments[:, None, :]) & (query_segments > 0)[:, :, None]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return same & near


def attention_logits(
    q: Float[Array, "batch kv_heads group query head"],
    k: Float[Array, "batch kv_heads key head"],
    scale: float,
    softcap: float | None,
) -> Float32[Array, "batch kv_heads group query key"]:
    """`scale * q·k`, soft-capped. Products of bfloat16 are exact in float32, so the inputs are not cast.

    Heads of a group are rows of one product: for a single query, XLA's CPU backend takes a fifth of the time.
    """
    rows = rearrange(q, "b n g q h -> b n (g q) h")
    logits = scale * jnp.einsum("bnrh,bnkh->bnrk", rows, k, preferred_element_type=jnp.float32)
    logits = rearrange(logits, "b n (g q) k -> b n g q k", q=q.shape[3])
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def masked_softmax(
    logits: Float32[Array, "batch kv_heads group query key"], mask: Bool[Array, "batch query key"]
) -> Float32[Array, "batch kv_heads group query key"]:
    """Softmax over the visible keys. A query that sees no key gets exactly 0 everywhere, and zero gradients."""
    logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(largest), largest, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def attend(
    q: Float[Array, "batch kv_heads group query head"],
    k: Float[Array, "batch kv_heads key head"],
    v: Float[Array, "batch kv_heads key value"],
    mask: Bool[Array, "batch query key"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "batch kv_heads group query value"]:
    weights = masked_softmax(attention_logits(q, k, scale, softcap), mask)
    return jnp.einsum("bngqk,bnkv->bngqv", weights.astype(v.dtype), v)


def query_statistics(
    logits: Float32[Array, "batch kv_heads group query key"],
    mask: Bool[Array, "batch query key"],
    softcap: float | None,
) -> Float32[Array, "batch kv_heads group query 2"]:
    """Of each query the largest magnitude of its logits before the cap, and the entropy of its attention in nats."""
    capped = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    weights = masked_softmax(capped, mask)
    largest = jnp.max(jnp.where(mask[:, None, None], jnp.abs(logits), 0.0), axis=-1)
    entropy = -jnp.sum(weights * jnp.log(jnp.where(weights > 0, weights, 1.0)), axis=-1)
    return jnp.stack([largest, entropy], axis=-1)


def record_attention(
    statistics: Float32[Array, "batch query kv_heads group 2"], segments: Int32[Array, "batch query"]
) -> None:
    queries = jnp.sum(segments > 0, dtype=jnp.float32)  # those of padding see nothing, and have an entropy of 0
    watch.record("attention_logit", lambda: jnp.max(statistics[..., 0]))
    of_query = lambda: jnp.sum(jnp.mean(statistics[..., 1], axis=(2, 3)))
    watch.record("attention_entropy", lambda: of_query() / jnp.maximum(queries, 1.0))


def over_blocks(function: Callable, queries: PyTree[Array], rows: int) -> PyTree[Array]:
    """`function` of `rows` queries at a time: arrays go in and come out as "batch seq ...".

    The backward pass makes a block's logits again. Padding at the end has segment 0: it sees nothing.
    """
    seq = jax.tree.leaves(queries)[0].shape[1]
    blocks = -(-seq // rows)
    if blocks == 1:
        return function(queries)
    size = -(-seq // blocks)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, blocks * size - seq)) + ((0, 0),) * (x.ndim - 2))
    split = lambda x: rearrange(pad(x), "b (n s) ... -> n b s ...", n=blocks)
    join = lambda x: rearrange(x, "n b s ... -> b (n s) ...")[:, :seq]
    return jax.tree.map(join, jax.lax.map(jax.checkpoint(function), jax.tree.map(split, queries)))


class Places(eqx.Module):
    """Where tokens stand in their documents, and in which."""

    positions: Int32[Array, "batch place"]
    segments: Int32[Array, "batch place"]


def attend_places(
    q: Float[Array, "batch query kv_heads group head"],
    k: Float[Array, "batch kv_heads key head"],
    v: Float[Array, "batch kv_heads key value"],
    queries: Places,
    keys: Places,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    starts: tuple[Int32[Array, ""] | int, ...] | None = None,
) -> Float[Array, "batch query kv_heads group value"]:
    """Attention of each query over the keys that it sees.

    starts: keys stand in their order, and the queries are as many equal runs of them, from these places. On a TPU they
    then go through one kernel, elsewhere a window's queries take only the keys in their reach. None in a cache.
    """
    runs = (None,) if starts is None else starts
    size, outs, seen = q.shape[1] // len(runs), [], []
    for i, start in enumerate(runs):
        run, at = jax.tree.map(lambda x, i=i: x[:, i * size : (i + 1) * size], (q, queries))
        if start is not None and fits(size):
            rows = rearrange(run, "b q n g h -> b n g q h")
            out = splash_attention(rows, k, v, at.segments, keys.segments, start, scale, softcap, window)
            outs.append(rearrange(out, "b n g q v -> b q n g v"))
        else:
            outs.append(_in_blocks(run, k, v, at, keys, scale, softcap, window, start, attend))
        if watch.on():  # beside the attention, as a kernel does not show its logits
            look = lambda q, k, v, mask, scale, cap: query_statistics(attention_logits(q, k, scale, None), mask, cap)
            arrays = jax.lax.stop_gradient((run, k, v))
            seen.append(_in_blocks(*arrays, at, keys, scale, softcap, window, start, look))
    if seen:
        record_attention(jnp.concatenate(seen, axis=1), queries.segments)
    return jnp.concatenate(outs, axis=1)


def _in_blocks(
    q: Float[Array, "batch query kv_heads group head"],
    k: Float[Array, "batch kv_heads key head"],
    v: Float[Array, "batch kv_heads key value"],
    queries: Places,
    keys: Places,
    scale: float,
    softcap: float | None,
    window: int | None,
    start: Int32[Array, ""] | int | None,
    one: Callable[..., Array],
) -> Float[Array, "batch query kv_heads group out"]:
    """`one` of blocks of queries."""
    batch, seq, n, g, _ = q.shape
    length = k.shape[2]
    before = length if window is None or start is None else window - 1  # keys that a query sees before its own
    rows = max(BLOCK // (batch * n * g * min(length, 2 * before + 2)), 1)
    rows = 1 << (rows.bit_length() - 1)
    near = rows + before < length and rows < seq
    # Gradients of keys and values are sums over blocks: in float32.
    dtype, k, v = q.dtype, *((x.astype(jnp.float32) for x in (k, v)) if rows < seq else (k, v))

    def block(part: tuple[Array, Places, Array]) -> Float[Array, "batch row kv_heads group out"]:
        q, queries, place = part
        reached = (k, v, keys.positions, keys.segments)
        if near:
            span = q.shape[1] + before
            first = jnp.clip(place[0, 0] - before, 0, length - span)
            cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, first, span, axis)
            reached = (cut(k, 2), cut(v, 2), cut(keys.positions, 1), cut(keys.segments, 1))
        nearby_k, nearby_v, positions, segments = reached
        mask = visible(queries.positions, positions, queries.segments, segments, window)
        q = rearrange(q, "b q n g h -> b n g q h")
        out = one(q, nearby_k.astype(dtype), nearby_v.astype(dtype), mask, scale, softcap)
        return rearrange(out, "b n g q v -> b q n g v")

    place = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32), (batch, seq)) + (0 if start is None else start)
    return over_blocks(block, (q, queries, place), rows)
