"""The audit of the compiled program: on a program in its text form, and on what the TPU's compiler makes of a step."""

import dataclasses
import re
from textwrap import dedent

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType
from test_audit import PLANTED

from mintrain import audit, audit_hlo, plan, step
from mintrain.config import Data, Mesh, Model, Stage
from mintrain.sharding import AXES

PROGRAM = """\
    HloModule text, is_scheduled=true

    FileNames
    1 "/home/model.py"

    FunctionNames
    1 "logits"
    2 "softmax"

    FileLocations
    1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=4 end_column=9}
    2 {file_name_id=1 function_name_id=2 line=20 end_line=20 column=8 end_column=9}

    StackFrames
    1 {file_location_id=1 parent_frame_id=1}
    2 {file_location_id=2 parent_frame_id=1}


    %less (a: s32[], b: s32[], c: bf16[], d: bf16[]) -> pred[] {
      %a = s32[] parameter(0)
      %b = s32[] parameter(1)
      %c = bf16[] parameter(2)
      %d = bf16[] parameter(3)
      ROOT %lt = pred[] compare(%a, %b), direction=LT
    }

    %product (x: bf16[8,8], y: bf16[8,8]) -> f32[8,8] {
      %x = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0)
      %y = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(1)
      %dot.1 = WIDTH[8,8]{1,0:T(8,128)} convolution(%x, %y), dim_labels=bf_io->bf, metadata={stack_frame_id=1}
      ROOT %wide = f32[8,8]{1,0:T(8,128)} convert(%dot.1)
    }

    %sigmoid (z: f32[8,8]) -> f32[8,8] {
      %z = f32[8,8] parameter(0)
      %one = f32[] constant(1)
      %ones = f32[8,8] broadcast(%one), dimensions={}
      %neg = f32[8,8] negate(%z)
      %e = f32[8,8] exponential(%neg), metadata={stack_frame_id=1}
      %sum = f32[8,8] add(%e, %ones)
      ROOT %ratio = f32[8,8] divide(%ones, %sum)
    }

    %body (carry: (s32[], f32[8,8], f32[8,8])) -> (s32[], f32[8,8], f32[8,8]) {
      %carry = (s32[], f32[8,8], f32[8,8]) parameter(0)
      %i = s32[] get-tuple-element(%carry), index=0
      %first = f32[8,8] get-tuple-element(%carry), index=1
      %second = f32[8,8] get-tuple-element(%carry), index=2
      %exp = f32[8,8] exponential(%second), metadata={stack_frame_id=2}
      ROOT %next = (s32[], f32[8,8], f32[8,8]) tuple(%i, %exp, %first)
    }

    %condition (state: (s32[], f32[8,8], f32[8,8])) -> pred[] {
      %state = (s32[], f32[8,8], f32[8,8]) parameter(0)
      ROOT %more = pred[] constant(true)
    }

    ENTRY %main (p: bf16[8,8], q: bf16[8,8], n: s32[8]) -> (s32[], f32[8,8], f32[8,8]) {
      %p = bf16[8,8] parameter(0)
      %q = bf16[8,8] parameter(1)
      %n = s32[8] parameter(2)
      %fusion.1 = f32[8,8] fusion(%p, %q), kind=kOutput, calls=%product
      %activation = f32[8,8] fusion(%fusion.1), kind=kLoop, calls=%sigmoid
      %moved = bf16[8] custom-call(%activation), custom_call_target="Narrow"
      %sort = (s32[8], bf16[8]) sort(%n, %moved), dimensions={0}, to_apply=%less, metadata={stack_frame_id=1}
      %zero = s32[] constant(0)
      %none = f32[8,8] custom-call(%fusion.1), custom_call_target="tpu_custom_call"
      %start = (s32[], f32[8,8], f32[8,8]) tuple(%zero, %fusion.1, %none)
      ROOT %while = (s32[], f32[8,8], f32[8,8]) while(%start), condition=%condition, body=%body
    }
"""


