"""The table of token vectors, split over both of its axes. It is never gathered whole for a lookup.

token: all tokens of this device.  vocab: table rows, split over `tensor`.  embed: residual stream, split over `fsdp`
and `expert`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from mintrain.collectives import all_gather, all_to_all, psum
from mintrain.layers.linear import normal


class Embedding(eqx.Module):
    table: Float32[Array, "vocab embed"]

    @staticmethod
    def init(vocab: int, embed: int, std: float, *, key: PRNGKeyArray) -> "Embedding":
        """At `std = embed ** -0.5` rows have norm 1, and a head starts with logits of about unit size."""
        return Embedding(std * normal(key, (vocab, embed), fan_in=1))

    @jax.named_scope("embedding")
    def __call__(self, tokens: Int32[Array, "token"], dtype: jnp.dtype) -> Float[Array, "token embed"]:
        """Each device looks up the tokens of its fsdp x expert group in its columns, then trades them for its rows.

        Tokens must be below the vocabulary size: an id beyond it gets the zero vector.
        """
        rows = self.table.shape[0]
        local = all_gather("token/expert/fsdp -> token", tokens) - rows * jax.lax.axis_index("tensor")
        mine = (local >= 0) & (local < rows)
        vectors = jnp.take(self.table, jnp.where(mine, local, 0), axis=0).astype(dtype)
        vectors = psum(jnp.where(mine[:, None], vectors, 0), "tensor")  # one device has it: exact in any dtype
        vectors = all_to_all("token embed/fsdp/expert -> token/expert embed/fsdp", vectors)
        return all_to_all("token/expert embed/fsdp -> token/expert/fsdp embed", vectors)
