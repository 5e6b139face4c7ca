"""The first number that is not finite: which operation made it, in which layer, and what from.

A step that is not finite leaves the parameters as they were. `investigate` runs the same batch again, watching every
number (observe.py), and writes runs/NAME/nonfinite-STEP/: report.txt, report.json, and the state and the batch, with
which `python -m mintrain.numerics replay runs/NAME/nonfinite-STEP [options]` runs that step later, also with other
options: --compute_dtype float32 shows whether that would have helped.
"""

import json
import math
import re
import sys
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr

from mintrain import options, sharding, step
from mintrain.checkpoint import Checkpoints
from mintrain.config import Config, ConfigError
from mintrain.loss import Batch
from mintrain.observe import Event, magnitudes, observe

BEFORE = 8  # operations that are reported before the first bad one


class Operation(NamedTuple):
    """One operation as it ran, for people and JSON."""

    name: str
    result: str  # "NaN", "inf" or the largest magnitude
    kind: str  # dtype and shape of the result, on one device
    inputs: list[str]  # the same of the inputs, with their largest magnitudes
    layer: int | None  # counted from 0 over the whole model; those that predict further ahead come last
    module: str  # such as stages[0][1].attention
    phase: str  # forward, backward, or a forward operation that the backward pass computes again
    where: list[str]  # file, line and function, from the innermost


class Finding(NamedTuple):
    arguments: list[str]  # weights, moments or parts of the batch that were bad before the step
    first: Operation | None
    before: list[Operation]  # the last one first

    @property
    def finite(self) -> bool:
        return self.first is None and not self.arguments

    def __str__(self) -> str:
        if self.arguments:
            return "not finite before the step: " + ", ".join(self.arguments)
        if self.first is None:
            return "every number of the step is finite"
        op = self.first
        lines = ["the first number that is not finite:", f"  {op.name} makes {op.result} in {op.kind}"]
        lines += [f"  from {' and '.join(op.inputs)} (largest magnitudes)"] if op.inputs else []
        lines += [f"  in {'' if op.layer is None else f'layer {op.layer}, '}{op.module or 'no module'}, {op.phase}"]
        lines += [f"  {'at' if i == 0 else '  '} {frame}" for i, frame in enumerate(op.where)]
        lines += ["before it, the last one first:"]
        return "\n".join([*lines, *(f"  {b.name:20} {b.kind:24} {b.result:>9}  {b.where[0]}" for b in self.before)])


def find(cfg: Config, mesh: jax.sharding.Mesh, state: step.State, batch: Batch) -> Finding:
    """Run the step on `batch` until a number is not finite, and say where that comes from. The state stays as it is."""
    named = jax.tree.leaves_with_path((state, batch))
    names = [("state", "batch")[path[0].idx] + jax.tree_util.keystr(path[1:]) for path, _ in named]
    arrays = [x for _, x in named]
    bad = [name for name, x in zip(names, magnitudes(arrays), strict=True) if not math.isfinite(x)]
    before: deque[Event] = deque(maxlen=BEFORE)
    for event in observe(_traced(cfg, mesh), arrays) if not bad else ():
        if _made(event):
            return Finding([], _operation(cfg, event), [_operation(cfg, e) for e in reversed(before)])
        if any(event.outputs):  # integers, masks and zeros say nothing
            before.append(event)
    return Finding(bad, None, [])


@cache
def _traced(cfg: Config, mesh: jax.sharding.Mesh) -> ClosedJaxpr:
    return step.make_train_step(cfg, mesh).trace(step.abstract_state(cfg, mesh), step.abstract_batch(cfg, mesh)).jaxpr


def _made(event: Event) -> bool:
    """Whether this operation made what is not finite, and was not given it: NaN, or infinity of finite numbers."""
    given_nan = any(map(math.isnan, event.inputs))
    finite = all(map(math.isfinite, event.inputs))
    return any((math.isnan(x) and not given_nan) or (math.isinf(x) and finite) for x in event.outputs)


def _operation(cfg: Config, event: Event) -> Operation:
    piece = event.piece
    worst = max(range(len(event.outputs)), key=lambda i: (not math.isfinite(event.outputs[i]), event.outputs[i]))
    layer, module = _place(cfg, event.scope)
    again = "forward, computed again" if "rematted" in event.scope else "backward"
    return Operation(
        name=piece.name,
        result=_text(event.outputs[worst]),
        kind=_kind(piece.outputs[worst].aval),
        inputs=[
            f"{_kind(atom.aval)} {_text(x)}"
            for atom, x in zip(piece.inputs, event.inputs, strict=True)
            if jnp.issubdtype(atom.aval.dtype, np.floating)
        ],
        layer=layer,
        module=module,
        phase=again if "transpose" in event.scope else "forward",
        where=_frames(piece.equation.source_info),
    )


def _text(x: float) -> str:
    return "NaN" if math.isnan(x) else "inf" if math.isinf(x) else f"{x:.3g}"


def _kind(aval: Any) -> str:
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"


