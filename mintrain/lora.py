"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): `W + alpha / rank * down up`, of which W is not trained.

rank: of the term.  Its other dims are those of the weight, and so are their layouts: every device adds the term to its
part of the weight, without talking to others, where the layer is used. A layer's sum exists while that layer runs.
"""

import math
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PRNGKeyArray

from mintrain import config
from mintrain.arrays import Weight, weights
from mintrain.block import Block
from mintrain.layers.linear import normal

Model = TypeVar("Model", bound=eqx.Module)  # an LM, which imports this file


class Factor(eqx.Module):
    array: Float32[Array, "..."]
    dims: tuple[str, ...] = eqx.field(static=True)  # in place of an annotation; arrays.py


class Adapter(eqx.Module):
    down: Factor  # what the weight sums over, rank
    up: Factor  # rank, what the weight makes; starts at zero


class Adapted(eqx.Module):
    """A layer with a term for each of its matrices, but those of routed experts, routers and indexers."""

    block: Block
    adapters: tuple[Adapter | None, ...]  # in the order of `arrays.weights(block)`
    scale: float = eqx.field(static=True)

    @staticmethod
    def init(block: Block, c: config.Lora, *, key: PRNGKeyArray) -> "Adapted":
        found = list(weights(block))
        adapters = zip(found, jax.random.split(key, len(found)), strict=True)
        return Adapted(block, tuple(adapter(weight, c.rank, key=k) for weight, k in adapters), c.alpha / c.rank)

    @property
    def merged(self) -> Block:
        """The layer as an ordinary one."""
        leaves = [
            weight.value if adapter is None else weight.value + self.scale * product(adapter)
            for weight, adapter in zip(weights(self.block), self.adapters, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(self.block), leaves)

    def __call__(self, *inputs):
        return self.merged(*inputs)


def adapter(weight: Weight, rank: int, *, key: PRNGKeyArray) -> Adapter | None:
    if weight.sides is None or "experts" in weight.dims or "router" in weight.path or "indexer" in weight.path:
        return None
    inward, outward = weight.sides
    size = dict(zip(weight.dims, weight.value.shape, strict=True))
    down, up = (tuple(size[dim] for dim in side) for side in weight.sides)
    return Adapter(
        Factor(normal(key, (*down, rank), fan_in=math.prod(down)), (*inward, "rank")),
        Factor(jnp.zeros((rank, *up), jnp.float32), ("rank", *outward)),
    )


def product(adapter: Adapter) -> Float32[Array, "..."]:
    return jnp.tensordot(adapter.down.array, adapter.up.array, axes=1, precision=jax.lax.Precision.HIGHEST)


def adapt(model: Model, c: config.Lora, *, key: PRNGKeyArray) -> Model:
    """The model with adapters in every layer of its stages; it computes what it did before."""

    def layer(block: Block, key: PRNGKeyArray) -> Adapted:
        repeats = jax.tree.leaves(block)[0].shape[0]
        return jax.vmap(lambda block, key: Adapted.init(block, c, key=key))(block, jax.random.split(key, repeats))

    blocks = [block for stage in model.stages for block in stage]
    layers = iter([layer(block, k) for block, k in zip(blocks, jax.random.split(key, len(blocks)), strict=True)])
    return eqx.tree_at(lambda m: m.stages, model, tuple(tuple(next(layers) for _ in stage) for stage in model.stages))


def merge(model: Model) -> Model:
    """The model without adapters that computes the same; itself if it has none."""
    plain = lambda layer: jax.vmap(lambda one: one.merged)(layer) if isinstance(layer, Adapted) else layer
    return eqx.tree_at(lambda m: m.stages, model, tuple(tuple(map(plain, stage)) for stage in model.stages))