@pytest.mark.parametrize("width, name", [("f32", "float32"), ("bf16", "bfloat16")])
def test_a_product_is_followed_through_fusions_and_around_a_loop(width, name):
    """Not into a sigmoid, nor into what a sort only moves along, nor through a kernel."""
    (found,) = audit_hlo.audit(dedent(PROGRAM).replace("WIDTH", width))
    product = audit.Product(name, name, "/home/model.py:10:4 (logits)")
    assert found == audit.Finding("exponential", product, "/home/model.py:20:8 (softmax)")
    assert found.faulty == (name == "bfloat16")


def test_a_sort_ranks_what_its_comparator_compares_and_a_text_without_products_is_refused():
    text = dedent(PROGRAM).replace("WIDTH", "f32").replace("compare(%a, %b)", "compare(%c, %d)")
    assert {(f.sink, f.product.narrowest) for f in audit_hlo.audit(text)} >= {("choice", "bfloat16")}
    with pytest.raises(NotImplementedError, match=r"audit_hlo\.py"):
        audit_hlo.audit(text.replace("convolution(", "something(").replace("dot", "else"))


def compiled(model: Model, seq: int) -> list[audit.Finding]:
    """What is found in the program that the TPU's compiler makes of a step."""
    pytest.importorskip("libtpu", reason="the TPU's compiler is not installed")
    devices = plan.devices("v6e", "2x2")
    cfg = dataclasses.replace(tiny.CONFIG, model=model, compute_dtype="bfloat16", data=Data(seq_len=seq))
    cfg = dataclasses.replace(cfg, per_device_batch_size=1, mesh=Mesh(fsdp=len(devices)))
    axes = (AxisType.Explicit,) * len(AXES)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(cfg.mesh.sizes), AXES, axis_types=axes)
    traced = step.make_train_step(cfg, mesh).trace(step.abstract_state(cfg, mesh), step.abstract_batch(cfg, mesh))
    return audit_hlo.audit(traced.lower().compile().as_text())


# One layer has all that the contract names: 16 keys of which 5 are chosen, attended to in the masked form.
SPARSE = dataclasses.replace(tiny.DEEPSEEK, stages=(Stage((tiny.SPARSE,)),), mtp=())
REACHED = {  # what the results of the planted products reach
    "attention logits": r"attend\.py:\d+.*masked_softmax",
    "indexer logits": r"indexer\.py:\d+.*top_mask",
    "router": r"router\.py:\d+.*choose",
    "final logits": r"loss\.py:\d+.*log_sum_exp",
}


@pytest.mark.plan
def test_the_compiled_step_of_a_sparse_model_is_float32_where_it_must_be():
    found = compiled(SPARSE, 16)
    assert not any(finding.faulty for finding in found)
    for place in REACHED.values():
        assert any(re.search(place, finding.where) for finding in found), place


@pytest.mark.plan
def test_the_compiled_step_with_attention_in_a_kernel_is_too():
    found = compiled(tiny.MODEL, 128)
    assert {re.search(r"\((.*)\)", f.where)[1] for f in found} == {"log_sum_exp", "target_statistics"}
    assert not any(finding.faulty for finding in found)


@pytest.mark.plan
def test_four_planted_faults_are_named_in_the_compiled_program(monkeypatch):
    for name in REACHED:
        monkeypatch.setattr(*PLANTED[name][:3])
    jax.clear_caches()
    faults = [finding for finding in compiled(SPARSE, 16) if finding.faulty]
    for name, place in REACHED.items():
        assert any(re.search(r"test_audit\.py:\d+", f.product.where) and re.search(place, f.where) for f in faults), (
            name
        )
    with pytest.raises(TypeError, match=r"of the compiled program: product at .*test_audit\.py:\d+.*bfloat16"):
        audit.proved(faults, "compiled")


@pytest.mark.plan
def test_a_softmax_input_that_is_rounded_is_named_in_the_compiled_program(monkeypatch):
    monkeypatch.setattr(*PLANTED["softmax input"][:3])
    jax.clear_caches()
    faults = [finding for finding in compiled(SPARSE, 16) if finding.faulty]
    assert any(re.search(r"attend\.py:\d+.*attention_logits", f.product.where) for f in faults)
    assert all(f.product.narrowest == "bfloat16" for f in faults)
