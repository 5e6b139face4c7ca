"""Text from a model: every new token is one forward pass over the whole window."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32, UInt32

from mintrain.collectives import all_gather, psum
from mintrain.loss import local_logits
from mintrain.model import LM
from mintrain.sharding import AXES, specs


def sample(
    model: LM, prompt: list[int], tokens: int, key: UInt32[Array, "2"], temperature: float, window: int
) -> list[int]:
    """Continue `prompt` by `tokens` tokens, up to `window` in all. Every device of the mesh makes the same text."""
    mesh = model.norm.scale.sharding.mesh
    ids = np.zeros(window, np.int32)
    ids[: len(prompt)] = prompt[:window]
    end = min(window, len(prompt) + tokens)
    out = _sampler(mesh, specs(model))(model, ids, key, len(prompt), end, temperature)
    return np.asarray(out.addressable_shards[0].data)[0, :end].tolist()


@cache
def _sampler(mesh: Mesh, layouts: LM) -> Callable[..., Int32[Array, "devices window"]]:
    def run(model: LM, ids: Array, key: Array, start: Array, end: Array, temperature: Array) -> Array:
        length = ids.shape[0] // mesh.shape["context"]
        first = length * jax.lax.axis_index("context")
        place = jnp.arange(length, dtype=jnp.int32) + first

        def following(at: Array, ids: Array) -> Array:
            tokens = jax.lax.dynamic_slice(ids, (first,), (length,))
            x, _ = model(tokens[None], place[None], jnp.ones_like(tokens)[None])
            last = psum(jnp.sum(jnp.where((place == at - 1)[:, None], x, 0), axis=0), "context")
            logits = all_gather("vocab/tensor -> vocab", local_logits(model, last[None])[0])
            noise = jax.random.fold_in(jax.random.wrap_key_data(key), at)
            token = jax.random.categorical(noise, logits / jnp.maximum(temperature, 1e-6)).astype(jnp.int32)
            return ids.at[at].set(token)

        ids = jax.lax.pcast(ids, AXES, to="varying")
        return jax.lax.fori_loop(start, end, following, ids)[None]

    scalar = P()
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(layouts, *(scalar,) * 5), out_specs=P(AXES)))
