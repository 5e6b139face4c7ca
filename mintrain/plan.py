"""`--plan TOPOLOGY`: the whole train step compiled by the TPU's own compiler, on a machine without a TPU.

Memory is the compiler's, and the program it made is audited as the traced one is. FLOPs and collectives are counted in
the traced program, per device (costs.py). The step time is a prediction and no measurement: the largest of the
products' FLOPs, three times the arguments (the state is read and written, gradients are written; activations are left
out) and what collectives receive, each over the chip's rate.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mintrain import audit_hlo, options
from mintrain.audit import audit, proved
from mintrain.config import Config, ConfigError, Mesh
from mintrain.costs import count_collectives, forward_flops, matmul_flops
from mintrain.sharding import AXES, arrange, bytes_per_device, describe, validate
from mintrain.step import abstract_batch, abstract_state, make_train_step

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; a v7x chip is two. From the cloud's documentation of each generation."""

    memory: float  # GiB that the compiler may use
    flops: float  # bfloat16, a second
    bandwidth: float  # bytes of memory a second
    links: float  # bytes a second into a device, half of what is documented for both directions of all links
    dims: int  # of the torus
    devices: int = 1  # a chip


CHIPS = {
    "v5e": Chip(15.75, 197e12, 819e9, 100e9, 2),
    "v5p": Chip(95.74, 459e12, 2765e9, 300e9, 3),
    "v6e": Chip(31.25, 918e12, 1640e9, 224e9, 2),
    "tpu7x": Chip(94.75, 1153e12, 3690e9, 300e9, 3, devices=2),
}


class Plan(NamedTuple):
    run: str
    topology: str
    devices: int
    mesh: str
    fits: bool
    memory_gib: dict[str, float]
    available_gib: float
    flops: dict[str, float]
    collectives: dict[str, list[float]]  # calls and received bytes of a device in a step
    gathers: dict[str, int]  # places of the compiled program: those that run beside products, and those that do not
    compile_s: float
    predicted: dict[str, float]
    proved: dict[str, int]  # paths to an exponential or a choice; none compiled if it does not fit


