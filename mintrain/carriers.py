"""Gradients of layers in the dtype in which they are made: that of a weight gathered in bfloat16 has bfloat16's bits.

JAX gives a gradient the dtype of its weight. The gradients of all layers are kept until the optimizer reads them, so in
float32 they would take twice the memory for the same numbers. Instead each weight of a layer gets a carrier, zeros that
nothing reads, and its gradient is the carrier's.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PyTree

from mintrain.arrays import Weight, weights
from mintrain.block import Block
from mintrain.collectives import unchecked
from mintrain.lora import Adapted
from mintrain.model import LM


class Carried(eqx.Module):
    """A layer whose gradients go to its carriers. None for a weight that has none."""

    block: Block | Adapted
    carriers: Block | Adapted

    def __call__(self, x: Float[Array, "token embed"], *inputs):
        x, block = attach(x, self.block, self.carriers)
        return block(x, *inputs)


@jax.custom_vjp
def attach(
    x: Float[Array, "token embed"], block: PyTree[Array], carriers: PyTree[Array]
) -> tuple[Float[Array, "token embed"], PyTree[Array]]:
    """A layer's input and weights, whose gradients are given to its carriers.

    The layer before waits for them: the compiler would put off their products, and keep what they are made of.
    """
    return x, block


def _forward(x, block, carriers):
    return (x, block), jax.tree.map(lambda carrier: jnp.zeros(0, carrier.dtype), carriers)


def _backward(like, gradients):
    dx, dblock = gradients
    narrow = lambda like, g: None if like is None else g.astype(like.dtype)
    carried = jax.tree.map(narrow, like, dblock, is_leaf=lambda leaf: leaf is None)
    dx = unchecked(lambda *all: jax.lax.optimization_barrier(all)[-1], carried, dx)
    return dx, None, carried


attach.defvjp(_forward, _backward)


def gradient_dtype(weight: Weight, compute_dtype: str) -> str:
    """What the backward pass makes: matrices are gathered in the compute dtype, once for each layer.

    All others are float32 where they are used, as routers and adapters are.
    """
    matrix = weight.sides is not None and "routes" not in weight.dims and "adapters" not in weight.path
    return compute_dtype if matrix else "float32"


def layers(model: LM) -> list[PyTree]:
    """What has carriers: the layers of the stages and of `mtp`."""
    places = [(i, j) for i, stage in enumerate(model.cfg.stages) for j in range(len(stage.pattern))]
    return [model.stages[i][j] for i, j in places] + [model.mtp[i].block for i in range(len(model.cfg.mtp))]


def carrier_shapes(trained: LM) -> list[PyTree]:
    """The abstract carriers of the trained weights, laid out as these are."""
    shapes = [
        jax.ShapeDtypeStruct(x.value.shape, gradient_dtype(x, trained.compute_dtype), sharding=x.value.sharding)
        for x in weights(trained)
    ]
    return layers(jax.tree.unflatten(jax.tree.structure(trained), shapes))


def zeros(shapes: PyTree) -> PyTree:
    """Zeros laid out as `shapes` say. From jax 0.11 on `jnp.zeros(out_sharding=...)` forgets the layout in a jit that
    runs outside `jax.set_mesh`; `reshard` takes the mesh from the layout.
    """
    return jax.tree.map(lambda x: jax.sharding.reshard(jnp.zeros(x.shape, x.dtype), x.sharding), shapes)


def carry(model: LM, carriers: list[PyTree]) -> LM:
    """`model` with its layers' gradients in `carriers`."""
    return eqx.tree_at(layers, model, list(map(Carried, layers(model), carriers)))


def wide(grads: LM, carried: PyTree[Float[Array, "..."]]) -> PyTree[Float32[Array, "..."]]:
    """All gradients in float32: those of `grads` outside the layers, and those of layers from their carriers."""
    return eqx.tree_at(layers, grads, jax.tree.map(lambda g: g.astype(jnp.float32), carried))
