"""Rotary positions (Su et al. 2021, arXiv 2104.09864), half-split: dim i turns with dim i + head/2.

batch, seq: tokens.  half: head / 2, one angle each.  The angles are float32 by declaration.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from mintrain import config


def frequencies(rope: config.Rope, head: int) -> np.ndarray:
    """`theta^(-2i/head) / factor` for the first `fraction` of the dims, 0 (no rotation) for the others.

    The exponent runs over the whole head also where only a part rotates (Gemma 4's "proportional" rope).
    """
    frequency = rope.theta ** (-np.arange(0, head, 2, dtype=np.float64) / head) / rope.factor
    frequency[int(rope.fraction * head // 2) :] = 0.0
    return frequency.astype(np.float32)


def angles(positions: Int32[Array, "batch seq"], rope: config.Rope, head: int) -> Float32[Array, "batch seq half"]:
    return positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies(rope, head))[None, None]


def rotate(
    x: Float[Array, "batch *heads seq head"], angle: Float32[Array, "batch seq half"]
) -> Float[Array, "batch *heads seq head"]:
    """Rotate in float32, return in the dtype of `x`."""
    angle = jnp.expand_dims(angle, range(1, x.ndim - 2))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    u, v = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([u * cos - v * sin, v * cos + u * sin], axis=-1).astype(x.dtype)
