"""Keys with what belongs to them, of a forward pass or kept from the tokens before; both have one form.

batch: sequences, split over replica x fsdp x expert.  key: positions of a sequence, split over `context`; in a cache,
slots.  kv_heads: split over `tensor`.  head: width of a head.  compressed: kv_lora + rope.  index_dim: of an indexer.
A token at position p is in slot `p % slots`: a cache as long as the text never overwrites, and one for a sliding
window is a ring. What a slot still holds of an older token lies outside the window, so the mask hides it.
"""

import math
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from mintrain import config
from mintrain.collectives import all_gather
from mintrain.context import in_order


class KV(eqx.Module):
    """Of grouped-query attention: rotated keys, and values."""

    k: Float[Array, "batch kv_heads key head"]
    v: Float[Array, "batch kv_heads key head"]
    positions: Int32[Array, "batch key"]
    segments: Int32[Array, "batch key"]  # 0: padding, or an empty slot


class Latents(eqx.Module):
    """Of latent attention: one compressed key and value for all heads, and the indexer's key."""

    compressed: Float[Array, "batch key compressed"]
    index_k: Float[Array, "batch key index_dim"] | None
    positions: Int32[Array, "batch key"]
    segments: Int32[Array, "batch key"]


Kept = TypeVar("Kept", KV, Latents)


def whole(kept: Kept) -> Kept:
    """The same with all positions of each sequence in order, on every device of `context`."""
    specs = {
        2: "batch key/context -> batch key",
        3: "batch key/context width -> batch key width",
        4: "batch kv_heads/tensor key/context head -> batch kv_heads/tensor key head",
    }
    return jax.tree.map(lambda x: in_order(all_gather(specs[x.ndim], x), axis=2 if x.ndim == 4 else 1), kept)


def append(cache: Kept, new: Kept) -> Kept:
    """Write what is `new` to its slots, at most as many tokens of a sequence as there are slots; no padding."""
    slots = cache.positions.shape[1]
    slot = jnp.where(new.segments > 0, new.positions % slots, slots)  # beyond the end: not written

    def put(old: Array, x: Array) -> Array:
        before = (slice(None),) * (old.ndim - 3)  # heads stand before positions
        return jax.vmap(lambda row, y, at: row.at[(*before, at)].set(y, mode="drop"))(old, x, slot)

    return jax.tree.map(put, cache, new)


def empty(
    c: config.Attention | config.MLA, batch: int, length: int, chunk: int, dtype: jnp.dtype
) -> KV | Latents | None:
    """Slots for `length` tokens, or for a window and the rest of a chunk of `chunk` tokens that are written at once.

    None for a layer that uses the keys of an earlier one.
    """
    if isinstance(c, config.Attention) and c.shares_kv:
        return None
    window = math.inf if isinstance(c, config.MLA) or c.window is None else c.window + chunk - 1
    slots = int(min(length, window))
    positions = jnp.zeros((batch, slots), jnp.int32)
    if isinstance(c, config.MLA):
        index_k = jnp.zeros((batch, slots, c.indexer.head_dim), dtype) if c.indexer else None
        return Latents(jnp.zeros((batch, slots, c.kv_lora + c.rope_dim), dtype), index_k, positions, positions)
    kv = jnp.zeros((batch, c.kv_heads, slots, c.head_dim), dtype)
    return KV(kv, kv, positions, positions)
