"""`--check`: the whole train step traced at full size on an abstract mesh. No accelerator, no memory, seconds.

Tracing runs every jaxtyping contract on the shapes and dtypes of the real run, and every collective's layout.
"""

import dataclasses
import math
import re
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mintrain.arrays import Weight, weights
from mintrain.audit import audit, proved
from mintrain.config import Config, Mesh
from mintrain.loss import Counts
from mintrain.optim import trainable
from mintrain.sharding import abstract_mesh, bytes_per_device, describe, validate
from mintrain.step import AnyMesh, abstract_batch, abstract_state, make_train_step, sharded_loss

GIB = 1 << 30


def report(cfg: Config) -> str:
    """Trace the step and describe what was traced. Raises ConfigError or TypeError where a contract is broken."""
    mesh = abstract_mesh(cfg.mesh)
    state, batch = abstract_state(cfg, mesh), abstract_batch(cfg, mesh)
    validate(cfg.mesh, state.model)
    found = proved(audit(make_train_step(cfg, mesh).trace(state, batch).jaxpr))
    tokens = cfg.batch_size * cfg.data.seq_len
    trained, _ = eqx.partition(state.model, trainable(cfg, state.model))
    parameters = [w for w in weights(state.model) if not w.buffer]
    main = [w for w in parameters if not w.path.startswith("mtp")]
    count_all = lambda found: sum(w.value.size for w in found)
    total = count_all(main)
    rows = [f"{cfg.run}: {len(cfg.model.layers)} layers, mesh {describe(cfg.mesh)}, {cfg.compute_dtype}", ""]
    rows += [f"{'parameters':42}{'count':>18}{'share':>8}"]
    for name, count in _modules(main).items():
        rows.append(f"  {name:40}{count:18,}{count / total:8.1%}")
    counts = {
        "total": total,
        "active per token": round(sum(w.value.size * _used(cfg, w) for w in main)),
        "of the total, indexers": count_all(w for w in main if "indexer" in w.path),
        "multi-token prediction, beside the total": count_all(w for w in parameters if w not in main),
        "saved, not trained": count_all(weights(state.model)) - count_all(weights(trained)),
    }
    rows += [f"{name:42}{count:18,}" for name, count in counts.items() if count]
    sizes = {"parameters": state.model, "optimizer state": state.opt, "gradients": trained}
    sizes = {name: bytes_per_device(part) / GIB for name, part in sizes.items()}
    rows += ["", "GiB per device, of " + f"{cfg.mesh.devices} devices"]
    for name, size in {**sizes, "sum": sum(sizes.values())}.items():
        rows.append(f"  {name:40}{size:18.2f}")
    rows += ["", f"{'tokens per step':42}{tokens:18,}"]
    rows.append(f"{'training FLOPs per token (3 x forward)':42}{3 * forward_flops(cfg) / tokens:18.4g}")
    rows += ["", "every declared shape and dtype holds, and every collective's layout; float32 are:"]
    rows += sorted(
        {f"  {_place(finding.product.where):38} -> {finding.sink} in {_place(finding.where)}" for finding in found}
    )
    return "\n".join(rows)


def _place(where: str) -> str:
    """ "layers/attend.py attention_logits" of a file, a line and a function."""
    return re.sub(r"^.*/mintrain/([^:]*)[:\d]* \((.*)\)$", r"\1 \2", where)


def _modules(parameters: list[Weight]) -> dict[str, int]:
    """Parameters by module, the layers of all stages together: attention, mlp, their norms, embedding."""
    counts: dict[str, int] = {}
    for weight in parameters:
        name = re.sub(r"stages\[\d+\]\[\d+\]\.(block\.)?", "layers.", weight.path).rpartition(".")[0]
        name = re.sub(r"adapters\[.*", "adapters", name)
        counts[name] = counts.get(name, 0) + weight.value.size
    return counts


def _used(cfg: Config, weight: Weight) -> float:
    """The share of a weight that a token is multiplied with: a few of all experts, all of the rest."""
    if "experts" not in weight.dims:
        return 1.0
    stage, place = map(int, re.findall(r"\d+", weight.path)[:2])
    moe = cfg.model.stages[stage].pattern[place].moe
    return 1.0 if moe is None else moe.topk / moe.experts


def forward_flops(cfg: Config, mesh: AnyMesh | None = None) -> int:
    """FLOPs of the matrix products of one forward pass of one step, as traced for one device with the whole batch.

    Attention counts every query with every key, masked or not, as the plain form computes it; on a `mesh` of one TPU,
    the blocks that its kernel visits. The rows of experts are padded to whole blocks, and what a mesh computes twice
    is counted once.
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
    return matmul_flops(traced.jaxpr)


def matmul_flops(closed: ClosedJaxpr) -> int:
    """FLOPs of all matrix products, as often as scans and the grids of Pallas kernels run them.

    Of a splash attention kernel's grid, only the steps count that its mask does not leave out: products with blocks of
    keys that no query of a block sees are not computed. With parts of the sequence on several devices that is the mean
    of all parts. Within a visited block every query counts with every key.
    """
    shares = [_share(const) for const in closed.consts]
    return round(_count(closed.jaxpr, dict(zip(closed.jaxpr.constvars, shares, strict=True)), 1)[0])


def _share(array: Any) -> float | None:
    """Of a kernel's table of blocks, the share that is visited. None of what is no such table."""
    return float(np.mean(np.asarray(array) > 0)) if array.dtype == np.int8 else None


def _count(jaxpr: Jaxpr, shares: dict[Any, float | None], times: float) -> tuple[float, list[float | None]]:
    """FLOPs, and the shares of the results. A slice of a table is taken to have the share of the whole."""
    total, shares = 0.0, dict(shares)
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        known = [None if isinstance(atom, Literal) else shares.get(atom) for atom in eqn.invars]
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += times * 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
        elif name == "ragged_dot_general":
            total += times * 2 * math.prod(eqn.outvars[0].aval.shape) * eqn.invars[0].aval.shape[-1]
        inner = times * eqn.params["length"] if name == "scan" else times
        if name == "pallas_call":
            visited = known[1] if eqn.params["name"].startswith("splash") else None  # of data_next, block_mask, ...
            inner *= math.prod(eqn.params["grid_mapping"].grid) * (1.0 if visited is None else visited)
        parts = jaxprs(eqn.params)
        # The operands of what is inside come last: a branch's index and the constants of a loop's test stand before.
        inside = [
            _count(part, dict(zip(reversed(part.invars), reversed(known), strict=False)), inner) for part in parts
        ]
        flops = [count for count, _ in inside]
        total += max(flops, default=0) if name == "cond" else sum(flops)
        results = inside[0][1] if len(inside) == 1 and len(inside[0][1]) == len(eqn.outvars) else None
        if results is None:
            results = [next((share for share in known if share is not None), None)] * len(eqn.outvars)
        shares |= dict(zip(eqn.outvars, results, strict=True))
    return total, [None if isinstance(atom, Literal) else shares.get(atom) for atom in jaxpr.outvars]


def jaxprs(params: dict[str, Any]) -> list[Jaxpr]:
    """The programs among the parameters of an equation."""
    leaves = jax.tree.leaves(params, is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr))
    return [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in leaves if isinstance(v, Jaxpr | ClosedJaxpr)]
