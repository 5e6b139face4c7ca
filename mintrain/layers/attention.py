"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) of Gemma 2, 3 and 4; one module, configured by data.

batch, seq: this device's sequences, `seq` dealt over `context` (context.py).  token: batch * seq.
embed: residual stream.  kv_heads, group: the query heads that share a key head.  head: width of a head.
heads_value: the values of all heads in one dim, split over `tensor` like the heads.
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
from mintrain.layers.cache import KV, append, whole
from mintrain.layers.linear import gather, normal
from mintrain.layers.norm import RMSNorm, rms_norm
from mintrain.layers.rope import angles, rotate


class Attention(eqx.Module):
    q: Float32[Array, "embed kv_heads group head"]
    k: Float32[Array, "embed kv_heads head"] | None  # None: keys and values are those of an earlier layer
    v: Float32[Array, "embed kv_heads head"] | None  # None: the values are the raw keys
    o: Float32[Array, "heads_value embed"]
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    cfg: config.Attention = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    @staticmethod
    def init(c: config.Attention, model: config.Model, *, key: PRNGKeyArray) -> "Attention":
        keys = jax.random.split(key, 4)
        n, g, h, d = c.kv_heads, c.heads // c.kv_heads, c.head_dim, model.embed
        norm = lambda value: RMSNorm.init(h, model.norm_offset, model.norm_eps, value) if c.qk_norm else None
        return Attention(
            q=normal(keys[0], (d, n, g, h), fan_in=d),
            k=None if c.shares_kv else normal(keys[1], (d, n, h), fan_in=d),
            v=None if c.shares_kv or c.k_is_v else normal(keys[2], (d, n, h), fan_in=d),
            o=normal(keys[3], (n * g * h, d), fan_in=n * g * h),
            q_norm=norm(c.q_norm_init),
            k_norm=None if c.shares_kv else norm(1.0),
            cfg=c,
            eps=model.norm_eps,
        )

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "token embed"],
        positions: Int32[Array, "batch seq"],
        segments: Int32[Array, "batch seq"],
        shared: KV | None = None,
        cache: KV | None = None,
    ) -> tuple[Float[Array, "token embed"], KV]:
        """The output, and the keys and values it was made with: `shared`, or own ones after those in `cache`."""
        c, batch = self.cfg, positions.shape[0]
        angle = angles(positions, c.rope, c.head_dim)
        w_q = gather(
            "embed/fsdp/expert kv_heads/tensor group head -> embed kv_heads/tensor group head", self.q, x.dtype
        )
        q = rearrange(jnp.einsum("td,dngh->tngh", x, w_q), "(b s) n g h -> b n g s h", b=batch)
        q = rotate(q if self.q_norm is None else self.q_norm(q), angle)
        kv = KV(*self._kv(x, angle), positions, segments) if shared is None else shared
        kv = kv if cache is None else append(cache, kv)
        keys = whole(kv)
        at = Places(positions, segments), Places(keys.positions, keys.segments)
        q = rearrange(q, "b n g s h -> b s n g h")
        runs = starts(positions.shape[1]) if cache is None else None
        out = attend_places(q, keys.k, keys.v, *at, c.scale, c.softcap, c.window, runs)

        out = rearrange(out, "b s n g h -> (b s) (n g h)")
        w_o = gather("heads_value/tensor embed/fsdp/expert -> heads_value/tensor embed", self.o, x.dtype)
        out = psum(jnp.einsum("tv,vd->td", out, w_o, preferred_element_type=jnp.float32), "tensor")
        return out.astype(x.dtype), kv

    def _kv(
        self, x: Float[Array, "token embed"], angle: Float32[Array, "batch seq half"]
    ) -> tuple[Float[Array, "batch kv_heads seq head"], Float[Array, "batch kv_heads seq head"]]:
        layout, form = "embed/fsdp/expert kv_heads/tensor head -> embed kv_heads/tensor head", "(b s) n h -> b n s h"
        project = lambda w: jnp.einsum("td,dnh->tnh", x, gather(layout, w, x.dtype))
        k = v = rearrange(project(self.k), form, b=angle.shape[0])
        if self.v is not None:
            v = rearrange(project(self.v), form, b=angle.shape[0])
        k = rotate(k if self.k_norm is None else self.k_norm(k), angle)
        return k, rms_norm(v, self.eps) if self.cfg.v_norm else v
