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

from mintrain import watch
from mintrain.collectives import all_gather, psum
from mintrain.context import deal
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


def local_logits(model: LM, x: Float[Array, "*tokens embed"]) -> Float32[Array, "*tokens vocab"]:
    """The logits of this device's part of the vocabulary, all at once: for generation and inspection."""
    table = gather("vocab/tensor embed/fsdp/expert -> vocab/tensor embed", model.output_table, x.dtype)
    return output_logits(x, table, model.cfg.final_softcap)


def log_sum_exp(logits: Float32[Array, "*rest vocab"]) -> Float32[Array, "*rest"]:
    return jax.nn.logsumexp(logits, axis=-1)


def token_loss(
    target_logit: Float32[Array, "token"], log_z: Float32[Array, "token"], weights: Float32[Array, "token"]
) -> Float32[Array, ""]:
    """The summed negative log-likelihood, `-log p(target)` in nats."""
    return jnp.sum(weights * (log_z - target_logit))


@jax.named_scope("head")
def target_statistics(
    x: Float[Array, "token embed"],
    table: Float32[Array, "local_vocab local_embed"],
    targets: Int32[Array, "token"],
    softcap: float | None,
) -> tuple[Float32[Array, "token"], Float32[Array, "token"]]:
    """The logit of each target and the log-sum-exp over the whole vocabulary."""
    rows = table.shape[0]
    size = -(-rows // -(-rows * x.shape[0] // CHUNK))
    chunks = -(-rows // size)
    padded = jnp.pad(table, ((0, chunks * size - rows), (0, 0))).reshape(chunks, size, -1)
    local = targets - rows * jax.lax.axis_index("tensor")
    x32 = x.astype(jnp.float32)  # so that its gradient is summed over the chunks in float32

    @jax.checkpoint
    def chunk(arrays: tuple[Array, Array]) -> tuple[Float32[Array, "token"], Float32[Array, "token"]]:
        rows_here, first = arrays
        whole = gather("vocab/tensor embed/fsdp/expert -> vocab/tensor embed", rows_here, x.dtype)
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


class Counts(eqx.Module):
    """What sums over a whole step are divided by, so that microbatches and devices add up to one big batch."""

    targets: Float32[Array, ""]
    tokens: Float32[Array, ""]  # real ones: all but padding


class Report(eqx.Module):
    """Sums over the real tokens of all devices, in nats; None where the model has no such part."""

    nll: Float32[Array, ""]
    mtp_nll: Float32[Array, ""] | None  # the mean over the further tokens that are predicted
    balance: Float32[Array, ""] | None  # the routers' balance loss, the mean over layers
    indexer_kl: Float32[Array, ""] | None  # the mean over layers
    load: tuple[Float32[Array, "..."] | None, ...]  # tokens of each expert, in the order of `LM.blocks`
    seen: tuple[dict[str, Float32[Array, "..."]] | None, ...]  # what is watched of each layer, and no sums


def next_token_loss(
    model: LM,
    batch: Batch,
    counts: Counts,
    *,
    scan: bool,
    remat: Remat,
    z_loss: float,
    mtp_weight: float,
    indexer_only: bool,
    watched: bool,
) -> tuple[Float32[Array, ""], Report]:
    """The loss to differentiate, and its parts. Every part is a sum over tokens divided by a count of the whole step.

    indexer_only: the loss is the indexers' KL alone (their dense warm-up). Otherwise it is added to the others: no
    gradient of it reaches the rest of the model, and none of theirs the indexers.
    """
    further = [jax.tree.map(deal, ahead(batch, depth)) for depth, _ in enumerate(model.mtp, 1)]
    batch = jax.tree.map(deal, batch)
    x, aux, _ = model(batch.tokens, batch.positions, batch.segments, scan=scan, remat=remat, watched=watched)
    softcap, table = model.cfg.final_softcap, model.output_table
    target_logit, log_z = target_statistics(x, table, batch.targets.reshape(-1), softcap)
    weights = batch.weights.reshape(-1)
    nll = psum(token_loss(target_logit, log_z, weights), *ALL_TOKENS)
    loss = (nll + z_loss * psum(jnp.sum(weights * jnp.square(log_z)), *ALL_TOKENS)) / counts.targets

    mtp_nll = None
    for i, (module, (following, targets, valid)) in enumerate(zip(model.mtp, further, strict=True)):
        apply = watch.layer(lambda module, x, y: module(x, y, batch.positions, batch.segments), watched)
        with jax.named_scope(f"mtp[{i}]"):
            x, more = jax.checkpoint(apply)(module, x, model.embed(following.reshape(-1)))
        statistics = target_statistics(x, table, targets.reshape(-1), softcap)
        part = psum(token_loss(*statistics, valid.reshape(-1)), *ALL_TOKENS) / len(model.mtp)
        aux, mtp_nll = (*aux, more), part if mtp_nll is None else mtp_nll + part
    if mtp_nll is not None:
        loss = loss + mtp_weight * mtp_nll / counts.targets

    moes = [block.moe for block in model.blocks]
    balances = [(moe.cfg.balance, a.balance) for moe, a in zip(moes, aux, strict=True) if moe is not None]
    for weight, balance in balances:
        loss = loss + weight * psum(jnp.sum(balance), *ALL_TOKENS) / counts.tokens
    indexer_kl = mean_over_layers([a.indexer_kl for a in aux])
    if indexer_kl is not None:
        loss = (0.0 if indexer_only else loss) + indexer_kl / counts.tokens
    load = tuple(None if a.load is None else psum(a.load, *ALL_TOKENS) for a in aux)
    balance = mean_over_layers([balance for _, balance in balances])
    return loss, Report(nll, mtp_nll, balance, indexer_kl, load, tuple(watch.over_devices(a.seen) for a in aux))


def mean_over_layers(parts: list[Float32[Array, "..."] | None]) -> Float32[Array, ""] | None:
    """The mean over all layers that have a part, of its sum over all devices."""
    found = [part for part in parts if part is not None]
    return psum(sum(map(jnp.sum, found)), *ALL_TOKENS) / sum(part.size for part in found) if found else None


def ahead(
    batch: Batch, depth: int
) -> tuple[Int32[Array, "batch seq"], Int32[Array, "batch seq"], Float32[Array, "batch seq"]]:
    """Of each token, the one `depth` further on, that one's target, and the target's weight.

    The weight is 0 where the row or the document has ended before.
    """
    seq = batch.tokens.shape[1]

    def later(x: Array, by: int) -> Array:
        whole = all_gather("batch seq/context -> batch seq", x)
        whole = jnp.pad(whole, ((0, 0), (0, by)))
        return jax.lax.dynamic_slice_in_dim(whole, seq * jax.lax.axis_index("context") + by, seq, axis=1)

    weights = jnp.where(later(batch.segments, depth) == batch.segments, later(batch.weights, depth), 0.0)
    return later(batch.targets, depth - 1), later(batch.targets, depth), weights
