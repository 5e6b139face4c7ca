"""Which experts a token goes to, and how evenly they are used. Everything here is float32 by declaration.

token: batch * seq.  embed: residual stream.  routes: all experts, whole on every device.  topk: the chosen ones.
One router for DeepSeek-V2 (arXiv 2405.04434: softmax, best groups by their largest score), DeepSeek-V3
(arXiv 2412.19437: sigmoid, a bias that only chooses, best groups by their two largest) and Gemma 4 26B.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from mintrain import config, watch
from mintrain.arrays import buffer
from mintrain.collectives import psum, vary_like
from mintrain.layers.linear import gather, normal
from mintrain.layers.norm import inverse_rms

# Tokens that are multiplied at once: XLA's TPU compiler takes 10 s for a float32 product of 2048 and 20 s for its
# gradient, and 1 s in blocks.
BLOCK = 256


def router_logits(
    x: Float32[Array, "token embed"], weight: Float32[Array, "embed routes"]
) -> Float32[Array, "token routes"]:
    """A float32 product: a TPU's default precision would round the inputs to bfloat16."""
    return jnp.einsum("td,de->te", x, weight, precision=jax.lax.Precision.HIGHEST)


def router_scores(logits: Float32[Array, "token routes"], kind: str) -> Float32[Array, "token routes"]:
    return jax.nn.sigmoid(logits) if kind == "sigmoid" else jax.nn.softmax(logits, axis=-1)


def choose(ranks: Float32[Array, "token routes"], c: config.MoE) -> Int32[Array, "token topk"]:
    """The `topk` highest of the experts in the best groups, ties to the lowest index."""
    ranks = jax.lax.stop_gradient(ranks)
    if c.kept_groups < c.groups:
        grouped = rearrange(ranks, "t (g e) -> t g e", g=c.groups)
        best = jax.lax.top_k(grouped, 2 if c.score == "sigmoid" and grouped.shape[-1] > 1 else 1)[0]
        _, kept = jax.lax.top_k(jnp.sum(best, axis=-1), c.kept_groups)
        in_kept = jnp.any(kept[:, :, None] == jnp.arange(c.groups)[None, None], axis=1)
        ranks = rearrange(jnp.where(in_kept[:, :, None], grouped, -jnp.inf), "t g e -> t (g e)")
    return jax.lax.top_k(ranks, c.topk)[1]


def combine_weights(
    scores: Float32[Array, "token routes"], index: Int32[Array, "token topk"], c: config.MoE
) -> Float32[Array, "token topk"]:
    """What the chosen experts' outputs are multiplied with."""
    weights = jnp.take_along_axis(scores, index, axis=-1)
    if c.normalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * c.scaling


def expert_load(
    index: Int32[Array, "token topk"], real: Bool[Array, "token"], experts: int
) -> Float32[Array, "routes"]:
    """How many real tokens of this device go to each expert."""
    return jnp.sum(_chosen(index, real, experts), axis=0)


def _chosen(
    index: Int32[Array, "token topk"], real: Bool[Array, "token"], experts: int
) -> Float32[Array, "token routes"]:
    hits = jnp.any(index[:, :, None] == jnp.arange(experts)[None, None], axis=1)
    return (hits & real[:, None]).astype(jnp.float32)


def balance_loss(
    scores: Float32[Array, "token routes"], index: Int32[Array, "token topk"], real: Bool[Array, "batch seq"]
) -> Float32[Array, ""]:
    """The loss of DeepSeek-V2 (equations 23 to 25) and V3 (17 to 20), times the real tokens of this device.

    In each sequence, the share of tokens that chose an expert times its mean normalised score, summed over the
    experts: 1 where all are used alike. A sequence may be split over `context`.
    """
    batch, experts, topk = real.shape[0], scores.shape[1], index.shape[1]
    per_row = lambda x: jnp.sum(rearrange(x, "(b s) e -> b s e", b=batch), axis=1)
    counts = psum(per_row(_chosen(index, real.reshape(-1), experts)), "context")
    tokens = psum(jnp.sum(real, axis=1, dtype=jnp.float32), "context")
    share = counts * experts / (topk * jnp.maximum(tokens, 1.0)[:, None])
    normalised = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    return jnp.sum(share * per_row(jnp.where(real.reshape(-1)[:, None], normalised, 0.0)))


def balanced_bias(
    bias: Float32[Array, "*repeats routes"], load: Float32[Array, "*repeats routes"], rate: float
) -> Float32[Array, "*repeats routes"]:
    """Balance without a loss (arXiv 2408.15664): raise the bias of experts that got less than the mean."""
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


class Router(eqx.Module):
    weight: Float32[Array, "embed routes"]
    scale: Float32[Array, "dim"] | None  # of the normalised input (Gemma 4)
    expert_scale: Float32[Array, "routes"] | None
    cfg: config.MoE = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    bias: Float32[Array, "routes"] | None = buffer()  # it chooses and has no gradient; `balanced_bias` moves it

    @staticmethod
    def init(c: config.MoE, model: config.Model, *, key: PRNGKeyArray) -> "Router":
        """Logits of unit size for an input of unit size; Gemma 4 divides by sqrt(embed) itself."""
        return Router(
            weight=normal(key, (model.embed, c.experts), fan_in=1 if c.learned_scales else model.embed),
            scale=jnp.ones(model.embed, jnp.float32) if c.learned_scales else None,
            expert_scale=jnp.ones(c.experts, jnp.float32) if c.learned_scales else None,
            bias=None if c.bias_rate is None else jnp.zeros(c.experts, jnp.float32),
            cfg=c,
            eps=model.norm_eps,
        )

    @jax.named_scope("router")
    def __call__(
        self, x: Float[Array, "token embed"]
    ) -> tuple[Int32[Array, "token topk"], Float32[Array, "token topk"], Float32[Array, "token routes"]]:
        """The chosen experts of each token, their weights, and the scores of all."""
        x = x.astype(jnp.float32)
        if self.scale is not None:
            x = x * inverse_rms(x, self.eps) * (vary_like(self.scale, x) * x.shape[-1] ** -0.5)[None]
        weight = gather("embed/fsdp/expert routes -> embed routes", self.weight, x.dtype)
        one = lambda token: router_logits(token[None], weight)[0]
        logits = jax.lax.map(one, x, batch_size=BLOCK)
        watch.record("router_logit", lambda: jnp.max(jnp.abs(logits)))
        scores = router_scores(logits, self.cfg.score)
        index = choose(scores if self.bias is None else scores + self.bias[None], self.cfg)
        weights = combine_weights(scores, index, self.cfg)
        if self.expert_scale is not None:
            weights = weights * vary_like(self.expert_scale, x)[index]
        return index, weights, scores
