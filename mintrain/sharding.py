"""The whole sharding policy: which mesh axis splits which named dim of a weight, and how batches are split."""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from mintrain.arrays import Weight, weights
from mintrain.config import ConfigError
from mintrain.config import Mesh as MeshConfig

AXES = ("replica", "fsdp", "expert", "context", "tensor")
DATA_AXES = ("replica", "fsdp", "expert")
LAYOUT = {
    "embed": ("fsdp", "expert"),
    "q_latent": ("fsdp", "expert"),  # the rows of what expands a compressed query, or key and value
    "kv_latent": ("fsdp", "expert"),
    "expert_embed": "fsdp",  # of routed experts, which are split over `expert` themselves
    "vocab": "tensor",
    "ff": "tensor",
    "heads": "tensor",
    "heads_value": "tensor",
    "kv_heads": "tensor",
    "experts": "expert",
    "batch": DATA_AXES,  # of a cache, like the next one
    "key": "context",
}
BATCH = P(None, DATA_AXES, "context")  # accumulate, batch, seq
ALL_TOKENS = (*DATA_AXES, "context")  # the axes that different tokens are on


def make_mesh(mesh: MeshConfig) -> jax.sharding.Mesh:
    """The first `mesh.devices` devices. Raises ConfigError if there are fewer."""
    if mesh.devices > jax.device_count():
        raise ConfigError(
            f"mesh {describe(mesh)} needs {mesh.devices} devices, this machine has {jax.device_count()}; "
            "use smaller axes, or --check to trace the step without them"
        )
    devices = jax.devices()[: mesh.devices]
    if len({device.process_index for device in devices}) < jax.process_count():
        raise ConfigError(
            f"mesh {describe(mesh)} has {mesh.devices} devices and leaves some of the {jax.process_count()} hosts with "
            f"nothing to do; use all {jax.device_count()} devices"
        )
    return arrange(mesh, devices)


def arrange(mesh: MeshConfig, devices: list[Any]) -> jax.sharding.Mesh:
    """The mesh of as many devices. Those of an axis are near each other on a torus; TPU slices are parts of `replica`.

    Raises ConfigError if there are slices that `replica` cannot be divided among.
    """
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    if mesh.replica % slices:
        raise ConfigError(f"mesh.replica={mesh.replica} cannot be divided among {slices} slices; use {slices}")
    inner, outer = (mesh.replica // slices, *mesh.sizes[1:]), (slices, *[1] * len(mesh.sizes[1:]))
    if slices > 1:
        array = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    else:
        array = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(array, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def abstract_mesh(mesh: MeshConfig) -> AbstractMesh:
    """The same mesh without devices, for tracing at any size."""
    return AbstractMesh(mesh.sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def describe(mesh: MeshConfig) -> str:
    axes = [f"{name} {size}" for name, size in zip(AXES, mesh.sizes, strict=True) if size > 1]
    return " x ".join(axes) or "1"


def axes(dim: str) -> tuple[str, ...]:
    """The mesh axes that split a dim."""
    found = LAYOUT.get(dim, ())
    return (found,) if isinstance(found, str) else found


def spec(weight: Weight) -> P:
    """The layout of one weight. Raises TypeError if two of its dims map to one axis."""
    used = [axis for dim in weight.dims for axis in axes(dim)]
    if len(used) != len(set(used)):
        raise TypeError(f"{weight.path}: dims {' '.join(weight.dims)} map twice to one mesh axis")
    return P(*(None,) * weight.stacked, *map(LAYOUT.get, weight.dims))


def specs(model: PyTree) -> PyTree:
    """The layouts of all weights, as a tree of the model's own type."""
    return jax.tree.unflatten(jax.tree.structure(model), [spec(weight) for weight in weights(model)])


def state_specs(state: PyTree, model: PyTree) -> PyTree:
    """Layouts of everything that is kept between steps.

    Optimizer moments are trees of the model's type somewhere inside optax's own state, so a leaf whose path
    ends in the path of a weight has that weight's layout. Everything else is a scalar on every device.
    """
    known = {
        jax.tree_util.keystr(path): (leaf.shape, spec(weight))
        for (path, leaf), weight in zip(jax.tree.leaves_with_path(model), weights(model), strict=True)
    }

    def layout(path: tuple, leaf: PyTree) -> P:
        for start in range(len(path)):
            shape, found = known.get(jax.tree_util.keystr(path[start:]), (None, P()))
            if shape == leaf.shape:
                return found
        return P()

    return jax.tree.map_with_path(layout, state)


def named(mesh: jax.sharding.Mesh | AbstractMesh, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda s: NamedSharding(mesh, s), tree, is_leaf=lambda s: isinstance(s, P))


def place(mesh: jax.sharding.Mesh | AbstractMesh, shapes: PyTree, layout: PyTree) -> PyTree:
    """Abstract arrays with their shardings: what `jit`, `eval_shape` and checkpoints need to know."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)), shapes, layout
    )


def validate(mesh: MeshConfig, model: PyTree) -> None:
    """Raise ConfigError if a mesh axis does not divide a dim of the (abstract) model that it splits."""
    sizes = dict(zip(AXES, mesh.sizes, strict=True))
    for weight in weights(model):
        for dim, size in zip(weight.dims, weight.value.shape[weight.stacked :], strict=True):
            shards = math.prod(sizes[axis] for axis in axes(dim))
            if size % shards:
                divisors = [str(d) for d in range(1, size + 1) if size % d == 0][:8]
                name = " x ".join(f"mesh.{axis}" for axis in axes(dim) if sizes[axis] > 1)
                raise ConfigError(
                    f"{name}={shards} does not divide {dim}={size} of {weight.path}; use one of {', '.join(divisors)}"
                )


def bytes_per_device(shape: PyTree) -> int:
    """Bytes of abstract arrays that one device holds."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(shape))
