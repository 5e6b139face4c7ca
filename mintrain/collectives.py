"""Collectives inside `shard_map`, with the layout before and after written where they happen.

A spec names every dim and, after slashes, the mesh axes that split it: "embed/fsdp ff/tensor" is a matrix
with its rows over `fsdp` and its columns over `tensor`. The idea is seqax's (MatX); the check here is
stronger: the operand must really vary over the axes that the spec claims, as JAX tracks it in
`jax.typeof(x).manual_axis_type`. `jax.lax.psum` of a value that does *not* vary multiplies it silently.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32, PyTree, Shaped

TILE = 128  # lanes of a TPU's register


def _parse(side: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, tuple(axes)) for name, *axes in (dim.split("/") for dim in side.split())]


def _require_varying(spec: str, x: Array, axes: set[str]) -> None:
    if missing := axes - jax.typeof(x).manual_axis_type.varying:
        raise TypeError(f"{spec!r}: the operand does not vary over {sorted(missing)}")


def _layouts(spec: str, x: Array) -> tuple[list[tuple[str, tuple[str, ...]]], list[tuple[str, tuple[str, ...]]]]:
    """Both sides of `spec`, after holding `x` against the left one."""
    before, after = (_parse(side) for side in spec.split("->"))
    if len(before) != x.ndim or [name for name, _ in before] != [name for name, _ in after]:
        raise TypeError(f"{spec!r} does not fit an operand of shape {x.shape}")
    _require_varying(spec, x, {axis for _, axes in before for axis in axes})
    return before, after


def all_gather(spec: str, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Gather the axes that stand on the left of the arrow and not on the right.

    `all_gather("embed/fsdp ff/tensor -> embed ff/tensor", w)` undoes the sharding over `fsdp`. Its gradient
    is a reduce-scatter. Raises TypeError if `x` is not laid out as the left side says.
    """
    before, after = _layouts(spec, x)
    for i, ((name, old), (_, new)) in enumerate(zip(before, after, strict=True)):
        if old[: len(new)] != new:
            raise TypeError(f"{spec!r}: {name} cannot go from {old} to {new} by gathering")
        if old != new:
            # As a matrix: XLA's TPU compiler turns the reduce-scatter of more dims into an all-reduce.
            over, columns = old[len(new) :], i > 0 and math.prod(x.shape[i + 1 :]) == 1
            if columns:
                whole = _gather_matrix(x.reshape(-1, x.shape[i]), over, 1)
                x = whole.reshape(*x.shape[:i], -1, *x.shape[i + 1 :])
            else:
                front = jnp.moveaxis(x, i, 0)
                whole = _gather_matrix(front.reshape(x.shape[i], -1), over, 0)
                x = jnp.moveaxis(whole.reshape(-1, *front.shape[1:]), 0, i)
    return x


def _gather_matrix(x: Shaped[Array, "row column"], over: tuple[str, ...], axis: int) -> Shaped[Array, "rows columns"]:
    """The other dim goes in whole tiles: on many chips XLA's TPU compiler aborts with 4.5 or 16.5 of them."""
    kept = x.shape[1 - axis]
    if extra := -kept % TILE if kept > TILE and jax.lax.axis_size(over) > 1 else 0:
        x = jnp.pad(x, ((0, extra), (0, 0)) if axis else ((0, 0), (0, extra)))
    whole = jax.lax.all_gather(x, over, axis=axis, tiled=True)
    return jax.lax.slice_in_dim(whole, 0, kept, axis=1 - axis) if extra else whole


def all_to_all(spec: str, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Move one axis from one dim to another: "token embed/fsdp -> token/fsdp embed". Raises TypeError as above."""
    before, after = _layouts(spec, x)
    changed = [(i, old[1], new[1]) for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    lost = [(i, old[-1]) for i, old, new in changed if old[:-1] == new]
    gained = [(i, new[-1]) for i, old, new in changed if old == new[:-1]]
    if len(changed) != 2 or len(lost) != 1 or len(gained) != 1 or lost[0][1] != gained[0][1]:
        raise TypeError(f"{spec!r} does not move one axis from the end of one dim to the end of another")
    return jax.lax.all_to_all(x, lost[0][1], gained[0][0], lost[0][0], tiled=True)


def vary_like(w: Shaped[Array, "..."], x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """`w`, the same on all devices, as a value of each device that `x` differs on.

    Its gradient is then summed over the device's tokens first and over devices after. Where JAX inserts this by
    itself, after a broadcast, the gradients of all tokens are sent.
    """
    missing = jax.typeof(x).manual_axis_type.varying - jax.typeof(w).manual_axis_type.varying
    return jax.lax.pcast(w, tuple(sorted(missing)), to="varying") if missing else w


def psum(x: Shaped[Array, "..."], *axes: str) -> Shaped[Array, "..."]:
    """Sum over mesh axes. Raises TypeError if `x` is the same on all devices of an axis: it would be multiplied."""
    _require_varying(f"psum over {' '.join(axes)}", x, set(axes))
    return jax.lax.psum(x, axes)


def ragged_all_to_all(
    rows: Float[Array, "row width"], sizes: Int32[Array, "source target"], capacity: int, axis: str
) -> Float[Array, "capacity width"]:
    """Send `sizes[me, target]` rows to each target, in their order. Returns what arrives, by source, then zeros.

    sizes: the same on every device of `axis`.  capacity: rows of the result, at least what can arrive.
    """
    _require_varying(f"ragged_all_to_all over {axis}", rows, {axis})
    me = jax.lax.axis_index(axis)
    taken, placed = jnp.cumsum(sizes, axis=1) - sizes, jnp.cumsum(sizes, axis=0) - sizes

    def native(rows: Array) -> Array:
        empty = jnp.zeros_like(rows, shape=(capacity, rows.shape[1]))
        return jax.lax.ragged_all_to_all(rows, empty, taken[me], sizes[me], placed[me], sizes[:, me], axis_name=axis)

    def emulated(rows: Array) -> Array:
        every = jax.lax.all_gather(rows, axis, tiled=True)
        at, arriving = jnp.arange(capacity, dtype=jnp.int32), jnp.cumsum(sizes[:, me])
        source = jnp.minimum(jnp.searchsorted(arriving, at, side="right", method="compare_all"), sizes.shape[0] - 1)
        row = source * rows.shape[0] + taken[source, me] + at - placed[source, me]
        return every.at[jnp.where(at < arriving[-1], row, every.shape[0])].get(mode="fill", fill_value=0)

    return jax.lax.platform_dependent(rows, cpu=emulated, default=native)  # XLA's CPU backend has no such collective


def unchecked(function: Callable, *operands: PyTree[Array]) -> PyTree[Array]:
    """`function` without the check of mesh axes. The results vary over the axes of the last operand."""

    def forget(x: Array) -> Array:  # any operation in here makes a type without axes; the compiler drops these two
        return jnp.swapaxes(jnp.swapaxes(x, 0, 1), 0, 1) if x.ndim > 1 else x

    inside = lambda *operands: function(*jax.tree.map(forget, operands))
    out = jax.shard_map(inside, in_specs=P(), out_specs=P(), axis_names=frozenset(), check_vma=False)(*operands)
    return jax.tree.map(lambda x: vary_like(x, operands[-1]), out)
