"""Gated MLP (Shazeer 2020, arXiv 2002.05202).

token: all tokens of this device.  embed: residual stream.  ff: hidden width, split over `tensor`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from mintrain import config
from mintrain.collectives import psum
from mintrain.layers.linear import gather, normal

ACTIVATIONS = {"gelu": jax.nn.gelu, "silu": jax.nn.silu}  # jax.nn.gelu is the tanh approximation


class MLP(eqx.Module):
    gate: Float32[Array, "embed ff"]
    up: Float32[Array, "embed ff"]
    down: Float32[Array, "ff embed"]
    activation: str = eqx.field(static=True)

    @staticmethod
    def init(c: config.MLP, embed: int, *, key: PRNGKeyArray) -> "MLP":
        keys = jax.random.split(key, 3)
        return MLP(
            gate=normal(keys[0], (embed, c.width), fan_in=embed),
            up=normal(keys[1], (embed, c.width), fan_in=embed),
            down=normal(keys[2], (c.width, embed), fan_in=c.width),
            activation=c.activation,
        )

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "token embed"]) -> Float[Array, "token embed"]:
        inward = "embed/fsdp/expert ff/tensor -> embed ff/tensor"
        gate = jnp.einsum("td,df->tf", x, gather(inward, self.gate, x.dtype))
        up = jnp.einsum("td,df->tf", x, gather(inward, self.up, x.dtype))
        hidden = ACTIVATIONS[self.activation](gate) * up
        down = gather("ff/tensor embed/fsdp/expert -> ff/tensor embed", self.down, x.dtype)
        out = jnp.einsum("tf,fd->td", hidden, down, preferred_element_type=jnp.float32)
        return psum(out, "tensor").astype(x.dtype)
