"""Layouts come from the names of dims, and collectives refuse operands that are not laid out as they say."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32

from mintrain import arrays, collectives, config, sharding, step
from mintrain.collectives import all_gather, all_to_all, psum
from mintrain.config import ConfigError
from mintrain.model import LM

MESH = sharding.make_mesh(config.Mesh(fsdp=4, tensor=2))
EACH = P(("fsdp", "tensor"))  # what every device has, one after another
X = np.arange(8 * 24 * 6, dtype=np.float32).reshape(8, 24, 6)


def on_devices(function, before: P, after: P) -> np.ndarray:
    """What `function` makes of X, laid out as `before`; the devices' results are put together as `after`."""
    mapped = jax.jit(jax.shard_map(function, mesh=MESH, in_specs=before, out_specs=after))
    return np.asarray(mapped(jax.device_put(X, NamedSharding(MESH, before))))


def pieces(layout: P) -> list[np.ndarray]:
    """What each device has of X under a layout."""
    indices = NamedSharding(MESH, layout).devices_indices_map(X.shape)
    return [X[indices[device]] for device in MESH.devices.flat]


# ----------------------------------------------------------------------------------------- collectives


@pytest.mark.parametrize(
    "spec, before, after",
    [
        ("a/fsdp b/tensor c -> a b/tensor c", P("fsdp", "tensor"), P(None, "tensor")),
        ("a/fsdp b/tensor c -> a/fsdp b c", P("fsdp", "tensor"), P("fsdp")),
        ("a/fsdp b/tensor c -> a b c", P("fsdp", "tensor"), P()),
        ("a/fsdp/tensor b c -> a/fsdp b c", P(("fsdp", "tensor")), P("fsdp")),
        ("a b/tensor/fsdp c -> a b c", P(None, ("tensor", "fsdp")), P()),
        ("a b c/tensor -> a b c", P(None, None, "tensor"), P()),
    ],
)
@pytest.mark.parametrize("tile", [collectives.TILE, 5])  # with 5, what is gathered is padded
def test_all_gather_gives_every_device_what_the_spec_says(spec, before, after, tile, monkeypatch):
    monkeypatch.setattr(collectives, "TILE", tile)
    ours = on_devices(lambda x: all_gather(spec, x)[None], before, EACH)
    np.testing.assert_array_equal(ours, pieces(after))


@pytest.mark.parametrize(
    "spec, before, after",
    [
        ("a/fsdp b c -> a b/fsdp c", P("fsdp"), P(None, "fsdp")),
        ("a b c/tensor -> a/tensor b c", P(None, None, "tensor"), P("tensor")),
        ("a/fsdp b/tensor c -> a/fsdp/tensor b c", P("fsdp", "tensor"), P(("fsdp", "tensor"))),
        ("a/fsdp/tensor b c -> a/fsdp b/tensor c", P(("fsdp", "tensor")), P("fsdp", "tensor")),
    ],
)
def test_all_to_all_gives_every_device_what_the_spec_says(spec, before, after):
    ours = on_devices(lambda x: all_to_all(spec, x)[None], before, EACH)
    np.testing.assert_array_equal(ours, pieces(after))


@pytest.mark.parametrize("collective", [all_gather, all_to_all])
@pytest.mark.parametrize(
    "spec, layout, message",
    [
        ("a b/fsdp c/tensor -> a b c", P(), r"does not vary over \['fsdp', 'tensor'\]"),
        ("a/fsdp b c -> a b c", P("tensor"), r"does not vary over \['fsdp'\]"),
        ("a/fsdp b c -> a b/fsdp c", P(None, "tensor"), r"does not vary over \['fsdp'\]"),
        ("a/fsdp b -> a b", P("fsdp"), "does not fit an operand of shape"),
        ("a/fsdp b c -> b a c", P("fsdp"), "does not fit an operand of shape"),
        ("a/fsdp b c -> a/fsdp b/tensor c", P("fsdp"), "by gathering|does not move one axis"),
        ("a/fsdp b c -> a/fsdp/tensor b c", P("fsdp"), "by gathering|does not move one axis"),
        ("a/fsdp/tensor b c -> a/tensor b c", P(("fsdp", "tensor")), "by gathering|does not move one axis"),
        ("a/fsdp b/tensor c -> a/tensor b/fsdp c", P("fsdp", "tensor"), "by gathering|does not move one axis"),
    ],
)
def test_collectives_refuse_what_they_cannot_do(collective, spec, layout, message):
    with pytest.raises(TypeError, match=message):
        on_devices(lambda x: collective(spec, x)[None], layout, EACH)


@pytest.mark.parametrize(
    "spec",
    [
        "a/fsdp/tensor b c -> a b/fsdp/tensor c",  # two axes at once
        "a/fsdp/tensor b c -> a/tensor b/tensor c",  # the other axis is not where it was
    ],
)
def test_all_to_all_moves_one_axis_and_leaves_the_others_where_they_are(spec):
    with pytest.raises(TypeError, match="does not move one axis"):
        on_devices(lambda x: all_to_all(spec, x)[None], P(("fsdp", "tensor")), EACH)


