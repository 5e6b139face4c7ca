"""One layer of the decoder: attention, then an MLP, experts or both. What it holds is data (`config.Layer`).

batch, seq: sequences, `batch` split over replica x fsdp x expert and `seq` over context.  token: batch * seq, the
form in which everything but attention takes them.  embed: residual stream.  routes: all experts.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from mintrain import config
from mintrain.arrays import buffer
from mintrain.layers.attention import Attention
from mintrain.layers.cache import KV, Latents
from mintrain.layers.mla import MLA
from mintrain.layers.mlp import MLP
from mintrain.layers.moe import MoE
from mintrain.layers.norm import RMSNorm
from mintrain.layers.per_layer import PerLayerGate


class Aux(eqx.Module):
    """What a layer says beside its output, summed over this device's real tokens; None where it has no such part."""

    load: Float32[Array, "*repeats routes"] | None = None  # tokens of each expert
    balance: Float32[Array, "*repeats"] | None = None  # the router's balance loss
    indexer_kl: Float32[Array, "*repeats"] | None = None  # the indexer's loss, nats
    seen: dict[str, Float32[Array, "*repeats"]] | None = None  # watch.py; of one device, and no sums


class Branches(eqx.Module):
    """Gemma 4 26B gives the dense MLP and the experts norms of their own (`mlp_norm` is that of the dense one)."""

    mlp_post_norm: RMSNorm
    moe_norm: RMSNorm
    moe_post_norm: RMSNorm


class Block(eqx.Module):
    attention_norm: RMSNorm
    attention: Attention | MLA
    attention_post_norm: RMSNorm | None
    mlp_norm: RMSNorm
    mlp: MLP | None
    moe: MoE | None
    branches: Branches | None
    mlp_post_norm: RMSNorm | None
    per_layer: PerLayerGate | None
    scalar: Float32[Array, ""] | None = buffer()

    @staticmethod
    def init(c: config.Layer, model: config.Model, warmup: bool, *, key: PRNGKeyArray) -> "Block":
        keys = jax.random.split(key, 4)
        norm = partial(RMSNorm.init, model.embed, model.norm_offset, model.norm_eps)
        if isinstance(c.attention, config.MLA):
            attention = MLA.init(c.attention, model.embed, warmup, key=keys[0])
        else:
            attention = Attention.init(c.attention, model, key=keys[0])
        return Block(
            attention_norm=norm(),
            attention=attention,
            attention_post_norm=norm() if c.post_norms else None,
            mlp_norm=norm(),
            mlp=MLP.init(c.mlp, model.embed, key=keys[1]) if c.mlp else None,
            moe=MoE.init(c.moe, model, key=keys[2]) if c.moe else None,
            branches=Branches(norm(), norm(), norm()) if c.post_norms and c.mlp and c.moe else None,
            mlp_post_norm=norm() if c.post_norms else None,
            per_layer=PerLayerGate.init(model, key=keys[3]) if model.per_layer_input else None,
            scalar=jnp.ones((), jnp.float32) if c.scalar else None,
        )

    def __call__(
        self,
        x: Float[Array, "token embed"],
        positions: Int32[Array, "batch seq"],
        segments: Int32[Array, "batch seq"],
        layer_input: Float[Array, "token width"] | None = None,
        shared: KV | None = None,
        cache: KV | Latents | None = None,
    ) -> tuple[Float[Array, "token embed"], Aux, KV | Latents]:
        """The residual stream, what the layer says beside it, and its keys, after those in `cache`.

        shared: keys and values of an earlier layer, for one that has none.
        """
        h, kl = self.attention_norm(x), None
        if isinstance(self.attention, MLA):
            h, kl, kept = self.attention(h, positions, segments, cache)
        else:
            h, kept = self.attention(h, positions, segments, shared, cache)
        x = x + (h if self.attention_post_norm is None else self.attention_post_norm(h))

        h, load, balance = self._feed_forward(x, segments)
        x = x + (h if self.mlp_post_norm is None else self.mlp_post_norm(h))
        if self.per_layer is not None:
            x = x + self.per_layer(x, layer_input)
        if self.scalar is not None:
            x = x * jax.lax.stop_gradient(self.scalar).astype(x.dtype)
        return x, Aux(load, balance, kl), kept

    def _feed_forward(
        self, x: Float[Array, "token embed"], segments: Int32[Array, "batch seq"]
    ) -> tuple[Float[Array, "token embed"], Float32[Array, "routes"] | None, Float32[Array, ""] | None]:
        h = self.mlp_norm(x)
        if self.moe is None:
            return self.mlp(h), None, None
        if self.branches is None:
            routed, load, balance = self.moe(h, h, segments > 0)
            return routed if self.mlp is None else routed + self.mlp(h), load, balance
        routed, load, balance = self.moe(self.branches.moe_norm(x), x, segments > 0)
        dense = self.branches.mlp_post_norm(self.mlp(h))
        return dense + self.branches.moe_post_norm(routed), load, balance
