"""Run a traced program piece by piece and look at its numbers, as a debugger steps through code.

A layer (a remat, or one repeat of a scan) runs as one piece, and so does what stands between layers. Only a piece that
makes a number that is not finite is run again, one operation at a time; so one layer is taken apart, and not the whole
model. Kernels and branches are one operation. Of each array of floats an event says the largest magnitude over all
devices, or that it holds a NaN. What is not needed any more is freed.

Inside `shard_map` the arrays of the devices are kept as one, with a first axis of the devices that they differ on.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32

from mintrain.audit import scan_sides

INLINE = ("jaxpr", "call_jaxpr")  # parameters of an equation that hold what it runs, once
OPAQUE = {"cond", "while", "pallas_call"}
LAYERS = {"checkpoint", "remat2", "scan", "shard_map"}
HELPER = 30  # equations of a `jit` that is no piece of its own; the optimizer has more
LARGEST = float(np.finfo(np.float32).max)


class Piece(NamedTuple):
    """What runs at once: an equation, with the program that it holds, or several."""

    equation: JaxprEqn  # of several, the last one
    inner: Jaxpr | None
    consts: Sequence[Any]
    inputs: Sequence[Any]  # with their shapes on one device
    outputs: Sequence[Any]

    @property
    def name(self) -> str:
        whole = self.inner is None or self.equation.outvars == list(self.outputs)
        return self.equation.primitive.name if whole else "several"


class Event(NamedTuple):
    """One piece as it ran once. Integers and masks count as 0."""

    piece: Piece
    inputs: list[float]  # largest magnitudes; NaN if there is one
    outputs: list[float]
    scope: str  # names of the places that it is in, from the outermost; in a scan, the number of the repeat


class Seen(NamedTuple):
    """A value, and its largest magnitude or NaN."""

    value: Any
    largest: float


def observe(closed: ClosedJaxpr, arguments: Sequence[Array]) -> Iterator[Event]:
    """Run `closed`; what happens, in the order in which it does. To stop reading is to stop the run."""
    yield from _run(closed.jaxpr, closed.consts, _seen(arguments, _looks(arguments)), "", None)


def magnitudes(arrays: Sequence[Array]) -> list[float]:
    return [seen.largest for seen in _seen(arrays, _looks(arrays))]


@jax.jit
def _looks(arrays: Sequence[Array]) -> list[Float32[Array, ""] | None]:
    return list(map(_look, arrays))


def _seen(values: Sequence[Any], looks: Sequence[Array | None]) -> list[Seen]:
    """Waits for all of them: programs that run at once on several CPU devices can wait for each other for ever."""
    looks = jax.device_get(jax.block_until_ready((values, looks))[1])
    return [Seen(x, 0.0 if look is None else _number(look)) for x, look in zip(values, looks, strict=True)]


def _run(
    jaxpr: Jaxpr, consts: Sequence[Any], arguments: list[Seen], scope: str, mesh: Mesh | None, apart: bool = False
) -> Generator[Event, None, list[Seen]]:
    """Yields events and returns the results. apart: each equation alone."""
    constants = [Seen(_on_devices(mesh, x), _constant(x)) for x in consts]
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))
    arguments.clear()
    pieces = [_alone(eqn) for eqn in jaxpr.eqns] if apart else _pieces(jaxpr)
    last = {atom: i for i, piece in enumerate(pieces) for atom in piece.inputs if not isinstance(atom, Literal)}
    last |= {atom: len(pieces) for atom in jaxpr.outvars if not isinstance(atom, Literal)}

    def read(atom: Any) -> Seen:
        return Seen(_on_devices(mesh, atom.val), _constant(atom.val)) if isinstance(atom, Literal) else known[atom]

    for i, piece in enumerate(pieces):
        inputs = [read(atom) for atom in piece.inputs]
        for atom in piece.inputs:
            if not isinstance(atom, Literal) and last[atom] == i:
                known.pop(atom, None)
        kind = piece.equation.primitive.name if piece.inner is not None else ""
        run = {"scan": _scan, "shard_map": _shard_map}.get(kind, _piece)
        here = scope if piece.name == "several" else f"{scope}/{piece.equation.source_info.name_stack}"
        outputs = yield from run(piece, inputs, here, mesh)
        known |= {v: out for v, out in zip(piece.outputs, outputs, strict=True) if v in last}
        del inputs, outputs
    return [read(atom) for atom in jaxpr.outvars]


def _piece(piece: Piece, inputs: list[Seen], scope: str, mesh: Mesh | None) -> Generator[Event, None, list[Seen]]:
    """Run it at once; then again in its parts if it makes what is not finite."""
    outputs = _seen(*_compiled(piece, mesh)(*[seen.value for seen in inputs]))
    event = Event(piece, [seen.largest for seen in inputs], [seen.largest for seen in outputs], scope)
    if piece.inner is not None and not _finite(outputs):
        outputs = yield from _run(piece.inner, piece.consts, inputs, scope, mesh, apart=True)
        if not _finite(outputs):
            return outputs  # the events of the parts have told it
    yield event
    return outputs


def _scan(piece: Piece, inputs: list[Seen], scope: str, mesh: Mesh | None) -> Generator[Event, None, list[Seen]]:
    params, inner = piece.equation.params, piece.inner
    fixed, carried = scan_sides(piece.equation)
    constants, carry, xs = inputs[:fixed], inputs[fixed : fixed + carried], inputs[fixed + carried :]
    cut = [_at(mesh, _spec(mesh, var)) for var in inner.invars[fixed + carried :]]
    order, rows = range(params["length"]), []
    for i in reversed(order) if params["reverse"] else order:
        here = [*constants, *carry, *(Seen(at(x.value, i), x.largest) for at, x in zip(cut, xs, strict=True))]
        if mesh is None:  # a microbatch, which holds everything
            outputs = yield from _run(inner, piece.consts, here, f"{scope}/{i}", mesh)
        else:
            once = piece._replace(inputs=inner.invars, outputs=inner.outvars)
            outputs = yield from _piece(once, here, f"{scope}/{i}", mesh)
        carry = outputs[:carried]
        rows.append(outputs[carried:])
    columns = zip(*(rows[::-1] if params["reverse"] else rows), strict=True)
    stacks = [_stack(mesh, _spec(mesh, var)) for var in inner.outvars[carried:]]
    return carry + [
        Seen(stack(*[x.value for x in column]), float(np.max([x.largest for x in column])))
        for stack, column in zip(stacks, columns, strict=True)
    ]


def _shard_map(piece: Piece, inputs: list[Seen], scope: str, _: None) -> Generator[Event, None, list[Seen]]:
    mesh = next(x.value.sharding.mesh for x in inputs if isinstance(x.value, Array))
    params, inner = piece.equation.params, piece.inner
    enter = [_enter(mesh, spec, _spec(mesh, var)) for spec, var in zip(params["in_specs"], inner.invars, strict=True)]
    leave = [_leave(mesh, _spec(mesh, var), s) for var, s in zip(inner.outvars, params["out_specs"], strict=True)]
    inside = [Seen(change(x.value), x.largest) for change, x in zip(enter, inputs, strict=True)]
    outputs = yield from _run(inner, piece.consts, inside, scope, mesh)
    return [Seen(change(x.value), x.largest) for change, x in zip(leave, outputs, strict=True)]


def _alone(eqn: JaxprEqn) -> Piece:
    opaque = eqn.primitive.name in OPAQUE or not eqn.params.get("check_vma", True)
    inner, consts = next((eqn.params[key] for key in INLINE if key in eqn.params and not opaque), None), ()
    if isinstance(inner, ClosedJaxpr):
        inner, consts = inner.jaxpr, inner.consts
    return Piece(eqn, inner, consts, eqn.invars, eqn.outvars)


@cache
def _pieces(jaxpr: Jaxpr) -> list[Piece]:
    """Layers, and what stands between them."""
    pieces: list[Piece] = []
    between: list[JaxprEqn] = []
    for i, eqn in enumerate(jaxpr.eqns):
        inner = _alone(eqn).inner
        layer = inner is not None and (eqn.primitive.name in LAYERS or len(inner.eqns) > HELPER)
        if not layer:
            between.append(eqn)
        if between and (layer or i == len(jaxpr.eqns) - 1):
            later = {atom for eqn in jaxpr.eqns[i if layer else i + 1 :] for atom in _variables(eqn.invars)}
            later |= set(_variables(jaxpr.outvars))
            made = [var for eqn in between for var in eqn.outvars]
            given = dict.fromkeys(atom for eqn in between for atom in _variables(eqn.invars))
            # A piece that reads nothing would not know the mesh.
            ins = [atom for atom in given if atom not in set(made)] or jaxpr.invars[:1]
            outs = [var for var in made if var in later]
            inner = Jaxpr(
                constvars=[], invars=ins, outvars=outs, eqns=between, debug_info=jaxpr.debug_info.with_unknown_names()
            )
            pieces.append(Piece(between[-1], inner, (), ins, outs))
            between = []
        if layer:
            pieces.append(_alone(eqn))
    return pieces


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


_functions: dict[Any, Callable] = {}


def _compiled(piece: Piece, mesh: Mesh | None) -> Callable[..., tuple[list[Array], list[Array | None]]]:
    """A piece as a compiled function that returns the looks too. Equal equations have one."""
    eqn, inner = piece.equation, piece.inner
    in_specs, out_specs = (tuple(_spec(mesh, var) for var in side) for side in (piece.inputs, piece.outputs))
    key = (mesh, inner or (eqn.primitive, eqn.ctx.cur_abstract_mesh, in_specs, *eqn.params.items()))
    try:
        hash(key)
    except TypeError:
        key = (mesh, eqn)
    if key not in _functions:

        def run(*inputs: Array) -> list[Array]:
            if inner is not None:
                return jax.core.eval_jaxpr(inner, piece.consts, *inputs)
            with eqn.ctx.manager:
                outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            return list(outputs) if eqn.primitive.multiple_results else [outputs]

        def mapped(*inputs: Array) -> list[Array]:
            return [x[None] for x in run(*[x[0] for x in inputs])]

        specs = dict(in_specs=in_specs, out_specs=list(out_specs))
        whole = run if mesh is None else jax.shard_map(mapped, mesh=mesh, **specs)
        looked = lambda *inputs: (outputs := whole(*inputs), list(map(_look, outputs)))
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        _functions[key] = jax.jit(looked, keep_unused=True, compiler_options=options)
    return _functions[key]


def _spec(mesh: Mesh | None, var: Any) -> P:
    """How the first axis of a value inside `shard_map` lies: over the mesh axes that the value varies over."""
    return P() if mesh is None else P(tuple(a for a in mesh.axis_names if a in var.aval.manual_axis_type.varying))


@cache
def _enter(mesh: Mesh, outside: P, inside: P) -> Callable[[Array], Array]:
    return jax.jit(jax.shard_map(lambda x: x[None], mesh=mesh, in_specs=outside, out_specs=inside))


@cache
def _leave(mesh: Mesh, inside: P, outside: P) -> Callable[[Array], Array]:
    return jax.jit(jax.shard_map(lambda x: x[0], mesh=mesh, in_specs=inside, out_specs=outside))


def _on_devices(mesh: Mesh | None, x: Any) -> Any:
    """A constant, the same on all devices."""
    return x if mesh is None else jax.device_put(np.asarray(x)[None], jax.NamedSharding(mesh, P()))


@cache
def _at(mesh: Mesh | None, spec: P) -> Callable[[Array, int], Array]:
    if mesh is None:
        return jax.jit(lambda x, i: x[i])
    return jax.jit(jax.shard_map(lambda x, i: x[:, i], mesh=mesh, in_specs=(spec, P()), out_specs=spec))


@cache
def _stack(mesh: Mesh | None, spec: P) -> Callable[..., Array]:
    whole = lambda *xs: jnp.stack(xs)
    if mesh is None:
        return jax.jit(whole)
    return jax.jit(jax.shard_map(lambda *xs: jnp.stack(xs, axis=1), mesh=mesh, in_specs=spec, out_specs=spec))


def _look(x: Array) -> Float32[Array, ""] | None:
    """The largest magnitude; LARGEST for infinity and infinity for NaN, which XLA's CPU maximum loses."""
    if not jnp.issubdtype(x.dtype, np.floating):
        return None
    x = jnp.abs(x).astype(jnp.float32)
    return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, jnp.minimum(x, LARGEST)), initial=0)


def _finite(seen: Sequence[Seen]) -> bool:
    return all(math.isfinite(x.largest) for x in seen)


def _number(seen: Any) -> float:
    largest = float(seen)
    return math.nan if math.isinf(largest) else math.inf if largest == LARGEST else largest


def _constant(x: Any) -> float:
    """A NaN or an infinity that is written into the program is made where it is used."""
    x = np.asarray(x)
    return float(np.nanmax(np.abs(x.astype(np.float64)), initial=0)) if x.dtype.kind in "fV" else 0.0
