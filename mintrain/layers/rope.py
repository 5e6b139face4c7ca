"""Rotary positions (Su et al. 2021, arXiv 2104.09864), half-split: dim i turns with dim i + head/2.

batch, seq: tokens.  half: head / 2, one angle each.  The angles are float32 by declaration.
"""

import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int32

from mintrain import config


def frequencies(rope: config.Rope, head: int) -> np.ndarray:
    """`theta^(-2i/head) / factor` for the first `fraction` of the dims, 0 (no rotation) for the others.

    The exponent runs over the whole head also where only a part rotates (Gemma 4's "proportional" rope).
    Under yarn, dims that turn more than `beta_fast` times in the original context keep their frequency, those
    below `beta_slow` are divided by the factor, and a ramp joins them (arXiv 2309.00071, equation 23).
    """
    frequency = rope.theta ** (-np.arange(0, head, 2, dtype=np.float64) / head) / rope.factor
    frequency[int(rope.fraction * head // 2) :] = 0.0
    if yarn := rope.yarn:
        dim = lambda turns: head * math.log(yarn.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        low, high = dim(yarn.beta_fast), dim(yarn.beta_slow)
        low, high = (math.floor(low), math.ceil(high)) if yarn.truncate else (low, high)
        low, high = max(low, 0), min(high, head - 1)
        ramp = np.clip((np.arange(head // 2) - low) / ((high - low) or 1e-3), 0, 1)
        frequency *= 1 - ramp + ramp / yarn.factor
    return frequency.astype(np.float32)


def _magnitude(yarn: config.Yarn, weight: float) -> float:
    return 0.1 * weight * math.log(yarn.factor) + 1 if yarn.factor > 1 else 1.0


def rotation_factor(rope: config.Rope) -> float:
    """What yarn multiplies rotated queries and keys with: 1 in all released models."""
    if rope.yarn is None:
        return 1.0
    if rope.yarn.attention_factor is not None:
        return rope.yarn.attention_factor
    if not (rope.yarn.mscale and rope.yarn.mscale_all_dim):
        return _magnitude(rope.yarn, 1.0)
    return _magnitude(rope.yarn, rope.yarn.mscale) / _magnitude(rope.yarn, rope.yarn.mscale_all_dim)


def logit_factor(rope: config.Rope) -> float:
    """What yarn multiplies DeepSeek's attention logits with."""
    return 1.0 if rope.yarn is None else _magnitude(rope.yarn, rope.yarn.mscale_all_dim) ** 2


def angles(positions: Int32[Array, "batch seq"], rope: config.Rope, head: int) -> Float32[Array, "batch seq half"]:
    return positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies(rope, head))[None, None]


def rotate(
    x: Float[Array, "batch *heads seq head"], angle: Float32[Array, "batch seq half"], factor: float = 1.0
) -> Float[Array, "batch *heads seq head"]:
    """Rotate in float32 and multiply by `factor`, return in the dtype of `x`."""
    angle = jnp.expand_dims(angle, range(1, x.ndim - 2))
    cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
    u, v = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([u * cos - v * sin, v * cos + u * sin], axis=-1).astype(x.dtype)


def halves(x: Float[Array, "*rest head"]) -> Float[Array, "*rest head"]:
    """DeepSeek turns dim 2i with dim 2i + 1: put the even dims first. Products of queries and keys do not change."""
    return rearrange(x, "... (half two) -> ... (two half)", two=2)
