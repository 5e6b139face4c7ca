"""Attention over the keys that an indexer chooses, and the indexer's loss, a block of queries at a time.

batch: sequences.  seq, query, key: positions.  heads: of the attention.  head: nope + rope, what q·k sums over.
compressed: kv_lora + rope, what is kept of a key.  index_heads, index_dim: the indexer's.  chosen: at most topk keys.
No array has queries, keys *and* heads of the whole sequence: a block's are made, used, and made again in the
backward pass. The two forms give the same numbers. `masked` expands every key and masks those not chosen: its cost
grows with seq x seq. `gathered` fetches the chosen keys as they are compressed and absorbs the expansion into the
queries (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): seq x topk. The scores of the indexer need seq x seq in both.
"""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int32

from mintrain import watch
from mintrain.collectives import psum
from mintrain.layers.attend import (
    BLOCK,
    attention_logits,
    masked_softmax,
    over_blocks,
    query_statistics,
    record_attention,
    visible,
)
from mintrain.layers.cache import Latents
from mintrain.layers.indexer import indexer_kl, indexer_logits, indexer_scores, top_keys, top_mask

GATHER_FROM = 4  # keys for each chosen one from which the gathered form is used; docs/sparse.md has the measurement


class Queries(eqx.Module):
    q: Float[Array, "batch seq heads head"]
    index_q: Float[Array, "batch seq index_heads index_dim"]
    index_weights: Float32[Array, "batch seq index_heads"]
    positions: Int32[Array, "batch seq"]
    segments: Int32[Array, "batch seq"]


class Attended(eqx.Module):
    """What a block of queries makes."""

    out: Float[Array, "batch query heads v"]
    kl: Float32[Array, "batch query"]
    seen: Float32[Array, "batch query kv_heads group 2"] | None  # of the attention logits, if they are watched
    index_logit: Float32[Array, "batch query"] | None = None  # the largest of the indexer, if it is watched


def expand(
    compressed: Float[Array, "batch key compressed"], up: Float[Array, "kv_lora heads nope_v"], nope: int
) -> tuple[Float[Array, "batch heads key head"], Float[Array, "batch heads key v"]]:
    """Every head's keys, the shared rotary part at their end, and values."""
    rank = up.shape[0]
    both = jnp.einsum("bkc,cnh->bnkh", compressed[..., :rank], up)
    shape = (*both.shape[:-1], compressed.shape[-1] - rank)
    rotary = jnp.broadcast_to(compressed[:, None, :, rank:], shape)
    return jnp.concatenate([both[..., :nope], rotary], axis=-1), both[..., nope:]


def absorb(
    q: Float[Array, "batch query heads head"], up: Float[Array, "kv_lora heads nope_v"], nope: int
) -> Float[Array, "batch query heads compressed"]:
    """Queries for compressed keys: `q · (up c) = (q up) · c` (DeepSeek-V2, section 2.1.2)."""
    absorbed = jnp.einsum("bqnh,cnh->bqnc", q[..., :nope], up[..., :nope])
    return jnp.concatenate([absorbed, q[..., nope:]], axis=-1)


def gathered_logits(
    q: Float[Array, "batch query heads compressed"], k: Float[Array, "batch query chosen compressed"], scale: float
) -> Float32[Array, "batch 1 heads query chosen"]:
    """`scale * q·k` of each query with its own keys, which all heads share."""
    return scale * jnp.einsum("bqnc,bqkc->bnqk", q, k, preferred_element_type=jnp.float32)[:, None]


def target(weights: Float32[Array, "batch kv_heads group query key"]) -> Float32[Array, "batch query key"]:
    """What the indexer learns: the attention of all heads, of all devices, summed and normalised."""
    total = psum(jnp.sum(jax.lax.stop_gradient(weights), axis=(1, 2)), "tensor")
    mass = jnp.sum(total, axis=-1, keepdims=True)
    return total / jnp.where(mass > 0, mass, 1.0)


