"""`--check`: the whole train step traced at full size on an abstract mesh. No accelerator, no memory, seconds.

Tracing runs every jaxtyping contract on the shapes and dtypes of the real run, and every collective's layout.
"""

import math
import re

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from mintrain.arrays import Weight, weights
from mintrain.config import Config
from mintrain.sharding import abstract_mesh, bytes_per_device, describe, validate
from mintrain.step import abstract_batch, abstract_state, make_train_step, sharded_loss

GIB = 1 << 30


def report(cfg: Config) -> str:
    """Trace the step and describe what was traced. Raises ConfigError or TypeError where a contract is broken."""
    mesh = abstract_mesh(cfg.mesh)
    state, batch = abstract_state(cfg, mesh), abstract_batch(cfg, mesh)
    validate(cfg, state.model)
    make_train_step(cfg, mesh).trace(state, batch)
    tokens = cfg.batch_size * cfg.data.seq_len
    parameters = [w for w in weights(state.model) if not w.buffer]
    total = sum(math.prod(w.value.shape) for w in parameters)
    buffers = sum(math.prod(w.value.shape) for w in weights(state.model) if w.buffer)
    rows = [f"{cfg.run}: {len(cfg.model.layers)} layers, mesh {describe(cfg.mesh)}, {cfg.compute_dtype}", ""]
    rows += [f"{'parameters':42}{'count':>18}{'share':>8}"]
    for name, count in _modules(parameters).items():
        rows.append(f"  {name:40}{count:18,}{count / total:8.1%}")
    rows += [f"{'total':42}{total:18,}", f"{'active per token':42}{total:18,}"]
    if buffers:
        rows.append(f"{'saved, not trained':42}{buffers:18,}")
    model, opt = bytes_per_device(state.model), bytes_per_device(state.opt)
    rows += ["", "GiB per device, of " + f"{cfg.mesh.devices} devices"]
    for name, size in (("parameters", model), ("optimizer state", opt), ("gradients", model), ("sum", 2 * model + opt)):
        rows.append(f"  {name:40}{size / GIB:18.2f}")
    rows += ["", f"{'tokens per step':42}{tokens:18,}"]
    rows.append(f"{'training FLOPs per token (3 x forward)':42}{3 * forward_flops(cfg) / tokens:18.4g}")
    rows += ["", "every declared shape and dtype holds, and every collective's layout"]
    return "\n".join(rows)


def _modules(parameters: list[Weight]) -> dict[str, int]:
    """Parameters by module, the layers of all stages together: attention, mlp, their norms, embedding."""
    counts: dict[str, int] = {}
    for weight in parameters:
        name = re.sub(r"stages\[\d+\]\[\d+\]\.", "layers.", weight.path).rpartition(".")[0]
        counts[name] = counts.get(name, 0) + math.prod(weight.value.shape)
    return counts


def forward_flops(cfg: Config) -> int:
    """FLOPs of the matrix products of one forward pass of one step, on all devices, as traced.

    Attention counts every query with every key, masked or not, as the plain form computes it.
    """
    mesh = abstract_mesh(cfg.mesh)
    state, batch = abstract_state(cfg, mesh), abstract_batch(cfg, mesh)
    micro = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=x.sharding.update(spec=x.sharding.spec[1:])),
        batch,
    )
    loss = sharded_loss(cfg, mesh, state.model)
    traced = jax.jit(loss).trace(state.model, micro, jax.ShapeDtypeStruct((), jax.numpy.float32))
    return cfg.accumulate * _flops(traced.jaxpr.jaxpr, 1)


def _flops(jaxpr: Jaxpr, times: int) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += times * 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
        inner = times
        if eqn.primitive.name == "scan":
            inner *= eqn.params["length"]
        elif eqn.primitive.name == "shard_map":
            inner *= math.prod(eqn.params["mesh"].shape.values())
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                total += _flops(value.jaxpr if isinstance(value, ClosedJaxpr) else value, inner)
    return total
