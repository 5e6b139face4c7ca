"""Who sees whom, and attention itself. Logits and softmax are float32 by declaration, masks boolean.

batch: sequences.  query, key: positions on either side.  kv_heads, group: the query heads that share a key head.
head: width of a query and key.  value: of a value.  Heads stand before positions, as the matrix products want them.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int32


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
