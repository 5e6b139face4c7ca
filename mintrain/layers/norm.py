"""RMS normalisation (Zhang & Sennrich 2019, arXiv 1910.07467). The statistics are float32 by declaration.

dim: the normalised axis.  rest: all the others.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from mintrain.collectives import vary_like


def inverse_rms(x: Float32[Array, "*rest dim"], eps: float) -> Float32[Array, "*rest 1"]:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def rms_norm(x: Float[Array, "*rest dim"], eps: float) -> Float[Array, "*rest dim"]:
    """`x / rms(x)` without a scale, as on Gemma 4's values."""
    x32 = x.astype(jnp.float32)
    return (x32 * inverse_rms(x32, eps)).astype(x.dtype)


class RMSNorm(eqx.Module):
    """`x / rms(x) * (offset + scale)`, in float32 up to and including the product."""

    scale: Float32[Array, "dim"]
    offset: float = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    @staticmethod
    def init(dim: int, offset: float, eps: float, value: float = 1.0) -> "RMSNorm":
        """A norm that multiplies by `value`."""
        return RMSNorm(jnp.full(dim, value - offset, jnp.float32), offset, eps)

    def __call__(self, x: Float[Array, "*rest dim"]) -> Float[Array, "*rest dim"]:
        x32 = x.astype(jnp.float32)
        scale = jnp.broadcast_to(self.offset + vary_like(self.scale, x), x.shape)
        return (x32 * inverse_rms(x32, self.eps) * scale).astype(x.dtype)


class LayerNorm(eqx.Module):
    """`(x - mean) / std * scale + bias` (Ba et al. 2016, arXiv 1607.06450), in float32: the indexer's keys."""

    scale: Float32[Array, "dim"]
    bias: Float32[Array, "dim"]
    eps: float = eqx.field(static=True)

    @staticmethod
    def init(dim: int, eps: float) -> "LayerNorm":
        return LayerNorm(jnp.ones(dim, jnp.float32), jnp.zeros(dim, jnp.float32), eps)

    def __call__(self, x: Float[Array, "*rest dim"]) -> Float[Array, "*rest dim"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        scale, bias = (jnp.broadcast_to(vary_like(w, x), x.shape) for w in (self.scale, self.bias))
        return (x32 * inverse_rms(x32, self.eps) * scale + bias).astype(x.dtype)
