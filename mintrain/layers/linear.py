"""What every layer does with a weight: draw it, and gather it where it is used."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from mintrain.collectives import all_gather


def normal(key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int) -> Float32[Array, "..."]:
    """Truncated normal with standard deviation `fan_in ** -0.5`, cut at two of them."""
    unit = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    return unit * (fan_in**-0.5 / 0.87962566)  # the standard deviation of the truncated unit normal


def gather(spec: str, weight: Float32[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """In the compute dtype, whole over `fsdp` and `expert`. The backward pass gathers it again (model.py)."""
    return checkpoint_name(all_gather(spec, weight.astype(dtype)), "gathered")