def _place(cfg: Config, scope: str) -> tuple[int | None, str]:
    """Layer and module of an operation, from the scopes that it is in (`jax.named_scope` where modules are called)."""
    layer, start = None, 0
    if found := re.search(r"(\d+)/+stages\[(\d+)\]\[(\d+)\]", scope):
        repeat, stage, place = map(int, found.groups())
        sizes = [len(stage.pattern) * stage.repeats for stage in cfg.model.stages]
        layer = sum(sizes[:stage]) + repeat * len(cfg.model.stages[stage].pattern) + place
        start = scope.index("stages[")
    elif found := re.search(r"mtp\[(\d+)\]", scope):
        layer, start = len(cfg.model.layers) + int(found[1]), found.start()
    words = [word for word in scope[start:].split("/") if re.fullmatch(r"[a-z]\w*(\[\d+\])*", word)]
    other = re.compile(r"repeat\d+|rematted_computation|shard_map")
    return layer, ".".join(dict.fromkeys(word for word in words if not other.fullmatch(word)))


def _frames(source: Any) -> list[str]:
    """Where it was written: our lines or the user's, and a library's if it comes first."""
    frames = source_info_util.summarize(source, num_frames=100).splitlines()[::-1]
    ours = [frame for frame in frames if "site-packages" not in frame or f"{Path(__file__).parent}/" in frame]
    root = "|".join(map(re.escape, (str(Path(__file__).parents[1]), str(Path.cwd()))))
    short = [re.sub(rf"^(.*/site-packages|{root})/", "", frame) for frame in [*frames[:1], *ours]]
    places = list(dict.fromkeys(re.sub(r"(\.py:\d+)[:\d-]*", r"\1", frame) for frame in short))
    return places[:3] or ["an operation of JAX's own"]


def investigate(cfg: Config, mesh: jax.sharding.Mesh, state: step.State, batch: Batch, at: int, folder: Path) -> None:
    """Write `folder`/nonfinite-`at` about step `at`, which `batch` made bad, and print what was found.

    Everything that a replay needs is written first. If the watched step cannot run, it says so: the run goes on.
    """
    here = folder / f"nonfinite-{at}"
    arrays = {name: np.asarray(multihost_utils.process_allgather(x, tiled=True)) for name, x in vars(batch).items()}
    if jax.process_index() == 0:
        here.mkdir(parents=True)
        (here / "config.json").write_text(options.to_json(cfg))
        np.savez(here / "batch.npz", **arrays)
    saved = Checkpoints(here / "checkpoints", keep=1)
    saved.save(at, state)
    saved.close()
    try:
        text = _report(find(cfg, mesh, state, batch), here)
    except jax.errors.JaxRuntimeError as error:
        text = f"it could not be run again with every number watched: {str(error).splitlines()[0]}"
    print(f"step {at}: {text}\n{here}: python -m mintrain.numerics replay {here} runs it again", flush=True)


def _report(finding: Finding, folder: Path) -> str:
    if jax.process_index() == 0:
        found = dict(arguments=finding.arguments, first=finding.first and finding.first._asdict())
        found |= dict(before=[op._asdict() for op in finding.before])
        (folder / "report.json").write_text(json.dumps(found, indent=1))
        (folder / "report.txt").write_text(f"{finding}\n")
    return str(finding)


def replay(folder: Path, argv: list[str]) -> Finding:
    """Run the step that `folder` holds again, with options that override its config. Raises ConfigError."""
    if not (folder / "batch.npz").is_file():
        raise ConfigError(f"{folder} has no batch.npz; give a folder such as runs/NAME/nonfinite-STEP")
    cfg = options.parse(
        Config, argv, options.read(folder / "config.json"), "mintrain.numerics replay DIR", "Run a bad step again."
    )
    mesh = sharding.make_mesh(cfg.mesh)
    abstract, shapes = step.abstract_state(cfg, mesh), step.abstract_batch(cfg, mesh)
    sharding.validate(cfg.mesh, abstract.model)
    state = Checkpoints(folder / "checkpoints", keep=1).restore(abstract)
    arrays = np.load(folder / "batch.npz")
    for name, shape in vars(shapes).items():
        if arrays[name].size != math.prod(shape.shape) or arrays[name].shape[-1] != shape.shape[-1]:
            raise ConfigError(f"{folder} has {name} of shape {arrays[name].shape}, these options make {shape.shape}")
    batch = Batch(**{k: jax.device_put(arrays[k].reshape(x.shape), x.sharding) for k, x in vars(shapes).items()})
    return find(cfg, mesh, state, batch)


def main(argv: list[str]) -> int:
    """Exit code 0 if every number is finite, 1 if not, 2 for a wrong command."""
    try:
        if argv[:1] == ["study"] and len(argv) <= 2:
            from mintrain import study

            study.main(Path(argv[1] if argv[1:] else "runs/study"))
            return 0
        if len(argv) < 2 or argv[0] != "replay":
            raise ConfigError(
                "usage: python -m mintrain.numerics replay runs/NAME/nonfinite-STEP [options of train.py], "
                "or python -m mintrain.numerics study [FOLDER]"
            )
        finding = replay(Path(argv[1]), argv[2:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(finding)
    return 0 if finding.finite else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
