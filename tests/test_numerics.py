"""The first number that is not finite is found where it was planted, and the parameters are as they were."""

import dataclasses
import subprocess
import sys
from functools import lru_cache

import faults
import jax
import numpy as np
import pytest
import tiny

from mintrain import numerics, observe, sharding, step
from mintrain.config import Mesh

EIGHT = {"gemma": Mesh(fsdp=2, tensor=2, context=2), "deepseek": Mesh(fsdp=2, expert=2, tensor=2)}


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    faults.plant(monkeypatch)


@lru_cache(maxsize=1)
def built(family: str, eight: bool, scan: bool):
    """Config, mesh, state, batch and the step. Nothing is donated."""
    observe._functions.clear()  # a process can map only so many compiled programs
    jax.clear_caches()
    mesh = EIGHT[family] if eight else Mesh()
    cfg = dataclasses.replace(
        tiny.CONFIG, model=faults.MODELS[family], mesh=mesh, per_device_batch_size=8 / mesh.devices, scan_layers=scan
    )
    devices = sharding.make_mesh(cfg.mesh)
    state = step.new_state(cfg, devices)
    batch = tiny.on_mesh(cfg, devices, tiny.batch(0))
    return cfg, devices, state, batch, step.make_train_step(cfg, devices)


def copied(state: step.State) -> step.State:
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x).copy(), x.sharding), state)


# Every fault on one device with scanned layers, and on eight without.
FORMS = [(family, eight, not eight) for family in faults.FAULTS for eight in (False, True)]
CASES = [(*form, name) for form in FORMS for name in faults.FAULTS[form[0]]]


def label(case: tuple) -> str:
    family, eight, scan, *name = case
    where = f"{'8 devices' if eight else 'one device'}, {'scanned' if scan else 'unrolled'}"
    return ": ".join([f"{family}, {where}", *name])


@pytest.mark.slow
@pytest.mark.parametrize("form", [*FORMS, ("gemma", True, True)], ids=label)
def test_a_healthy_step_is_finite_and_makes_nothing_that_is_not(form):
    cfg, mesh, state, batch, _ = built(*form)
    assert numerics.find(cfg, mesh, state, batch).finite


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_operation_and_the_layer_of_a_fault_are_found_and_no_parameter_changes(case):
    family, eight, scan, name = case
    cfg, mesh, state, batch, train_step = built(family, eight, scan)
    fault = faults.FAULTS[family][name]
    state, batch = faults.plant_in(fault, state, batch)
    found = numerics.find(cfg, mesh, state, batch)
    assert found.first is not None, found
    assert found.first.name in fault.operations, str(found)
    assert (found.first.layer, found.first.module) == (fault.layer, fault.module), str(found)
    # A NaN that a layer's relu takes for 0 is first seen when the backward pass computes the layer again.
    assert fault.phase in found.first.phase, str(found)

    before = jax.tree.map(np.asarray, (state.model, state.opt))
    new, metrics = train_step(copied(state), batch)
    assert not metrics.finite and new.skipped == 1
    jax.tree.map(lambda old, new: np.testing.assert_array_equal(old, np.asarray(new)), before, (new.model, new.opt))


@pytest.mark.slow
@pytest.mark.parametrize("family", faults.FAULTS)
def test_a_fresh_process_replays_every_fault_and_says_the_same(family, tmp_path):
    cfg, mesh, state, batch, _ = built(family, False, True)
    said = {}
    for i, fault in enumerate(faults.FAULTS[family].values()):
        numerics.investigate(cfg, mesh, *faults.plant_in(fault, state, batch), i, tmp_path)
        said[i] = (tmp_path / f"nonfinite-{i}" / "report.txt").read_text()
    folders = [str(tmp_path / f"nonfinite-{i}") for i in said]
    done = subprocess.run([sys.executable, faults.__file__, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("=== ")[1:] == [f"{folder}\n{said[i]}" for i, folder in enumerate(folders)]
