"""What a traced step costs on a TPU: FLOPs of its matrix products, bytes that its collectives bring to a device.

Both are counted as often as scans run them, through Pallas kernels and what the backward pass computes again. Rows that
are sent to experts are counted as if all experts were used alike.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from mintrain.config import Config, Mesh
from mintrain.loss import Counts
from mintrain.sharding import abstract_mesh
from mintrain.step import AnyMesh, abstract_batch, abstract_state, sharded_loss


def forward_flops(cfg: Config, mesh: AnyMesh | None = None) -> int:
    """FLOPs of the matrix products of one forward pass of one step, as traced for one device with the whole batch.

    Attention counts every query with every key, masked or not, as the plain form computes it; on a `mesh` of one TPU,
    the blocks that its kernel visits. Experts count as often as tokens choose them, without the rows that fill up
    blocks, and what a mesh computes twice is counted once.
    """
    cfg = dataclasses.replace(cfg, mesh=Mesh(), per_device_batch_size=cfg.batch_size, accumulate=1)
    mesh = abstract_mesh(cfg.mesh) if mesh is None else mesh
    state, batch = abstract_state(cfg, mesh), abstract_batch(cfg, mesh)
    micro = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=x.sharding.update(spec=x.sharding.spec[1:])),
        batch,
    )
    one = jax.ShapeDtypeStruct((), jax.numpy.float32)
    traced = jax.jit(sharded_loss(cfg, mesh, state.model)).trace(state.model, micro, jax.eval_shape(Counts, one, one))
    experts = [layer.moe for layer in (*cfg.model.layers, *cfg.model.mtp) if layer.moe]
    chosen = sum(2 * 3 * cfg.model.embed * moe.width * moe.topk for moe in experts) * math.prod(micro.tokens.shape)
    return chosen + matmul_flops(traced.jaxpr, experts=False)


def matmul_flops(closed: ClosedJaxpr, experts: bool = True) -> int:
    """FLOPs of all matrix products, as often as scans and the grids of Pallas kernels run them.

    Of a splash attention kernel's grid, only the steps count that its mask does not leave out: products with blocks of
    keys that no query of a block sees are not computed. With parts of the sequence on several devices that is the mean
    of all parts. Within a visited block every query counts with every key. Of the room for rows that may be sent to a
    device's experts, only what is filled counts.

    experts: with their products.
    """
    shares = [_visited(const) for const in closed.consts]
    return round(_count(closed.jaxpr, dict(zip(closed.jaxpr.constvars, shares, strict=True)), 1, experts)[0])


def _visited(array: Any) -> float:
    """Of a kernel's table of blocks, the share that is visited; 1 of what is no such table."""
    return float(np.mean(np.asarray(array) > 0)) if array.dtype == np.int8 else 1.0


def _count(jaxpr: Jaxpr, shares: dict[Any, float], times: float, experts: bool) -> tuple[float, list[float]]:
    """FLOPs, and of each result the share that counts: of a table's blocks, of an expert's rows. 1 is all of it.

    A slice of a table is taken to have the share of the whole, and rows computed from others the share of those.
    """
    total, shares = 0.0, dict(shares)
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        known = [1.0 if isinstance(atom, Literal) else shares.get(atom, 1.0) for atom in eqn.invars]
        results = [min(known, default=1.0)] * len(eqn.outvars)
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += times * 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
            results = [1.0]
        elif name == "ragged_dot_general":  # rows times matrices or, in the backward pass, rows times rows
            rows, out = eqn.invars[0].aval, eqn.outvars[0].aval
            total += experts * times * 2 * rows.size * out.shape[-1] * known[0]
        elif name == "ragged_all_to_all":
            sent, received = (var.aval.shape[0] for var in (eqn.invars[0], eqn.outvars[0]))
            results = [min(sent / received * known[0], 1.0)]
        inner = times * eqn.params["length"] if name == "scan" else times
        if name == "pallas_call":
            visited = known[1] if eqn.params["name"].startswith("splash") else 1.0  # of data_next, block_mask, ...
            inner *= math.prod(eqn.params["grid_mapping"].grid) * visited
        # The operands of what is inside come last: a branch's index and the constants of a loop's test stand before.
        inside = [
            _count(part, dict(zip(reversed(part.invars), reversed(known), strict=False)), inner, experts)
            for part in programs(eqn)
        ]
        flops = [count for count, _ in inside]
        total += max(flops, default=0) if name == "cond" else sum(flops)
        if name == "pallas_call":
            results = [1.0] * len(eqn.outvars)
        elif len(inside) == 1 and len(inside[0][1]) == len(eqn.outvars):
            results = inside[0][1]
        shares |= dict(zip(eqn.outvars, results, strict=True))
    return total, [1.0 if isinstance(atom, Literal) else shares.get(atom, 1.0) for atom in jaxpr.outvars]


COLLECTIVES = {  # of the result's bytes on a device, the share that comes from others, for n devices
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: n - 1,
    "psum": lambda n: 2 * (n - 1) / n,
    "pmax": lambda n: 2 * (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "ragged_all_to_all": lambda n: (n - 1) / n,
    "ppermute": lambda n: 1.0,
}


def count_collectives(jaxpr: Jaxpr, axes: dict[str, int], times: int, into: dict[str, list[float]]) -> None:
    """Calls, and bytes that a device receives, of the collectives over more than one device."""
    for eqn in jaxpr.eqns:
        name = re.sub(r"(_invariant|_invariant_reduced|_reduced|2)$", "", eqn.primitive.name)
        if name in COLLECTIVES:
            over = eqn.params.get("axes", eqn.params.get("axis_name", ()))
            n = math.prod(axes.get(axis, 1) for axis in ([over] if isinstance(over, str) else over))
            if n > 1:
                size = sum(var.aval.size * var.aval.dtype.itemsize for var in eqn.outvars)
                if name == "ragged_all_to_all":  # the longer one of both sides has room for all that could come
                    size = min(size, eqn.invars[0].aval.size * eqn.invars[0].aval.dtype.itemsize)
                entry = into.setdefault(name, [0, 0.0])
                entry[0] += times
                entry[1] += times * size * COLLECTIVES[name](n)
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for part in programs(eqn):
            count_collectives(part, axes, inner, into)


def programs(eqn: JaxprEqn) -> list[Jaxpr]:
    """The programs that an equation runs on a TPU."""
    leaves = jax.tree.leaves(eqn.params, is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr))
    found = [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in leaves if isinstance(v, Jaxpr | ClosedJaxpr)]
    if platforms := eqn.params.get("branches_platforms"):
        return [part for part, where in zip(found, platforms, strict=True) if not where or "tpu" in where][:1]
    return found
