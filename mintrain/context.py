"""How a sequence lies over `context`: of 2n equal parts, device i of n has part i and part 2n - 1 - i.

A token sees the keys before it, so late parts have more to do than early ones; dealt like this, all devices have as
much. Batches come in order and are dealt once, before the model; layers get the parts of their device one after the
other, and gather keys in order. Everything here runs inside `shard_map`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from mintrain.collectives import all_gather


def starts(seq: int) -> tuple[Int32[Array, ""] | int, ...]:
    """Where the parts of this device, `seq` tokens together, begin in the whole sequence."""
    devices = jax.lax.axis_size("context")
    if devices == 1:
        return (0,)
    me = jax.lax.axis_index("context")
    return me * (seq // 2), (2 * devices - 1 - me) * (seq // 2)


def in_order(x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """The whole sequence in order, from the dealt parts of all devices one after the other."""
    devices = jax.lax.axis_size("context")
    if devices == 1:
        return x
    parts = jnp.split(x, 2 * devices, axis)
    return jnp.concatenate([*parts[::2], *parts[1::2][::-1]], axis)


def deal(x: Shaped[Array, "batch seq"]) -> Shaped[Array, "batch seq"]:
    """The parts of this device, from a sequence that lies in order over `context`."""
    if jax.lax.axis_size("context") == 1:
        return x
    whole, seq = all_gather("batch seq/context -> batch seq", x), x.shape[1]
    parts = [jax.lax.dynamic_slice_in_dim(whole, start, seq // 2, axis=1) for start in starts(seq)]
    return jnp.concatenate(parts, axis=1)


def collect(x: Shaped[Array, "batch seq embed"]) -> Shaped[Array, "batch seq embed"]:
    """The inverse of `deal`, for what comes out of the model: every device gets its stretch of the sequence."""
    if jax.lax.axis_size("context") == 1:
        return x
    whole = in_order(all_gather("batch seq/context embed -> batch seq embed", x), axis=1)
    return jax.lax.dynamic_slice_in_dim(whole, x.shape[1] * jax.lax.axis_index("context"), x.shape[1], axis=1)
