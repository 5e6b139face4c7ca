"""The first number that is not finite is found where it was planted, and the parameters are as they were."""

import dataclasses
from functools import cache

import faults
import jax
import numpy as np
import pytest
import tiny

from mintrain import numerics, sharding, step


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    faults.plant(monkeypatch)


@cache
def built():
    """Config, mesh, state, batch and the step. Compiled once for all faults."""
    cfg = dataclasses.replace(tiny.CONFIG, model=faults.MODEL)
    mesh = sharding.make_mesh(cfg.mesh)
    return cfg, mesh, step.new_state(cfg, mesh), tiny.on_mesh(cfg, mesh, tiny.batch(0)), step.make_train_step(cfg, mesh)


def copied(state: step.State) -> step.State:
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x).copy(), x.sharding), state)


@pytest.mark.slow
def test_a_healthy_step_is_finite_and_makes_nothing_that_is_not():
    cfg, mesh, state, batch, _ = built()
    assert numerics.find(cfg, mesh, state, batch).finite


@pytest.mark.slow
@pytest.mark.parametrize("name", faults.FAULTS)
def test_the_operation_and_the_layer_of_a_fault_are_found_and_no_parameter_changes(name):
    cfg, mesh, state, batch, train_step = built()
    fault = faults.FAULTS[name]
    state, batch = faults.plant_in(fault, state, batch)
    found = numerics.find(cfg, mesh, state, batch)
    assert found.first is not None, found
    assert found.first.name in fault.operations, str(found)
    assert (found.first.layer, found.first.module, found.first.phase) == (fault.layer, fault.module, fault.phase)

    before = jax.tree.map(np.asarray, (state.model, state.opt))
    new, metrics = train_step(copied(state), batch)
    assert not metrics.finite and new.skipped == 1
    jax.tree.map(lambda old, new: np.testing.assert_array_equal(old, np.asarray(new)), before, (new.model, new.opt))
