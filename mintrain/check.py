"""`--check`: the whole train step traced at full size on an abstract mesh. No accelerator, no memory, seconds.

Tracing runs every jaxtyping contract on the shapes and dtypes of the real run, and every collective's layout.
"""

import re

import equinox as eqx

from mintrain.arrays import Weight, weights
from mintrain.audit import audit, proved
from mintrain.config import Config
from mintrain.costs import forward_flops
from mintrain.optim import trainable
from mintrain.sharding import abstract_mesh, bytes_per_device, describe, validate
from mintrain.step import abstract_batch, abstract_state, make_train_step

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