def masked(
    queries: Queries,
    expanded: tuple[Float[Array, "batch heads key head"], Float[Array, "batch heads key v"]],
    scores: Float32[Array, "batch query key"],
    mask: Bool[Array, "batch query key"],
    scale: float,
) -> Attended:
    """Attention over all keys, and the KL, both within `mask`."""
    k, v = expanded
    q = rearrange(queries.q, "b q n h -> b n 1 q h")
    logits = attention_logits(q, k, scale, None)
    weights = masked_softmax(logits, mask)
    out = jnp.einsum("bngqk,bnkv->bqnv", weights.astype(v.dtype), v)
    return Attended(out, indexer_kl(scores, target(weights), mask), _watched(logits, mask))


def gathered(
    queries: Queries,
    compressed: Float[Array, "batch key compressed"],
    up: Float[Array, "kv_lora heads nope_v"],
    scores: Float32[Array, "batch query key"],
    chosen: tuple[Int32[Array, "batch query chosen"], Bool[Array, "batch query chosen"]],
    nope: int,
    scale: float,
) -> Attended:
    """Attention over the chosen keys alone, and the KL. In training the keys are float32: their gradients sum in it."""
    index, real = chosen
    rank, dtype = up.shape[0], queries.q.dtype
    k = jax.vmap(lambda rows, at: rows[at])(compressed, index).astype(dtype)
    logits = gathered_logits(absorb(queries.q, up, nope), k, scale)
    weights = masked_softmax(logits, real)
    mixed = jnp.einsum("bgnqk,bqkc->bqnc", weights.astype(dtype), k[..., :rank])
    out = jnp.einsum("bqnc,cnv->bqnv", mixed, up[..., nope:])
    kl = indexer_kl(jnp.take_along_axis(scores, index, axis=-1), target(weights), real)
    return Attended(out, kl, _watched(logits, real))


def _watched(
    logits: Float32[Array, "batch kv_heads group query key"], mask: Bool[Array, "batch query key"]
) -> Float32[Array, "batch query kv_heads group 2"] | None:
    if not watch.on():
        return None
    return rearrange(query_statistics(jax.lax.stop_gradient(logits), mask, None), "b n g q s -> b q n g s")


def sparse_attention(
    queries: Queries,
    keys: Latents,
    up: Float[Array, "kv_lora heads nope_v"],
    nope: int,
    scale: float,
    topk: int | None,
    absorbed: bool = False,
) -> tuple[Float[Array, "batch seq heads v"], Float32[Array, "batch seq"]]:
    """The attention of each query over its `topk` keys, and KL(attention || indexer) over the same keys.

    topk: None attends to every visible key: the dense warm-up of the indexer.
    absorbed: for decoding, take the gathered form however few keys there are. It has no gradients to sum.
    """
    dtype, length = queries.q.dtype, keys.positions.shape[1]
    topk = length if topk is None and absorbed else topk
    gathers = absorbed or (topk is not None and length >= GATHER_FROM * topk)
    # Gradients of what all blocks use are sums over blocks: in float32, also where the values are bfloat16.
    wide = partial(jax.tree.map, lambda x: x if absorbed else x.astype(jnp.float32))
    narrow = partial(jax.tree.map, lambda x: x.astype(dtype))
    shared = wide(keys.compressed if gathers else expand(keys.compressed, up, nope))
    index_k, up = wide(keys.index_k), wide(up)

    def block(part: Queries) -> Attended:
        mask = visible(part.positions, keys.positions, part.segments, keys.segments, None)
        logits = indexer_logits(part.index_q, narrow(index_k))
        scores = indexer_scores(logits, part.index_weights)
        if gathers:
            done = gathered(part, shared, narrow(up), scores, top_keys(scores, mask, topk), nope, scale)
        else:
            done = masked(part, narrow(shared), scores, mask if topk is None else top_mask(scores, mask, topk), scale)
        if not watch.on():
            return done
        largest = jnp.max(jnp.where(mask[:, None], jax.lax.stop_gradient(logits), 0.0), axis=(1, 3))
        return replace(done, index_logit=largest)

    batch, _, heads, _ = queries.q.shape
    width = length * queries.index_q.shape[2] + heads * (length if not gathers or topk is None else topk)
    done = over_blocks(block, queries, max(BLOCK // (batch * width), 1))
    if done.seen is not None:
        record_attention(done.seen, queries.segments)
        watch.record("indexer_logit", lambda: jnp.max(done.index_logit))
    return done.out, done.kl
