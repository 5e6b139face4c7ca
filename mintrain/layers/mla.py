"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), dense or over chosen keys (V3.2).

batch, seq: this device's sequences, `seq` dealt over `context` (context.py).  token: batch * seq.
embed: residual stream.  heads: split over `tensor`.  q_lora, kv_lora: ranks.
q_latent, kv_latent: the same as rows of a weight, over `fsdp` and `expert`.
head: nope + rope, what q·k sums over.  v: width of a value.  heads_value: of all heads.
compressed: kv_lora + rope, what is kept of a key.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from mintrain import config
from mintrain.collectives import psum
from mintrain.context import starts
from mintrain.layers.attend import Places, attend_places
from mintrain.layers.cache import Latents, append, whole
from mintrain.layers.indexer import Indexer
from mintrain.layers.linear import gather, normal
from mintrain.layers.norm import RMSNorm
from mintrain.layers.rope import angles, halves, logit_factor, rotate, rotation_factor
from mintrain.layers.sparse import Queries, absorb, expand, sparse_attention

EPS = 1e-6  # of the norms inside, whatever the model's is (the reference implementations do not pass it on)


class MLA(eqx.Module):
    q: Float32[Array, "embed heads head"] | None  # a plain projection, or a compressed one:
    q_a: Float32[Array, "embed q_lora"] | None
    q_norm: RMSNorm | None
    q_b: Float32[Array, "q_latent heads head"] | None
    kv_a: Float32[Array, "embed compressed"]
    kv_norm: RMSNorm
    kv_b: Float32[Array, "kv_latent heads nope_v"]
    o: Float32[Array, "heads_value embed"]
    indexer: Indexer | None
    cfg: config.MLA = eqx.field(static=True)
    warmup: bool = eqx.field(static=True)  # the indexer's dense warm-up: it learns, and attention sees every key

    @staticmethod
    def init(c: config.MLA, embed: int, warmup: bool, *, key: PRNGKeyArray) -> "MLA":
        keys, head = jax.random.split(key, 6), c.nope + c.rope_dim
        norm = lambda rank: RMSNorm.init(rank, 0.0, EPS)
        return MLA(
            q=None if c.q_lora else normal(keys[0], (embed, c.heads, head), fan_in=embed),
            q_a=normal(keys[0], (embed, c.q_lora), fan_in=embed) if c.q_lora else None,
            q_norm=norm(c.q_lora) if c.q_lora else None,
            q_b=normal(keys[1], (c.q_lora, c.heads, head), fan_in=c.q_lora) if c.q_lora else None,
            kv_a=normal(keys[2], (embed, c.kv_lora + c.rope_dim), fan_in=embed),
            kv_norm=norm(c.kv_lora),
            kv_b=normal(keys[3], (c.kv_lora, c.heads, c.nope + c.v), fan_in=c.kv_lora),
            o=normal(keys[4], (c.heads * c.v, embed), fan_in=c.heads * c.v),
            indexer=Indexer.init(c.indexer, c, embed, key=keys[5]) if c.indexer else None,
            cfg=c,
            warmup=warmup,
        )

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "token embed"],
        positions: Int32[Array, "batch seq"],
        segments: Int32[Array, "batch seq"],
        cache: Latents | None = None,
    ) -> tuple[Float[Array, "token embed"], Float32[Array, ""] | None, Latents]:
        """The output, the indexer's KL summed over the tokens of this device, and the keys, after those in `cache`.

        With a cache the expansion of keys and values is absorbed into the queries and the output (section 2.1.2).
        """
        c, batch = self.cfg, positions.shape[0]
        angle, factor = angles(positions, c.rope, c.rope_dim), rotation_factor(c.rope)
        turn = lambda y: rotate(halves(y), angle, factor)
        scale = (c.nope + c.rope_dim) ** -0.5 * logit_factor(c.rope)

        q, latent = self._queries(x)
        q = rearrange(q, "(b s) n h -> b n s h", b=batch)
        q = jnp.concatenate([q[..., : c.nope], turn(q[..., c.nope :])], axis=-1)
        kv = jnp.einsum("td,dc->tc", x, gather("embed/fsdp/expert compressed -> embed compressed", self.kv_a, x.dtype))
        kv = rearrange(kv, "(b s) c -> b s c", b=batch)
        kv = jnp.concatenate([self.kv_norm(kv[..., : c.kv_lora]), turn(kv[..., c.kv_lora :])], axis=-1)
        up = gather("kv_latent/fsdp/expert heads/tensor nope_v -> kv_latent heads/tensor nope_v", self.kv_b, x.dtype)

        sparse = self.indexer is not None and latent is not None
        index_q, index_k, index_weights = self.indexer(x, latent, positions) if sparse else (None, None, None)
        kept = Latents(kv, index_k, positions, segments)
        kept = kept if cache is None else append(cache, kept)
        keys = whole(kept)
        if sparse:
            queries = Queries(rearrange(q, "b n s h -> b s n h"), index_q, index_weights, positions, segments)
            topk = None if self.warmup else self.indexer.topk
            out, kl = sparse_attention(queries, keys, up, c.nope, scale, topk, absorbed=cache is not None)
            kl = jnp.sum(kl)
        else:
            at, kl = (Places(positions, segments), Places(keys.positions, keys.segments)), None
            q = rearrange(q, "b n s h -> b s n h")
            if cache is None:
                k, v = expand(keys.compressed, up, c.nope)
                out = attend_places(q[:, :, :, None], k, v, *at, scale, starts=starts(positions.shape[1]))[:, :, :, 0]
            else:  # one key head, which all query heads share
                k = keys.compressed[:, None]
                mixed = attend_places(absorb(q, up, c.nope)[:, :, None], k, k[..., : c.kv_lora], *at, scale)[:, :, 0]
                out = jnp.einsum("bsnc,cnv->bsnv", mixed, up[..., c.nope :])

        out = rearrange(out, "b s n v -> (b s) (n v)")
        w_o = gather("heads_value/tensor embed/fsdp/expert -> heads_value/tensor embed", self.o, x.dtype)
        out = psum(jnp.einsum("tv,vd->td", out, w_o, preferred_element_type=jnp.float32), "tensor")
        return out.astype(x.dtype), kl, kept

    def _queries(
        self, x: Float[Array, "token embed"]
    ) -> tuple[Float[Array, "token heads head"], Float[Array, "token q_lora"] | None]:
        """The queries before rotation, and what the indexer makes its own from."""
        if self.q is not None:
            w_q = gather("embed/fsdp/expert heads/tensor head -> embed heads/tensor head", self.q, x.dtype)
            return jnp.einsum("td,dnh->tnh", x, w_q), None
        w_a = gather("embed/fsdp/expert q_lora -> embed q_lora", self.q_a, x.dtype)
        latent = self.q_norm(jnp.einsum("td,dr->tr", x, w_a))
        w_b = gather("q_latent/fsdp/expert heads/tensor head -> q_latent heads/tensor head", self.q_b, x.dtype)
        return jnp.einsum("tr,rnh->tnh", latent, w_b), latent
