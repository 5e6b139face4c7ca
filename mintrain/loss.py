"""Next-token cross entropy over a vocabulary that is split over `tensor` and visited in chunks.

batch, seq: tokens.  token: batch * seq.  embed: residual stream.  vocab: the rows of one chunk on one device.
The float32 logits of all tokens over the whole vocabulary never exist: a chunk's are made, reduced and, in the
backward pass, made again. Chunks split the vocabulary and not the tokens, so each row of the table's gradient
is one matrix product and not a sum of rounded ones, and the gathered table is never whole either.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from mintrain.collectives import psum
from mintrain.layers.linear import gather
from mintrain.model import LM, Remat
from mintrain.sharding import ALL_TOKENS

CHUNK = 1 << 24  # logits of one chunk on one device: 64 MiB of float32


class Batch(eqx.Module):
    """`accumulate` microbatches of token sequences; see `data.py`. Weight 0 marks targets that do not count."""

    tokens: Int32[Array, "*accumulate batch seq"]
    targets: Int32[Array, "*accumulate batch seq"]
    positions: Int32[Array, "*accumulate batch seq"]
    segments: Int32[Array, "*accumulate batch seq"]
    weights: Float32[Array, "*accumulate batch seq"]


def output_logits(
    x: Float[Array, "*tokens embed"], table: Float[Array, "vocab embed"], softcap: float | None
) -> Float32[Array, "*tokens vocab"]:
    logits = jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def local_logits(model: LM, x: Float[Array, "token embed"]) -> Float32[Array, "token vocab"]:
    """The logits of this device's part of the vocabulary, all at once: for generation and inspection."""
    table = gather("vocab/tensor embed/fsdp -> vocab/tensor embed", model.output_table, x.dtype)
    return output_logits(x, table, model.cfg.final_softcap)


def log_sum_exp(logits: Float32[Array, "*rest vocab"]) -> Float32[Array, "*rest"]:
    return jax.nn.logsumexp(logits, axis=-1)


def token_loss(
    target_logit: Float32[Array, "token"], log_z: Float32[Array, "token"], weights: Float32[Array, "token"]
) -> Float32[Array, ""]:
    """The summed negative log-likelihood, `-log p(target)` in nats."""
    return jnp.sum(weights * (log_z - target_logit))


def target_statistics(
    x: Float[Array, "token embed"],
    table: Float32[Array, "local_vocab local_embed"],
    targets: Int32[Array, "token"],
    softcap: float | None,
) -> tuple[Float32[Array, "token"], Float32[Array, "token"]]:
    """The logit of each target and the log-sum-exp over the whole vocabulary."""
    rows = table.shape[0]
    chunks = -(-rows * x.shape[0] // CHUNK)
    size = -(-rows // chunks)
    padded = jnp.pad(table, ((0, chunks * size - rows), (0, 0))).reshape(chunks, size, -1)
    local = targets - rows * jax.lax.axis_index("tensor")
    x32 = x.astype(jnp.float32)  # so that its gradient is summed over the chunks in float32

    @jax.checkpoint
    def chunk(arrays: tuple[Array, Array]) -> tuple[Float32[Array, "token"], Float32[Array, "token"]]:
        rows_here, first = arrays
        whole = gather("vocab/tensor embed/fsdp -> vocab/tensor embed", rows_here, x.dtype)
        logits = output_logits(x32.astype(x.dtype), whole, softcap)
        index = first + jnp.arange(size)
        hit = index[None, :] == local[:, None]
        log_z = log_sum_exp(jnp.where((index < rows)[None, :], logits, -jnp.inf))
        return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1), log_z

    target_logit, log_z = jax.lax.map(chunk, (padded, size * jnp.arange(chunks)))
    log_z = log_sum_exp(log_z.T)
    largest = jax.lax.pmax(jax.lax.stop_gradient(log_z), "tensor")
    log_z = largest + jnp.log(psum(jnp.exp(log_z - largest), "tensor"))
    return psum(jnp.sum(target_logit, axis=0), "tensor"), log_z


def next_token_loss(
    model: LM,
    batch: Batch,
    count: Float32[Array, ""],
    *,
    scan: bool,
    remat: Remat,
    z_loss: float,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """The loss to differentiate and the summed negative log-likelihood in nats, over the tokens of all devices.

    The loss is a sum over tokens divided by `count`, the real tokens of the *whole step*: sums of microbatches
    and of devices are then exactly the loss of one big batch.
    """
    x = model(batch.tokens, batch.positions, batch.segments, scan=scan, remat=remat)
    target_logit, log_z = target_statistics(x, model.output_table, batch.targets.reshape(-1), model.cfg.final_softcap)
    weights = batch.weights.reshape(-1)
    nll = psum(token_loss(target_logit, log_z, weights), *ALL_TOKENS)
    z = psum(jnp.sum(weights * jnp.square(log_z)), *ALL_TOKENS)
    return (nll + z_loss * z) / count, nll