def test_psum_refuses_to_multiply_a_value_that_all_devices_have():
    total = on_devices(lambda x: psum(x, "fsdp"), P("fsdp"), P())
    np.testing.assert_array_equal(total, X.reshape(4, 2, 24, 6).sum(0))
    with pytest.raises(TypeError, match=r"does not vary over \['tensor'\]"):
        on_devices(lambda x: psum(x, "fsdp", "tensor"), P("fsdp"), P())


# --------------------------------------------------------------------------------------------- layouts


class Nested(eqx.Module):
    square: Float32[Array, "ff kv_heads"]  # both are split over `tensor`


class Stacked(eqx.Module):
    inner: tuple[Nested, ...]


def test_dim_str_is_the_string_of_the_annotation():
    """What layouts are read from. It is public in jaxtyping, but no page of its documentation promises it."""
    assert Float32[Array, "embed kv_heads  group head"].dim_str == "embed kv_heads  group head"
    assert Float32[Array, ""].dim_str == ""
    assert Float32[Array, "a"].dtypes == ("float32",)
    union = Float32[Array, "embed ff"] | None
    assert [t.dim_str for t in union.__args__ if hasattr(t, "dim_str")] == ["embed ff"]


def test_two_dims_on_one_mesh_axis_are_an_error():
    with pytest.raises(TypeError, match=r"inner\[0\]\.square: dims ff kv_heads map twice"):
        sharding.specs(Stacked((Nested(jnp.zeros((3, 2))),)))


def test_every_weight_is_laid_out_by_its_names_and_the_axis_of_repeats_is_not_split():
    model = jax.eval_shape(lambda: LM.init(tiny.MODEL, "float32", key=jax.random.key(0)))
    layouts = {w.path: s for w, s in zip(arrays.weights(model), jax.tree.leaves(sharding.specs(model)), strict=True)}
    split = ("fsdp", "expert")
    assert layouts["embedding.table"] == P("tensor", split)
    assert layouts["norm.scale"] == P(None)
    assert layouts["stages[0][0].attention.q"] == P(None, split, "tensor", None, None)
    assert layouts["stages[0][1].attention.o"] == P(None, "tensor", split)
    assert layouts["stages[0][1].mlp.down"] == P(None, "tensor", split)
    assert layouts["stages[0][1].scalar"] == P(None)
    for weight in arrays.weights(model):
        assert weight.stacked == weight.path.startswith("stages")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_moments_are_laid_out_as_their_weights(name):
    cfg = dataclasses.replace(tiny.CONFIG, optim=config.Optim(name=name))
    state = step.abstract_state(cfg, sharding.abstract_mesh(cfg.mesh))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.model)]
    moments = 0
    for path, leaf in jax.tree.leaves_with_path(state.opt):
        for suffix, weight in zip(paths, jax.tree.leaves(state.model), strict=True):
            if jax.tree_util.keystr(path).endswith(("mu" + suffix, "nu" + suffix)):
                assert (leaf.shape, leaf.dtype, leaf.sharding) == (weight.shape, np.float32, weight.sharding), path
                moments += 1
    matrices = sum(len(w.dims) > 1 and "vocab" not in w.dims for w in arrays.weights(state.model))
    trained = len(paths) - sum(w.buffer for w in arrays.weights(state.model))
    assert moments == 2 * trained - (matrices if name == "muon" else 0)  # Muon keeps one moment of a matrix


# ----------------------------------------------------------------------------------- mistakes of a user


@pytest.mark.parametrize(
    "mesh, message",
    [
        (dict(fsdp=16), "mesh.fsdp=16 does not divide embed=40 of .*; use one of 1, 2, 4, 5, 8, 10, 20, 40"),
        (dict(tensor=4), r"mesh.tensor=4 does not divide vocab=74 of embedding.table; use one of 1, 2, 37, 74"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused_with_a_remedy(mesh, message):
    cfg = dataclasses.replace(tiny.CONFIG, mesh=config.Mesh(**mesh))
    with pytest.raises(ConfigError, match=message):
        sharding.validate(cfg.mesh, jax.eval_shape(lambda: LM.init(cfg.model, "float32", key=jax.random.key(0))))


def test_a_mesh_that_divides_the_model_is_accepted():
    cfg = dataclasses.replace(tiny.CONFIG, mesh=config.Mesh(fsdp=4, tensor=2))
    sharding.validate(cfg.mesh, jax.eval_shape(lambda: LM.init(cfg.model, "float32", key=jax.random.key(0))))


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"fsdp\W4 x \S*\W?tensor\W4 needs 16 devices, this machine has 8"):
        sharding.make_mesh(config.Mesh(fsdp=4, tensor=4))


@pytest.mark.parametrize(
    "change, field",
    [
        (dict(mesh=config.Mesh(fsdp=8), per_device_batch_size=0.5), "per_device_batch_size=0.5"),
        (dict(mesh=config.Mesh(tensor=2), per_device_batch_size=0.25), "per_device_batch_size=0.25"),
        (dict(accumulate=3), "accumulate = 3"),
        (dict(mesh=config.Mesh(context=3), data=config.Data(seq_len=16)), "data.seq_len=16 .*mesh.context=3"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_by_name(change, field):
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(tiny.CONFIG, **change)
