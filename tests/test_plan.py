"""Plans: the names of slices, what is counted in the traced program, and the real TPU compiler where there is one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mintrain import costs, plan, step
from mintrain.collectives import ragged_all_to_all
from mintrain.config import ConfigError, Mesh
from mintrain.sharding import AXES, abstract_mesh

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name, kind, torus",
    [
        *[("v6e-1", "v6e", "1x1"), ("v6e-8", "v6e", "2x4"), ("v6e-32", "v6e", "4x8"), ("v5e-256", "v5e", "16x16")],
        *[("v5p-8", "v5p", "2x2x1"), ("v5p-256", "v5p", "4x4x8"), ("tpu7x-128", "tpu7x", "4x4x8")],  # v5p counts cores
        ("v6e:2x4", "v6e", "2x4"),
    ],
)
def test_a_slice_by_the_clouds_name_is_its_torus(name, kind, torus):
    assert plan.parse(name) == (kind, torus)


@pytest.mark.parametrize("name", ["", "v9-8", "v6e", "v6e-12", "v5p-4", "v6e:4", "v6e-0"])
def test_a_slice_that_does_not_exist_is_one_line(name):
    with pytest.raises(ConfigError, match="--plan"):
        plan.parse(name)


def test_collectives_are_counted_through_scans_with_what_a_device_receives():
    """Of the tiny model's weights over fsdp 4, each matrix is gathered in both passes."""
    cfg = dataclasses.replace(tiny.CONFIG, mesh=Mesh(fsdp=4), per_device_batch_size=2, remat="full")
    mesh = abstract_mesh(cfg.mesh)
    state, batch = step.abstract_state(cfg, mesh), step.abstract_batch(cfg, mesh)
    jaxpr = step.make_train_step(cfg, mesh).trace(state, batch).jaxpr
    found: dict[str, list[float]] = {}
    costs.count_collectives(jaxpr.jaxpr, dict(zip(AXES, cfg.mesh.sizes, strict=True)), 1, found)
    blocks = [leaf for leaf in jax.tree.leaves(state.model.stages) if leaf.ndim > 2]  # matrices of all repeats
    layers = sum(4 * leaf.size for leaf in blocks)
    assert found["all_gather"][1] >= 2 * layers * 3 / 4  # of four parts, three come from others
    assert found["reduce_scatter"][1] >= layers / 4 * 3
    assert found["all_gather"][0] >= 2 * sum(leaf.shape[0] for leaf in blocks)


def test_rows_for_experts_are_counted_as_tpus_send_them_with_experts_used_alike():
    mesh = abstract_mesh(Mesh(expert=4))
    rows = jax.ShapeDtypeStruct((4 * 6, 10), np.float32, sharding=NamedSharding(mesh, P("expert", None)))
    sizes = jax.ShapeDtypeStruct((4, 4), np.int32, sharding=NamedSharding(mesh, P(None, None)))

    def there_and_back(rows, sizes):
        return ragged_all_to_all(ragged_all_to_all(rows, sizes, 24, "expert"), sizes.T, 6, "expert")

    sides = dict(in_specs=(P("expert"), P()), out_specs=P("expert"))
    jaxpr = jax.make_jaxpr(jax.shard_map(there_and_back, mesh=mesh, **sides))(rows, sizes)
    found: dict[str, list[float]] = {}
    costs.count_collectives(jaxpr.jaxpr, {"expert": 4}, 1, found)
    assert found == {"ragged_all_to_all": [2, 2 * 6 * 10 * 4 * 3 / 4]}


def planned(cfg, gib: float) -> plan.Plan:
    """A plan of which only the memory is read."""
    return plan.Plan("", "", 4, "", gib <= 16, {"peak": gib}, 16, {}, {}, {}, 0, {}, {})


@settings(max_examples=50, deadline=None)
@given(start=st.integers(1, 40), most=st.integers(1, 100), accumulate=st.sampled_from([1, 3]))
def test_fit_finds_the_largest_batch_that_fits(start, most, accumulate):
    mesh = Mesh(fsdp=2, context=2)
    unit = accumulate / 2
    cfg = dataclasses.replace(tiny.CONFIG, mesh=mesh, accumulate=accumulate, per_device_batch_size=start * unit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "make", lambda cfg, _: planned(cfg, 16 / most * cfg.per_device_batch_size / unit - 1e-6))
        assert plan.largest(cfg, "v6e-4").per_device_batch_size == most * unit
        patch.setattr(plan, "make", lambda cfg, _: planned(cfg, 17))
        with pytest.raises(ConfigError, match="--fit"):
            plan.largest(cfg, "v6e-4")


def test_what_does_not_fit_is_told_what_would_until_it_does(monkeypatch):
    cfg = dataclasses.replace(tiny.CONFIG, mesh=Mesh(fsdp=4), per_device_batch_size=2, remat="dots")
    tried = []

    def make(cfg, _):
        tried.append(cfg)
        return planned(cfg, 20 - len(tried))

    monkeypatch.setattr(plan, "make", make)
    lines = list(plan.what_fits(cfg, "v6e-4"))
    assert [line.split()[0] for line in lines] == ["--remat", "--optim.moments", "--accumulate", "--mesh.fsdp"]
    assert "too much by 3.0" in lines[0] and lines[-1].endswith("fits")
    last = tried[-1]
    assert (last.remat, last.optim.moments, last.accumulate) == ("full", "bfloat16", 2)
    assert last.mesh == Mesh(fsdp=2, context=2) and last.batch_size == cfg.batch_size // 2


