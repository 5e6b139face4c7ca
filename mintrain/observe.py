"""Every number of a traced program, watched: an interpreter of jaxprs that also returns what each array was like.

It goes through `jit`, scans, remat and `shard_map`, and does what the program does; what else holds a program (a
kernel, a branch) is one operation. Of each array of floats it keeps the largest magnitude over all devices, or that
it holds a NaN; in a scan, of every repeat. `history` then tells what happened, in order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32

INLINE = ("jaxpr", "call_jaxpr")  # parameters of an equation that hold what it runs, once
OPAQUE = {"cond", "while", "pallas_call"}
# Operations whose result has the numbers of their first operand: nothing new to see.
# fmt: off
MOVES = {
    "all_gather", "all_to_all", "broadcast_in_dim", "copy", "dynamic_slice", "name", "neg", "optimization_barrier",
    "pvary", "reshape", "reshard", "slice", "split", "squeeze", "stop_gradient", "transpose",
}
# fmt: on
LARGEST = float(np.finfo(np.float32).max)


class Record(NamedTuple):
    """What was seen of a program: of its arguments, of each equation's results, and within it, if it was gone into."""

    arguments: list[Any]
    results: list[list[Any]]
    within: list[Any]  # of each equation, a Record, Packed, or None


class Packed(eqx.Module):
    """A Record as few arrays: a thousand results of their own would take the compiler minutes."""

    numbers: Float32[Array, "*repeats seen"]
    parts: list[Any]  # what scans in it have packed
    tree: Any = eqx.field(static=True)
    single: tuple[bool, ...] = eqx.field(static=True)  # which leaves are in `numbers`

    def unpack(self) -> Record:
        numbers, parts = iter(np.moveaxis(self.numbers, -1, 0)), iter(self.parts)
        return jax.tree.unflatten(self.tree, [next(numbers if one else parts) for one in self.single])


class Event(NamedTuple):
    """One equation as it ran once. Integers and masks count as 0."""

    equation: JaxprEqn
    inputs: list[float]  # largest magnitudes; NaN if there is one
    outputs: list[float]
    scope: str  # names of the places that it is in, from the outermost; in a scan, the number of the repeat


def observe(closed: ClosedJaxpr) -> Callable[..., Record]:
    """A function of the arguments of `closed` that runs it and returns what was seen."""
    return lambda *arguments: _run(closed.jaxpr, closed.consts, arguments)[1]


def _run(jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> tuple[list[Any], Record]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else known[atom]
    record = Record([_look(x) for x in arguments], [], [])
    for eqn in jaxpr.eqns:
        names = source_info_util.current_name_stack() + eqn.source_info.name_stack
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
            outputs, within = _apply(eqn, [read(atom) for atom in eqn.invars])
        record.results.append([None if eqn.primitive.name in MOVES else _look(x) for x in outputs])
        record.within.append(within)
        known |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars], record


def _apply(eqn: JaxprEqn, inputs: list[Any]) -> tuple[list[Any], Record | Packed | None]:
    """The results of an equation, and what was seen inside it if it is gone into."""
    name, params = eqn.primitive.name, eqn.params
    inner, consts = _inner(eqn)
    if inner is None:
        outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
        return list(outputs) if eqn.primitive.multiple_results else [outputs], None
    if name == "scan":
        fixed, carried = params["num_consts"], params["num_carry"]

        def body(carry, xs):
            outputs, record = _run(inner, consts, [*inputs[:fixed], *carry, *xs])
            return outputs[:carried], (outputs[carried:], _pack(record))

        carry, xs = inputs[fixed : fixed + carried], inputs[fixed + carried :]
        carry, (ys, packed) = jax.lax.scan(body, carry, xs, length=params["length"], reverse=params["reverse"])
        return [*carry, *ys], packed
    if name == "shard_map":

        def mapped(*inputs):
            outputs, record = _run(inner, consts, inputs)
            return outputs, jax.tree.map(_over_devices, _pack(record))

        specs = dict(in_specs=tuple(params["in_specs"]), out_specs=(list(params["out_specs"]), P()))
        return jax.shard_map(mapped, mesh=params["mesh"], **specs)(*inputs)
    return _run(inner, consts, inputs)


def _inner(eqn: JaxprEqn) -> tuple[Jaxpr | None, Sequence[Any]]:
    """The program that an equation holds, with its constants, if it is gone into."""
    opaque = eqn.primitive.name in OPAQUE or not eqn.params.get("check_vma", True)
    inner = next((eqn.params[key] for key in INLINE if key in eqn.params and not opaque), None)
    return (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())


def _look(x: Any) -> Float32[Array, ""] | None:
    """The largest magnitude on this device; LARGEST for infinity and infinity for NaN, which no maximum passes by."""
    if not jnp.issubdtype(jax.typeof(x).dtype, np.floating):
        return None
    x = jnp.abs(x).astype(jnp.float32)
    return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, jnp.minimum(x, LARGEST)), initial=0)


def _number(seen: np.ndarray | np.floating | None) -> float:
    largest = 0.0 if seen is None else float(seen)
    return math.nan if math.isinf(largest) else math.inf if largest == LARGEST else largest


def _pack(record: Record) -> Packed:
    leaves, tree = jax.tree.flatten(record)
    single = tuple(leaf.ndim == 0 for leaf in leaves)
    numbers = jnp.stack([leaf for leaf in leaves if leaf.ndim == 0])
    return Packed(numbers, [leaf for leaf in leaves if leaf.ndim > 0], tree, single)


def _over_devices(numbers: Float32[Array, "*repeats seen"]) -> Float32[Array, "*repeats seen"]:
    axes = tuple(jax.typeof(numbers).manual_axis_type.varying)
    return jax.lax.pmax(numbers, axes) if axes else numbers


def arguments(record: Record) -> list[float]:
    return list(map(_number, record.arguments))


def history(jaxpr: Jaxpr, record: Record, scope: str = "") -> Iterator[Event]:
    """What happened, in the order in which it did. `record` is on the host."""
    known = dict(zip(jaxpr.invars, arguments(record), strict=True))
    for eqn, results, within in zip(jaxpr.eqns, record.results, record.within, strict=True):
        here, outputs = f"{scope}/{eqn.source_info.name_stack}", list(map(_number, results))
        inputs = [_constant(a.val) if isinstance(a, Literal) else known.get(a, 0.0) for a in eqn.invars]
        within = within.unpack() if isinstance(within, Packed) else within
        if eqn.primitive.name in MOVES:
            outputs = inputs if len(inputs) == len(outputs) else [inputs[0]] * len(outputs)
        elif within is None:
            yield Event(eqn, inputs, outputs, here)
        elif eqn.primitive.name == "scan":
            order = range(eqn.params["length"])
            for i in reversed(order) if eqn.params["reverse"] else order:
                once = jax.tree.map(lambda x, i=i: x[i], within)
                yield from history(_inner(eqn)[0], once, f"{here}/{i}")
        else:
            yield from history(_inner(eqn)[0], within, here)
        known |= dict(zip(eqn.outvars, outputs, strict=True))


def _constant(x: Any) -> float:
    """A NaN that is written into the program is made where it is used."""
    x = np.asarray(x)
    return float(np.nanmax(np.abs(x.astype(np.float64)), initial=0)) if x.dtype.kind in "fV" else 0.0
