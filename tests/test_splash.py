"""The kernel that TPUs run, interpreted on this machine, against the plain form: values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mintrain import context, sharding
from mintrain.collectives import all_gather
from mintrain.config import Mesh
from mintrain.costs import matmul_flops
from mintrain.layers import attend, splash
from mintrain.layers.attend import Places

BATCH, SCALE = 2, 1 / 8


def places(length: int) -> Places:
    """Packed documents that end inside blocks and at their edges, and padding at the end of the second row."""
    starts = np.zeros((BATCH, length), bool)
    starts[0, [0, 37, 128, 200]] = starts[1, [0, 90]] = True
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    at = np.arange(length, dtype=np.int32)
    positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    segments[1, -50:] = positions[1, -50:] = 0
    return Places(jnp.asarray(positions, jnp.int32), jnp.asarray(segments))


def plain(at: Places, softcap: float | None, window: int | None, q, k, v):
    mask = attend.visible(at.positions, at.positions, at.segments, at.segments, window)
    return jnp.moveaxis(attend.attend(jnp.moveaxis(q, 1, 3), k, v, mask, SCALE, softcap), 3, 1)


def fused(cfg: Mesh, at: Places, softcap: float | None, window: int | None, q, k, v):
    """The same in the kernel, on a mesh."""
    mesh = sharding.make_mesh(cfg)
    order = tiny.dealt(q.shape[1], cfg.context)

    def inside(q, k, v, positions, segments):
        gathered = "batch heads/tensor key/context head -> batch heads/tensor key head"
        k, v = (context.in_order(all_gather(gathered, x), axis=2) for x in (k, v))
        whole = lambda x: context.in_order(all_gather("batch key/context -> batch key", x), axis=1)
        where = Places(positions, segments), Places(whole(positions), whole(segments))
        starts = context.starts(q.shape[1])
        return attend.attend_places(q, k, v, *where, SCALE, softcap, window, starts)

    specs = (P("fsdp", "context", "tensor"), *[P("fsdp", "tensor", "context")] * 2, *[P("fsdp", "context")] * 2)
    arrays = q[:, order], k[:, :, order], v[:, :, order], at.positions[:, order], at.segments[:, order]
    arrays = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    out = jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=specs[0])(*arrays)
    return jax.sharding.reshard(out, NamedSharding(mesh, P()))[:, np.argsort(order)]


def compare(monkeypatch, dtype, mesh, length, heads, group, head, value, softcap, window) -> tuple[float, float]:
    """The root mean squares of what values and gradients differ by, relative to those of the plain form in float32."""
    monkeypatch.setattr(attend, "fits", lambda run: run % splash.LANES == 0)
    monkeypatch.setattr(splash, "BLOCK", 256)
    draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
    arrays = [draw(0, BATCH, length, heads, group, head)]
    arrays += [draw(1, BATCH, heads, length, head), draw(2, BATCH, heads, length, value)]
    weights = np.random.default_rng(3).normal(size=(BATCH, length, heads, group, value)).astype(np.float32)
    at = places(length)

    def both(form, arrays):
        total = lambda *arrays: (
            jnp.sum((out := form(at, softcap, window, *arrays)).astype(jnp.float32) * weights),
            out,
        )
        (_, out), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return [np.asarray(x, np.float64) for x in (out, *grads)]

    exact = both(plain, [x.astype(jnp.float32) for x in arrays])
    ours = both(partial(fused, mesh), arrays)
    assert not ours[0][1, -50:].any() and not ours[1][1, -50:].any()  # padding is exactly 0, and so are its gradients
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, exact, strict=True)]
    return errors[0], max(errors[1:])


CASES = {
    "one key head for two queries, all keys": (dict(mesh=Mesh()), dict(heads=2, group=2, head=64, value=64)),
    "soft caps": (dict(softcap=5.0), dict(heads=2, group=3, head=64, value=64)),
    "window of two": (dict(window=2), dict(heads=1, group=2, head=32, value=32)),
    "window that ends in a block": (dict(window=70, softcap=5.0), dict(heads=2, group=2, head=64, value=64)),
    "window of a block": (dict(window=128), dict(heads=2, group=1, head=128, value=128)),
    "window beyond the sequence": (dict(window=1000), dict(heads=1, group=2, head=64, value=64)),
    "latent attention": (dict(), dict(heads=3, group=1, head=192, value=128)),
    "head_dim 256, local": (dict(window=100), dict(heads=1, group=2, head=256, value=256)),
    "head_dim 512, global": (dict(), dict(heads=1, group=2, head=512, value=512)),
    "uneven length": (dict(window=200), dict(heads=1, group=2, head=64, value=64, length=640)),
    "on a mesh": (dict(mesh=Mesh(fsdp=2, context=2, tensor=2)), dict(heads=2, group=2, head=64, value=64, length=512)),
    "window on a mesh": (
        dict(mesh=Mesh(fsdp=2, context=2, tensor=2), window=150),
        dict(heads=2, group=2, head=64, value=64, length=512),
    ),
}


ROUNDED = ("soft caps", "latent attention", "window on a mesh")  # the rules are the same in both dtypes


@pytest.mark.parametrize(
    "case, dtype", [*((case, "float32") for case in CASES), *((case, "bfloat16") for case in ROUNDED)]
)
def test_the_kernel_gives_the_plain_forms_values_and_gradients(case, dtype, monkeypatch):
    how = dict(mesh=Mesh(), softcap=None, window=None, length=384) | CASES[case][0] | CASES[case][1]
    value, gradient = compare(monkeypatch, dtype, **how)
    assert value < (1e-5 if dtype == "float32" else 2e-3)
    assert gradient < (1e-5 if dtype == "float32" else 2e-2)


# The whole sequence, and one of two parts.
@pytest.mark.parametrize("run, window", [(2048, None), (2048, 300), (1024, None), (1024, 600)])
def test_the_flops_of_the_kernels_are_those_of_the_blocks_that_they_visit(window, run):
    length, heads, head, block = 2048, 6, 64, splash.BLOCK
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    arrays = shape(1, 2, heads // 2, run, head), *[shape(1, 2, length, head)] * 2
    rest = shape(1, run, dtype=jnp.int32), shape(1, length, dtype=jnp.int32), shape(dtype=jnp.int32)
    forward = lambda *arrays: jnp.sum(
        splash.splash_attention(*arrays, 1.0, None, window).astype(jnp.float32), dtype=jnp.float32
    )
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        counted = matmul_flops(jax.jit(forward).trace(*arrays, *rest).jaxpr)
        both = matmul_flops(jax.jit(jax.grad(forward, argnums=(0, 1, 2))).trace(*arrays, *rest).jaxpr)

    place = np.arange(length)
    seen = place[:, None] >= place
    if window is not None:
        seen &= place[:, None] - place < window
    visited = seen.reshape(length // block, block, length // block, block).any(axis=(1, 3)).sum() * block**2
    products = 2 * 2 * heads * head * run / length  # q·k and p·v of a pair of query and key
    assert counted == products * visited  # of the closed form, up to what the blocks' edges add
    assert products * seen.sum() <= counted <= products * (seen.sum() + 2 * block * length)
    assert both == pytest.approx(4.5 * counted, rel=1e-3)  # 2 products forward, 3 and 4 backward


def test_away_from_a_tpu_the_plain_form_is_used():
    assert not splash.on_tpu() and not splash.fits(256)


def test_a_scale_that_is_no_power_of_two_costs_one_more_rounding_of_the_queries(monkeypatch):
    monkeypatch.setattr(f"{__name__}.SCALE", 1 / 12)  # Gemma 2 27B's
    how = dict(mesh=Mesh(), softcap=None, window=None, length=384, heads=2, group=2, head=128, value=128)
    value, gradient = compare(monkeypatch, "float32", **how)
    assert value < 1e-5 and gradient < 1e-5
    value, gradient = compare(monkeypatch, "bfloat16", **how)
    assert value < 2.5e-3 and gradient < 2e-2
