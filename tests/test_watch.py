"""What is watched is what the layers hold; it changes nothing, and does not depend on the mesh."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mintrain import metrics, sharding, step, watch
from mintrain.block import Aux
from mintrain.config import Config, Mesh
from mintrain.layers import attend

MODELS, ONE = {"gemma": tiny.GEMMA4, "deepseek": tiny.DEEPSEEK}, Mesh()


def watched_step(cfg: Config, mesh: Mesh = ONE, watched: bool = True) -> tuple[step.State, step.Metrics]:
    cfg = dataclasses.replace(cfg, mesh=mesh, per_device_batch_size=8 / mesh.devices)
    devices = sharding.make_mesh(cfg.mesh)
    batch = tiny.on_mesh(cfg, devices, tiny.batch(0))
    return step.make_train_step(cfg, devices, watched)(step.new_state(cfg, devices), batch)


def numbers(cfg: Config, mesh: Mesh = ONE) -> dict[str, list[float | None]]:
    return watch.by_layer(cfg.model, watched_step(cfg, mesh)[1].seen)


@pytest.mark.parametrize("name", MODELS)
def test_a_watched_step_trains_as_one_that_is_not(name):
    cfg = dataclasses.replace(tiny.CONFIG, model=MODELS[name])
    (watched, seen), (plain, told) = watched_step(cfg), watched_step(cfg, watched=False)
    assert told.seen is None and seen.seen is not None
    np.testing.assert_allclose(seen.loss, told.loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), watched.model, plain.model)


@pytest.mark.parametrize("name", MODELS)
def test_norms_by_module_add_up_to_the_norm_of_the_whole_gradient(name):
    cfg = dataclasses.replace(tiny.CONFIG, model=MODELS[name])
    _, result = watched_step(cfg)
    parts = jax.tree.leaves((result.seen.gradients, result.seen.outside))
    np.testing.assert_allclose(np.sqrt(sum(np.sum(np.square(x)) for x in parts)), result.grad_norm, rtol=1e-5)


@pytest.mark.parametrize(
    "name, mesh, change",
    [
        ("gemma", Mesh(fsdp=2, context=4), {}),
        ("gemma", Mesh(fsdp=4, tensor=2), {"scan_layers": False}),
        ("deepseek", Mesh(expert=2, context=2, tensor=2), {"accumulate": 4}),
    ],
)
def test_what_is_watched_does_not_depend_on_mesh_scan_and_microbatches(name, mesh, change):
    cfg = dataclasses.replace(tiny.CONFIG, model=MODELS[name])
    one, many = numbers(cfg), numbers(dataclasses.replace(cfg, **change), mesh)
    assert list(one) == list(many)
    for key in one:
        if key != "expert_load" or "accumulate" not in change:
            np.testing.assert_allclose(np.array(one[key], float), np.array(many[key], float), rtol=2e-4, err_msg=key)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_and_entropies_are_those_of_a_plain_formula_in_float64(softcap):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=4, size=(2, 3, 1, 5, 7)).astype(np.float32)
    mask = rng.random((2, 5, 7)) < 0.6
    mask[1, 2] = False
    seen = attend.query_statistics(jnp.asarray(logits), jnp.asarray(mask), softcap)
    for b, n, q in np.ndindex(2, 3, 5):
        row = logits[b, n, 0, q][mask[b, q]].astype(np.float64)
        capped = row if softcap is None else softcap * np.tanh(row / softcap)
        weights = np.exp(capped) / np.sum(np.exp(capped)) if row.size else row
        expected = np.max(np.abs(row), initial=0), -np.sum(weights * np.log(weights))
        np.testing.assert_allclose(seen[b, n, 0, q], expected, rtol=1e-5, atol=1e-6)


def test_logits_are_found_in_the_layer_whose_queries_are_large():
    cfg = dataclasses.replace(tiny.CONFIG, model=tiny.MODEL)
    mesh = sharding.make_mesh(cfg.mesh)
    state, batch = step.new_state(cfg, mesh), tiny.on_mesh(cfg, mesh, tiny.batch(0))
    before = numbers(cfg)["attention_logit"]
    scale = state.model.stages[0][1].attention.q_norm.scale  # layers 1 and 3
    large = scale.at[1].set(999.0)
    where = lambda s: s.model.stages[0][1].attention.q_norm.scale
    _, result = step.make_train_step(cfg, mesh, True)(eqx.tree_at(where, state, large), batch)
    seen = watch.by_layer(cfg.model, result.seen)
    np.testing.assert_allclose(seen["attention_logit"][:3], before[:3], rtol=1e-4)
    assert seen["attention_logit"][3] > 200 * before[3]
    (name, line), *_ = watch.past_bounds(seen)
    assert name == "attention_logit" and "in layer 3 is past 100" in line


def test_values_near_the_limits_of_bfloat16_are_counted():
    x = jnp.array([[1.0, 0.0, 3e38, -3e38], [1e-37, 1e-30, 1e30, 5.0]], jnp.bfloat16)
    recorded = watch.layer(lambda x: (x, Aux()), True)
    _, aux = recorded(x)
    assert float(aux.seen["near_limit"]) == 3 / 8


def test_a_run_writes_its_layers_draws_them_and_says_once_what_grows_past_a_bound(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = dataclasses.replace(tiny.CONFIG, run="watched")
    log = metrics.Log(metrics.open_run(cfg), 0, cfg, None)
    for at, logit in ((10, 5.0), (20, 250.0), (30, 260.0)):
        log.watched(at, {"attention_logit": [1.0, logit], "router_logit": [None, 2.0]})
    log.plot()
    said = capsys.readouterr().out
    assert said.count("past 100") == 1 and "step 20: attention_logit 250 in layer 1" in said
    records = [json.loads(line) for line in (log.folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["layers"]["attention_logit"][1] for record in records] == [5.0, 250.0, 260.0]
    assert (log.folder / "layers.png").stat().st_size > 5000
