"""The audit of the traced step sees what types on functions cannot: a bfloat16 product that is cast up afterwards."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from mintrain import audit, check, loss, step
from mintrain.config import Config, Data, Mesh, Stage
from mintrain.layers import attend, router, sparse, splash
from mintrain.sharding import abstract_mesh


def findings(model, **changes) -> list[audit.Finding]:
    cfg: Config = dataclasses.replace(tiny.CONFIG, model=model, compute_dtype="bfloat16", **changes)
    mesh = abstract_mesh(cfg.mesh)
    state, batch = step.abstract_state(cfg, mesh), step.abstract_batch(cfg, mesh)
    return audit.audit(step.make_train_step(cfg, mesh).trace(state, batch).jaxpr)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(scan_layers=False, remat="dots"),
        dict(mesh=Mesh(expert=2, context=2, tensor=2), per_device_batch_size=1),
        dict(indexer="warmup"),
    ],
    ids=["scanned", "unrolled", "mesh", "warm-up"],
)
def test_every_product_that_reaches_an_exponential_or_a_choice_is_found_and_is_float32(changes):
    found = findings(tiny.DEEPSEEK, **changes)
    assert not any(finding.faulty for finding in found)
    reached = {(re.search(r"\((.*?)\)", f.product.where)[1], f.sink) for f in found}
    wanted = {("attention_logits", "exponential"), ("indexer_logits", "exponential")}
    if changes != dict(indexer="warmup"):  # which trains no language model and chooses no keys
        wanted |= {("output_logits", "exponential"), ("indexer_logits", "choice"), ("gathered_logits", "exponential")}
    assert wanted | {("router_logits", "choice")} <= reached


def test_a_softmax_router_and_soft_caps_are_followed():
    found = findings(tiny.GEMMA4)
    reached = {(re.search(r"\((.*?)\)", f.product.where)[1], f.sink) for f in found}
    assert {
        ("router_logits", "exponential"),
        ("router_logits", "choice"),
        ("attention_logits", "exponential"),
    } <= reached
    assert not any(finding.faulty for finding in found)


def narrow(subscripts):
    """A product in bfloat16, cast up: every declared type holds."""

    def product(x, y, *_):
        return jnp.einsum(subscripts, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)).astype(jnp.float32)

    return product


def narrowed(function):
    return lambda logits, mask: function(logits.astype(jnp.bfloat16).astype(jnp.float32), mask)


PLANTED = {  # where, what instead, and which function the product is then in
    "attention logits": (sparse, "attention_logits", narrow("bngqh,bnkh->bngqk"), "product"),
    "softmax input": (sparse, "masked_softmax", narrowed(attend.masked_softmax), "attention_logits"),
    "indexer logits": (sparse, "indexer_logits", narrow("bqnd,bkd->bnqk"), "product"),
    "router": (router, "router_logits", narrow("td,de->te"), "product"),
    "final logits": (loss, "output_logits", narrow("td,vd->tv"), "product"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_named_with_file_and_line(name, monkeypatch):
    module, function, instead, where = PLANTED[name]
    monkeypatch.setattr(module, function, instead)
    jax.clear_caches()
    faults = [finding for finding in findings(tiny.DEEPSEEK) if finding.faulty]
    file = "attend.py" if where == "attention_logits" else "test_audit.py"
    assert any(re.search(rf"{file}:\d+", finding.product.where) for finding in faults)
    assert all(finding.product.narrowest == "bfloat16" for finding in faults)
    cfg = dataclasses.replace(tiny.CONFIG, model=tiny.DEEPSEEK, compute_dtype="bfloat16", run="planted")
    with pytest.raises(TypeError, match=rf"{file}:\d+.* \(.*bfloat16.*\) reaches the (exponential|choice) at"):
        check.report(cfg)


def test_dense_latent_attention_is_audited_too(monkeypatch):
    attention = dataclasses.replace(tiny.DENSE.attention, indexer=None)
    layer = dataclasses.replace(tiny.DENSE, attention=attention)
    model = dataclasses.replace(tiny.DEEPSEEK, stages=(Stage((layer,)),), mtp=())
    assert not any(finding.faulty for finding in findings(model))
    monkeypatch.setattr(attend, "attention_logits", narrow("bngqh,bnkh->bngqk"))
    jax.clear_caches()
    assert any(finding.faulty for finding in findings(model))


KERNEL = r"splash_attention_kernel\.py:\d+.* in splash_mqa_{} at .*splash_attention_kernel\.py:\d+$"
SPLASH = dict(data=Data(seq_len=128), per_device_batch_size=1)


def test_the_products_inside_the_attention_kernels_are_found(monkeypatch):
    """Forward and both backward kernels; the log-sum-exp goes from the first to the others. One layer has soft caps."""
    monkeypatch.setattr(attend, "fits", lambda run: run % splash.LANES == 0)
    found = findings(tiny.MODEL, **SPLASH)
    assert not any(finding.faulty for finding in found)
    for source, sink in [("fwd", "fwd"), ("dq", "dq"), ("dkv", "dkv"), ("fwd", "dq"), ("fwd", "dkv")]:
        pair = [re.compile(KERNEL.format(rf"{kernel}\w*")) for kernel in (source, sink)]
        assert any(pair[0].search(f.product.where) and pair[1].search(f.where) for f in found), (source, sink)


def test_a_fault_planted_in_the_attention_kernel_is_named(monkeypatch):
    def product(x, y, dims, preferred_element_type=None):
        narrow = dims == splash_attention_kernel.NT_DIM_NUMBERS and x.dtype == jnp.bfloat16  # q·k and dO·v
        out = jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.bfloat16 if narrow else preferred_element_type)
        return out.astype(jnp.float32) if narrow else out

    monkeypatch.setattr(attend, "fits", lambda run: run % splash.LANES == 0)
    monkeypatch.setattr(
        splash_attention_kernel, "lax", types.SimpleNamespace(**{**vars(jax.lax), "dot_general": product})
    )
    jax.clear_caches()
    faults = [finding for finding in findings(tiny.MODEL, **SPLASH) if finding.faulty]
    assert any(re.search(KERNEL.format(r"fwd\w*"), finding.product.where) for finding in faults)
    with pytest.raises(TypeError, match=r"\(bfloat16\) reaches the exponential at .* in splash_mqa_fwd"):
        audit.proved(faults)


def test_what_a_kernel_keeps_between_steps_of_its_grid_is_followed():
    """The exponential stands before the product in the kernel: only a later step sees what this one has stored."""

    def kernel(x, y, out, kept):
        out[...] = jnp.exp(kept[...])
        kept[...] = (x[...] @ y[...]).astype(jnp.float32)

    def call(dtype):
        square = jnp.zeros((128, 128), dtype)
        scratch = [pltpu.VMEM((128, 128), jnp.float32)]
        shape = jax.ShapeDtypeStruct((128, 128), jnp.float32)
        return pl.pallas_call(kernel, grid=(2,), out_shape=shape, scratch_shapes=scratch)(square, square)

    for dtype in ("bfloat16", "float32"):
        (found,) = audit.audit(jax.make_jaxpr(call, static_argnums=0)(dtype))
        assert found.faulty == (dtype == "bfloat16") and found.product.dtype == dtype
        assert re.search(r"test_audit\.py:\d+.* in kernel at .*test_audit\.py:\d+", found.product.where)
