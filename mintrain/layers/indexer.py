"""The lightning indexer of DeepSeek-V3.2 (arXiv 2512.02556): a small attention that chooses the keys of the large one.

batch: sequences.  seq, query, key: positions.  token: batch * seq.  index_heads, index_dim: the indexer's own heads.
chosen: at most topk keys of a query.  embed: residual stream.  q_latent: the compressed query, split over `fsdp` and
`expert` in weights.  Logits and scores are float32 by declaration: a key that is not chosen is not seen at all.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from mintrain import config
from mintrain.layers.linear import gather, normal
from mintrain.layers.norm import LayerNorm
from mintrain.layers.rope import angles, rotate, rotation_factor


def indexer_logits(
    q: Float[Array, "batch query index_heads index_dim"], k: Float[Array, "batch key index_dim"]
) -> Float32[Array, "batch index_heads query key"]:
    """`relu(q·k / sqrt(index_dim))` of every head; all heads share one key."""
    products = jnp.einsum("bqnd,bkd->bnqk", q, k, preferred_element_type=jnp.float32)
    return jax.nn.relu(products * q.shape[-1] ** -0.5)


def indexer_scores(
    logits: Float32[Array, "batch index_heads query key"], weights: Float32[Array, "batch query index_heads"]
) -> Float32[Array, "batch query key"]:
    """The sum over heads, weighted by what the query says of each (equation 1). A zero has no sign."""
    scores = jnp.sum(rearrange(weights, "b q n -> b n q 1") * logits, axis=1)
    return jnp.where(scores == 0, 0.0, scores)


def top_keys(
    scores: Float32[Array, "batch query key"], visible: Bool[Array, "batch query key"], topk: int
) -> tuple[Int32[Array, "batch query chosen"], Bool[Array, "batch query chosen"]]:
    """The `min(topk, visible)` visible keys of the highest scores, ties to the lowest index.

    Returns their indices, and which of them are real: a query that sees fewer than topk keys gets all of them.
    """
    scores = jnp.where(visible, jax.lax.stop_gradient(scores), -jnp.inf)
    _, index = jax.lax.top_k(scores, min(topk, scores.shape[-1]))
    return index, jnp.take_along_axis(visible, index, axis=-1)


def top_mask(
    scores: Float32[Array, "batch query key"], visible: Bool[Array, "batch query key"], topk: int
) -> Bool[Array, "batch query key"]:
    """The same keys as `top_keys`, as a mask."""
    if topk >= scores.shape[-1]:
        return visible
    scores = jnp.where(visible, jax.lax.stop_gradient(scores), -jnp.inf)
    least, last = (x[..., -1:] for x in jax.lax.top_k(scores, topk))  # among ties top_k goes from low to high indices
    place = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None]
    return visible & ((scores > least) | ((scores == least) & (place <= last)))


def indexer_kl(
    scores: Float32[Array, "batch query key"],
    target: Float32[Array, "batch query key"],
    mask: Bool[Array, "batch query key"],
) -> Float32[Array, "batch query"]:
    """KL(target || softmax of the scores over the masked keys) in nats, equations 3 and 4.

    target: a distribution over the same keys, of which only the values count. 0 for a query without any.
    """
    target = jax.lax.stop_gradient(target)
    scores = jnp.where(mask, scores, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    shifted = jnp.where(mask, scores - jnp.where(jnp.isfinite(largest), largest, 0.0), 0.0)
    total = jnp.sum(jnp.where(mask, jnp.exp(shifted), 0.0), axis=-1, keepdims=True)
    log_q = shifted - jnp.log(jnp.where(total > 0, total, 1.0))
    positive = mask & (target > 0)
    return jnp.sum(jnp.where(positive, target * (jnp.log(jnp.where(positive, target, 1.0)) - log_q), 0.0), axis=-1)


class Indexer(eqx.Module):
    q: Float32[Array, "q_latent index_heads index_dim"]
    k: Float32[Array, "embed index_dim"]
    k_norm: LayerNorm
    head_weights: Float32[Array, "embed index_heads"]
    rope: config.Rope = eqx.field(static=True)
    rope_dim: int = eqx.field(static=True)
    topk: int = eqx.field(static=True)

    @staticmethod
    def init(c: config.Indexer, mla: config.MLA, embed: int, *, key: PRNGKeyArray) -> "Indexer":
        keys, rank = jax.random.split(key, 3), mla.q_lora or 0
        return Indexer(
            q=normal(keys[0], (rank, c.heads, c.head_dim), fan_in=rank),
            k=normal(keys[1], (embed, c.head_dim), fan_in=embed),
            k_norm=LayerNorm.init(c.head_dim, 1e-6),
            head_weights=normal(keys[2], (embed, c.heads), fan_in=embed),
            rope=mla.rope,
            rope_dim=mla.rope_dim,
            topk=c.topk,
        )

    @jax.named_scope("indexer")
    def __call__(
        self, x: Float[Array, "token embed"], latent: Float[Array, "token q_lora"], positions: Int32[Array, "batch seq"]
    ) -> tuple[
        Float[Array, "batch seq index_heads index_dim"],
        Float[Array, "batch seq index_dim"],
        Float32[Array, "batch seq index_heads"],
    ]:
        """Queries, keys and the weights of the heads. Nothing flows back into `x` and `latent`.

        The first `rope_dim` dims turn, in halves; the attention that it serves turns its last ones, in pairs.
        """
        x, latent = jax.lax.stop_gradient((x, latent))
        batch = positions.shape[0]
        angle, factor = angles(positions, self.rope, self.rope_dim), rotation_factor(self.rope)
        w_q = gather("q_latent/fsdp/expert index_heads index_dim -> q_latent index_heads index_dim", self.q, x.dtype)
        q = rearrange(jnp.einsum("tr,rnd->tnd", latent, w_q), "(b s) n d -> b n s d", b=batch)
        k = jnp.einsum("te,ed->td", x, gather("embed/fsdp/expert index_dim -> embed index_dim", self.k, x.dtype))
        k = rearrange(self.k_norm(k), "(b s) d -> b s d", b=batch)
        turn = lambda y: jnp.concatenate(
            [rotate(y[..., : self.rope_dim], angle, factor), y[..., self.rope_dim :]], axis=-1
        )
        w = gather("embed/fsdp/expert index_heads -> embed index_heads", self.head_weights, x.dtype)
        weights = jnp.einsum("te,en->tn", x, w, preferred_element_type=jnp.float32) * w.shape[1] ** -0.5
        return rearrange(turn(q), "b n s d -> b s n d"), turn(k), rearrange(weights, "(b s) n -> b s n", b=batch)
