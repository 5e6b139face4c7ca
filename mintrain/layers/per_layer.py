"""Per-layer inputs of Gemma 4 E2B and E4B: every layer sees the token again, through a small vector of its own.

token: all tokens of this device.  embed: residual stream.  layers: of the whole model.  width: of one layer's input.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from mintrain import config
from mintrain.layers.embedding import Embedding
from mintrain.layers.linear import gather, normal
from mintrain.layers.norm import RMSNorm


class PerLayerInputs(eqx.Module):
    embedding: Embedding  # the vectors of all layers, one after the other
    projection: Float32[Array, "embed layers_width"]
    norm: RMSNorm

    @staticmethod
    def init(model: config.Model, *, key: PRNGKeyArray) -> "PerLayerInputs":
        keys, width = jax.random.split(key), model.per_layer_input
        both = len(model.layers) * width
        return PerLayerInputs(
            embedding=Embedding.init(model.vocab, both, width**-0.5, key=keys[0]),
            projection=normal(keys[1], (model.embed, both), fan_in=1),  # the result is divided by sqrt(embed)
            norm=RMSNorm.init(width, model.norm_offset, model.norm_eps),
        )

    def __call__(
        self, tokens: Int32[Array, "token"], x: Float[Array, "token embed"]
    ) -> Float[Array, "layers token width"]:
        """What the token says, and what its embedding `x` says, each of about unit size, summed."""
        width = self.norm.scale.shape[0]
        split = lambda y: rearrange(y, "t (l w) -> l t w", w=width)
        looked_up = split(self.embedding(tokens, x.dtype)) * jnp.asarray(width**0.5, x.dtype)
        w = gather("embed/fsdp/expert layers_width -> embed layers_width", self.projection, x.dtype)
        context = self.norm(split(jnp.einsum("td,dp->tp", x, w) * jnp.asarray(x.shape[1] ** -0.5, x.dtype)))
        return (context + looked_up) * jnp.asarray(0.5**0.5, x.dtype)


class PerLayerGate(eqx.Module):
    gate: Float32[Array, "embed width"]
    out: Float32[Array, "width embed"]
    norm: RMSNorm

    @staticmethod
    def init(model: config.Model, *, key: PRNGKeyArray) -> "PerLayerGate":
        keys, width = jax.random.split(key), model.per_layer_input
        return PerLayerGate(
            gate=normal(keys[0], (model.embed, width), fan_in=model.embed),
            out=normal(keys[1], (width, model.embed), fan_in=width),
            norm=RMSNorm.init(model.embed, model.norm_offset, model.norm_eps),
        )

    @jax.named_scope("per_layer")
    def __call__(
        self, x: Float[Array, "token embed"], layer_input: Float[Array, "token width"]
    ) -> Float[Array, "token embed"]:
        gate = jnp.einsum("td,dw->tw", x, gather("embed/fsdp/expert width -> embed width", self.gate, x.dtype))
        hidden = jax.nn.gelu(gate) * layer_input
        return self.norm(
            jnp.einsum("tw,wd->td", hidden, gather("width embed/fsdp/expert -> width embed", self.out, x.dtype))
        )
