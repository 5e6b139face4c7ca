"""The first number that is not finite is found where it was planted, and the parameters are as they were."""

import dataclasses
import subprocess
import sys

import faults
import jax
import numpy as np
import pytest
import tiny

from mintrain import numerics, observe, sharding, step
from mintrain.config import Mesh

EIGHT = {"gemma": Mesh(fsdp=2, tensor=2, context=2), "deepseek": Mesh(fsdp=2, expert=2, tensor=2)}


def copied(state: step.State) -> step.State:
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x).copy(), x.sharding), state)


def right(found: numerics.Finding, fault: faults.Fault) -> bool:
    first = found.first
    return (
        first is not None
        and first.name in fault.operations
        and (first.layer, first.module) == (fault.layer, fault.module)
        # A NaN that a layer's relu takes for 0 is first seen when the backward pass computes the layer again.
        and fault.phase in first.phase
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["one device, scanned", "8 devices, unrolled"])
@pytest.mark.parametrize("family", faults.FAULTS)
def test_every_fault_is_found_no_parameter_changes_and_a_fresh_process_says_the_same(
    family, form, tmp_path, monkeypatch
):
    """One program for all faults of a family, so that it is compiled once. Every third fault is replayed, and every
    fourth stands for all on eight devices.
    """
    observe._functions.clear()  # a process can map only so many compiled programs
    jax.clear_caches()
    faults.plant(monkeypatch)
    one = form.startswith("one")
    mesh = Mesh() if one else EIGHT[family]
    cfg = dataclasses.replace(
        tiny.CONFIG, model=faults.MODELS[family], mesh=mesh, per_device_batch_size=8 / mesh.devices, scan_layers=one
    )
    devices = sharding.make_mesh(cfg.mesh)
    healthy, healthy_batch = step.new_state(cfg, devices), tiny.on_mesh(cfg, devices, tiny.batch(0))
    assert numerics.find(cfg, devices, healthy, healthy_batch).finite
    train_step = step.make_train_step(cfg, devices)

    find, results = numerics.find, []
    monkeypatch.setattr(numerics, "find", lambda *args: results.append(find(*args)) or results[-1])
    planted = list(faults.FAULTS[family].items())
    assert len(planted) >= 16
    said, wrong = {}, {}
    for i, (name, fault) in enumerate(planted if one else planted[::4]):
        state, batch = faults.plant_in(fault, healthy, healthy_batch)
        if one:
            numerics.investigate(cfg, devices, state, batch, i, tmp_path)
            folder = tmp_path / f"nonfinite-{i}"
            said[folder] = (folder / "report.txt").read_text()
            assert said[folder] == f"{results[-1]}\n"
        else:
            numerics.find(cfg, devices, state, batch)
        found = results.pop()
        if not right(found, fault):
            wrong[name] = f"wanted {fault}, {found}"
        before = jax.tree.map(np.asarray, (state.model, state.opt))
        new, metrics = train_step(copied(state), batch)
        same = jax.tree.map(lambda old, new: np.array_equal(old, np.asarray(new)), before, (new.model, new.opt))
        if metrics.finite or new.skipped != 1 or not all(jax.tree.leaves(same)):
            wrong[f"{name}, step"] = f"finite {metrics.finite}, skipped {new.skipped}, unchanged {same}"
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())

    if one:
        said = dict(list(said.items())[::3])
        done = subprocess.run([sys.executable, faults.__file__, *said], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split("=== ")[1:] == [f"{folder}\n{text}" for folder, text in said.items()]