def parse(name: str) -> tuple[str, str]:
    """Generation and torus of a topology: "v6e-32" and "v6e:4x8" are ("v6e", "4x8").

    The cloud counts chips, and on v5p the two cores of each. Raises ConfigError for what does not exist.
    """
    found = re.fullmatch(r"(\w+?)(?:-(\d+)|:(\d+(?:x\d+){1,2}))", name)
    if not found or found[1] not in CHIPS:
        raise ConfigError(f"--plan {name}: no such topology; use {', '.join(CHIPS)} as in v6e-32, v5p-256 or v6e:4x8")
    kind, count, torus = found.groups()
    if torus:
        return kind, torus
    chips, dims = int(count) // (2 if kind == "v5p" else 1), CHIPS[kind].dims
    exponent = max(chips, 1).bit_length() - 1
    if chips != 1 << exponent or (dims == 3 and chips < 4):
        raise ConfigError(
            f"--plan {name}: {chips} chips are no slice; use a power of two, or a torus such as {kind}:4x8"
        )
    sides = [1 << (exponent + i) // dims for i in range(dims)]  # 128 chips are 4 x 4 x 8
    return kind, "x".join(map(str, sides[::-1] if sides[0] == 1 else sides))


def devices(kind: str, torus: str) -> list[Any]:
    """Devices to compile for. Raises ConfigError without libtpu, or for a torus that the generation does not have."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    name, sides = f"{kind}:{torus}", list(map(int, torus.split("x")))
    host = [min(2, side) for side in sides[:2]] + [1]  # chips of a machine: 2 x 2, or what there is
    try:
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=host)
        return list(slice_.devices)
    except Exception as error:  # jax raises whatever the plugin raises
        raise ConfigError(
            f"--plan {name} cannot be compiled for: {str(error).splitlines()[0][:200]}; it needs a torus that exists, "
            'and pip install "jax[tpu]"'
        ) from error


def on_slice(cfg: Config, name: str) -> Config:
    """`cfg` with a mesh over the whole slice: its own, or fsdp. Raises ConfigError if its own is of another size."""
    found = devices(*parse(name))
    if cfg.mesh == Mesh():
        cfg = replace(cfg, mesh=Mesh(fsdp=len(found)))
    if cfg.mesh.devices != len(found):
        raise ConfigError(f"--plan {name} has {len(found)} devices, mesh {describe(cfg.mesh)} has {cfg.mesh.devices}")
    return cfg


def make(cfg: Config, name: str) -> Plan:
    """Compile the step of `cfg` for a slice of as many devices as its mesh has."""
    kind, torus = parse(name)
    found, chip = devices(kind, torus), CHIPS[kind]
    mesh = arrange(cfg.mesh, found)
    state, batch = abstract_state(cfg, mesh), abstract_batch(cfg, mesh)
    validate(cfg.mesh, state.model)
    traced = make_train_step(cfg, mesh).trace(state, batch)
    paths = {"traced": len(proved(audit(traced.jaxpr)))}
    start = time.perf_counter()
    compiled = None
    try:
        compiled = traced.lower().compile()
        used = compiled.memory_analysis()
        arguments, peak = used.argument_size_in_bytes, used.peak_memory_in_bytes
    except jax.errors.JaxRuntimeError as error:
        arguments, peak = bytes_per_device(state) + bytes_per_device(batch), too_much(str(error))
        if peak is None:
            raise
    compile_s = time.perf_counter() - start
    gathers = {}
    if compiled is not None:
        text = compiled.as_text()
        paths["compiled"] = len(proved(audit_hlo.audit(text), "compiled"))
        gathers = overlap(text)
    memory = {
        "parameters": bytes_per_device(state.model),
        "optimizer": bytes_per_device(state.opt),
        "arguments": arguments,
        "temporaries": peak - arguments,
        "peak": peak,
    }
    collectives: dict[str, list[float]] = {}
    count_collectives(traced.jaxpr.jaxpr, dict(zip(AXES, cfg.mesh.sizes, strict=True)), 1, collectives)
    computed = matmul_flops(traced.jaxpr)
    needed = 3 * forward_flops(cfg, arrange(Mesh(), found[:1])) / len(found)
    received = sum(size for _, size in collectives.values())
    seconds = {
        "compute_s": computed / chip.flops,
        "memory_s": 3 * arguments / chip.bandwidth,
        "interconnect_s": received / chip.links,
    }
    step_s = max(seconds.values())
    tokens = cfg.batch_size * cfg.data.seq_len / step_s / (len(found) / chip.devices)
    return Plan(
        run=cfg.run,
        topology=f"{kind}:{torus}",
        devices=len(found),
        mesh=describe(cfg.mesh),
        fits=peak <= chip.memory * GIB,
        memory_gib={part: size / GIB for part, size in memory.items()},
        available_gib=chip.memory,
        flops={"computed": computed, "needed": needed},
        collectives=collectives,
        gathers=gathers,
        compile_s=compile_s,
        predicted={**seconds, "step_s": step_s, "mfu": needed / chip.flops / step_s, "tokens_per_s_and_chip": tokens},
        proved=paths,
    )


def too_much(error: str) -> float | None:
    """The bytes that the compiler says it needs where it refuses a program; it says so in one of two ways."""
    found = re.search(r"(?:Used |memory required for HLO temporaries \()([\d.]+)([MG])", error)
    return float(found[1]) * (GIB if found[2] == "G" else 1 << 20) if found else None


def overlap(program: str) -> dict[str, int]:
    """Gathers that run in parts inside the loops of products, a chain each, and those that run alone."""
    lines = [line for line in program.splitlines() if " all-gather(" in line or " all-gather-start(" in line]
    chains = {found[0] for line in lines if (found := re.search(r'chain_id="\d+"', line))}
    return {"overlapped": len(chains), "alone": sum("chain_id=" not in line for line in lines)}


def remedies(cfg: Config) -> Iterator[tuple[str, Config]]:
    """What needs less memory, each on top of those before, in the order of what it costs."""
    if cfg.remat != "full":
        cfg = replace(cfg, remat="full")
        yield "--remat full", cfg
    if cfg.optim.moments == "float32":
        cfg = replace(cfg, optim=replace(cfg.optim, moments="bfloat16"))
        yield "--optim.moments bfloat16", cfg
    mesh = cfg.mesh
    rows = cfg.batch_size // (mesh.replica * mesh.fsdp * mesh.expert)  # of one group of devices that share sequences
    if rows > cfg.accumulate:
        cfg = replace(cfg, accumulate=rows)
        yield f"--accumulate {rows}", cfg
    while mesh.fsdp % 2 == 0 and mesh.context < 8 and cfg.data.seq_len % (2 * mesh.context) == 0:
        mesh = replace(mesh, fsdp=mesh.fsdp // 2, context=2 * mesh.context)
        cfg = replace(cfg, mesh=mesh, per_device_batch_size=cfg.per_device_batch_size / 2)
        shares = f"--mesh.fsdp {mesh.fsdp} --mesh.context {mesh.context}"
        yield f"{shares} --per_device_batch_size {cfg.per_device_batch_size:g}", cfg


def what_fits(cfg: Config, name: str) -> Iterator[str]:
    """Compile one remedy after another until the step fits; a line for each. They add up."""
    for option, changed in remedies(cfg):
        plan = make(changed, name)
        over = plan.memory_gib["peak"] - plan.available_gib
        yield f"  {option:40}{plan.memory_gib['peak']:18.2f}, {'fits' if plan.fits else f'too much by {over:.1f}'}"
        if plan.fits:
            return
    yield "  nothing here is enough: use a larger slice, a shorter data.seq_len or a smaller model"


def largest(cfg: Config, name: str) -> Config:
    """`cfg` with the largest `per_device_batch_size` that fits. Raises ConfigError if none does.

    It doubles, then bisects; each try is a compilation and a line.
    """
    mesh = cfg.mesh
    unit = mesh.replica * mesh.fsdp * mesh.expert * cfg.accumulate / mesh.devices
    low, high, at = 0, None, max(round(cfg.per_device_batch_size / unit), 1)
    while high is None or high - low > 1:
        plan = make(replace(cfg, per_device_batch_size=at * unit), name)
        print(f"per_device_batch_size {at * unit:g}: {plan.memory_gib['peak']:.2f} GiB of {plan.available_gib:.2f}")
        low, high = (at, high) if plan.fits else (low, at)
        at = 2 * low if high is None else (low + high) // 2
    if low == 0:
        raise ConfigError(
            f"--fit: per_device_batch_size={unit:g} does not fit {name}; --plan without --fit says what would"
        )
    return replace(cfg, per_device_batch_size=low * unit)


def report(cfg: Config, name: str, fit: bool) -> tuple[str, bool]:
    """What a person wants to know, and whether it fits. Also written to runs/NAME/plan-TOPOLOGY.json.

    fit: for the largest batch that does.
    """
    cfg = on_slice(cfg, name)
    cfg = largest(cfg, name) if fit else cfg
    plan = make(cfg, name)
    folder = Path("runs") / cfg.run
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"plan-{plan.topology.replace(':', '-')}.json"
    file.write_text(json.dumps({**plan._asdict(), "config": json.loads(options.to_json(cfg))}, indent=1))
    gib, said = plan.memory_gib, plan.predicted
    verdict = "fits" if plan.fits else f"does not fit, by {gib['peak'] - plan.available_gib:.1f} GiB a device"
    size = f"{cfg.per_device_batch_size:g} x {cfg.data.seq_len} tokens a device"
    rows = [f"{plan.run} on {plan.topology}: {plan.devices} devices, mesh {plan.mesh}, {size}: {verdict}", ""]
    rows += [f"GiB a device, of {plan.available_gib:.2f}"] + [f"  {k:40}{v:18.2f}" for k, v in gib.items()]
    rows += ["", "a device and step"]
    rows += [f"  {'TFLOPs of matrix products':40}{plan.flops['computed'] / 1e12:18.2f}"]
    rows += [f"  {'of these, not computed twice':40}{plan.flops['needed'] / 1e12:18.2f}"]
    for kind, (calls, size) in sorted(plan.collectives.items()):
        rows.append(f"  {kind:30}{calls:8,} calls {size / GIB:14.2f} GiB received")
    if plan.gathers:
        beside = f"{plan.gathers['overlapped']} beside products, {plan.gathers['alone']} alone"
        rows.append(f"  places that gather in the compiled program: {beside}")
    paths = " and ".join(f"{count} in the {program} program" for program, count in plan.proved.items())
    rows += ["", f"compiled in {plan.compile_s:.0f} s; all paths to an exponential or a choice are float32: {paths}"]
    rows += ["", "predicted, not measured: the slowest of"]
    rows += [
        f"  {k.removesuffix('_s'):40}{said[k] * 1e3:15.1f} ms" for k in ("compute_s", "memory_s", "interconnect_s")
    ]
    rows += [
        f"  {'MFU':40}{said['mfu']:18.1%}",
        f"  {'tokens a second and chip':40}{said['tokens_per_s_and_chip']:18,.0f}",
    ]
    if not plan.fits:
        rows += ["", "what would fit, each option on top of those before (GiB a device)", *what_fits(cfg, name)]
    return "\n".join([*rows, "", str(file)]), plan.fits