def test_gathers_beside_products_are_told_from_those_that_stand_alone():
    chain = '  %all-gather.{} = bf16[8,4] all-gather(%x), dimensions={{0}}, frontend_attributes={{chain_id="{}"}}'
    program = "\n".join([chain.format(1, 7), chain.format(2, 7), chain.format(3, 8), "  %y = f32[8] all-gather(%z)"])
    assert plan.overlap(program) == {"overlapped": 2, "alone": 1}


def test_the_compiler_knows_slices_of_every_size_down_to_one_chip(tmp_path):
    pytest.importorskip("libtpu")
    script = """
from mintrain import plan
for name in ("v6e-1", "v6e-2", "v6e-4", "v6e-32", "v5p-8", "v5p-256", "tpu7x-8", "v5e:1x1"):
    print(len(plan.devices(*plan.parse(name))))
"""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "2", "4", "32", "4", "128", "16", "1"], done.stderr


def test_any_mesh_is_laid_over_a_torus_and_replicas_over_slices(tmp_path):
    """Also where an axis is no side of the torus, which `jax.make_mesh` refuses, as it does slices."""
    pytest.importorskip("libtpu")
    script = """
from jax.experimental import topologies
from mintrain import plan
from mintrain.config import ConfigError, Mesh
from mintrain.sharding import arrange

pod = plan.devices("v6e", "4x8")
for mesh in (Mesh(fsdp=32), Mesh(fsdp=2, expert=16), Mesh(fsdp=4, context=2, tensor=4)):
    laid = arrange(mesh, pod)
    print(laid.devices.shape == mesh.sizes, len(set(laid.devices.flat)))
sides = dict(topology_name="v6e:2x2", chips_per_host_bounds=[2, 2, 1])
two = topologies.get_topology_desc(platform="tpu", num_slices=2, **sides)
print([{d.slice_index for d in replica.flat} for replica in arrange(Mesh(replica=4, fsdp=2), two.devices).devices])
try:
    arrange(Mesh(fsdp=8), two.devices)
except ConfigError as error:
    print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        *["True 32"] * 3,
        "[{0}, {0}, {1}, {1}]",
        "mesh.replica=1 cannot be divided among 2 slices; use 2",
    ], done.stderr


def test_what_the_compiler_says_of_too_little_memory_is_read_in_both_of_its_forms():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (33.84G) exceeds"
    )
    assert plan.too_much(f"{said} available HBM (31.25G).") == 33.84 * 2**30
    said = "Ran out of memory in memory space hbm. Used 512.50M of 31.25G hbm. Exceeded hbm capacity by 1.00M."
    assert plan.too_much(said) == 512.5 * 2**20
    assert plan.too_much("INTERNAL: something else") is None


@pytest.mark.plan
@pytest.mark.slow
def test_a_fault_that_only_the_compiled_program_shows_fails_the_plan(tmp_path):
    """With the audit of the traced step left out, what is left is that of the optimized program."""
    pytest.importorskip("libtpu")
    script = """
import jax.numpy as jnp
from mintrain import options, plan
from mintrain.layers import attend
plan.audit = lambda jaxpr: []
product = lambda q, k, scale, cap: (jnp.einsum("bngqh,bnkh->bngqk", q, k) * scale).astype(jnp.float32)
attend.attention_logits = product
cfg, *_ = options.load(["CONFIG", "--compute_dtype", "bfloat16"])
plan.make(plan.on_slice(cfg, "v6e-4"), "v6e-4")
"""
    script = script.replace("CONFIG", str(ROOT / "configs" / "tiny_gemma4.py"))
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "of the compiled program" in done.stderr, done.stderr
    assert "<string>:6" in done.stderr or "dot_general" in done.stderr


@pytest.mark.plan
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options", [("tiny_gemma4", []), ("tiny_deepseek", ["--mesh.expert", "2", "--mesh.fsdp", "2"])]
)
def test_the_tpu_compiler_compiles_the_whole_step(name, options, tmp_path):
    pytest.importorskip("libtpu")
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        str(ROOT / "configs" / f"{name}.py"),
        "--plan",
        "v6e-4",
        *options,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 devices, mesh" in done.stdout and ": fits" in done.stdout
    saved = json.loads((tmp_path / "runs" / name / "plan-v6e-2x2.json").read_text())
    assert 0 < saved["memory_gib"]["arguments"] < saved["memory_gib"]["peak"] < 1
    assert saved["collectives"]["all_gather"][1] > 0 and 0 < saved["predicted"]["mfu"] < 1
    assert saved["gathers"]["overlapped"] + saved["gathers"]["alone"] > 0
    assert saved["proved"]["traced"] > 0 and saved["proved"]["compiled"] > 0
    assert ("ragged_all_to_all" in saved["collectives"]) == (name == "tiny_deepseek")
