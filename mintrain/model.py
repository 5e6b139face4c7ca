"""The decoder: one for all families. What differs between them is data (`config.Model`).

batch, seq: sequences, `batch` split over replica x fsdp x expert and `seq` over context.  token: batch * seq, the
form in which everything but attention takes them.  embed: residual stream.
Everything here runs inside `jax.shard_map` (step.py); shapes are those of one device.
"""

from functools import partial
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from mintrain import config
from mintrain.arrays import buffer
from mintrain.layers.attention import Attention
from mintrain.layers.embedding import Embedding
from mintrain.layers.mlp import MLP
from mintrain.layers.norm import RMSNorm

Remat = Literal["none", "dots", "full"]
POLICIES = {  # what the backward pass finds saved; gathered weights never are, or FSDP would save no memory
    "none": jax.checkpoint_policies.save_anything_except_these_names("gathered"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(eqx.Module):
    attention_norm: RMSNorm
    attention: Attention
    attention_post_norm: RMSNorm | None
    mlp_norm: RMSNorm
    mlp: MLP
    mlp_post_norm: RMSNorm | None
    scalar: Float32[Array, ""] | None = buffer()

    @staticmethod
    def init(c: config.Layer, model: config.Model, *, key: PRNGKeyArray) -> "Block":
        keys = jax.random.split(key)
        norm = partial(RMSNorm.init, model.embed, model.norm_offset, model.norm_eps)
        return Block(
            attention_norm=norm(),
            attention=Attention.init(c.attention, model, key=keys[0]),
            attention_post_norm=norm() if c.post_norms else None,
            mlp_norm=norm(),
            mlp=MLP.init(c.mlp, model.embed, key=keys[1]),
            mlp_post_norm=norm() if c.post_norms else None,
            scalar=jnp.ones((), jnp.float32) if c.scalar else None,
        )

    def __call__(
        self,
        x: Float[Array, "token embed"],
        positions: Int32[Array, "batch seq"],
        segments: Int32[Array, "batch seq"],
    ) -> Float[Array, "token embed"]:
        h = self.attention(self.attention_norm(x), positions, segments)
        x = x + (h if self.attention_post_norm is None else self.attention_post_norm(h))
        h = self.mlp(self.mlp_norm(x))
        x = x + (h if self.mlp_post_norm is None else self.mlp_post_norm(h))
        return x if self.scalar is None else x * jax.lax.stop_gradient(self.scalar).astype(x.dtype)


class LM(eqx.Module):
    embedding: Embedding
    stages: tuple[tuple[Block, ...], ...]  # per stage, its pattern; every array has a leading axis of repeats
    norm: RMSNorm
    head: Embedding | None  # None: the head is the embedding table, one leaf used twice
    cfg: config.Model = eqx.field(static=True)
    compute_dtype: str = eqx.field(static=True)  # of activations and matmul inputs; parameters are float32

    @staticmethod
    def init(c: config.Model, compute_dtype: str, *, key: PRNGKeyArray) -> "LM":
        """Random parameters for training from scratch (docs/models.md says why these scales)."""
        keys = jax.random.split(key, len(c.stages) + 2)

        def pattern(stage: config.Stage, key: PRNGKeyArray) -> tuple[Block, ...]:
            layers = zip(stage.pattern, jax.random.split(key, len(stage.pattern)), strict=True)
            return tuple(Block.init(layer, c, key=k) for layer, k in layers)

        return LM(
            embedding=Embedding.init(c.vocab, c.embed, key=keys[0]),
            stages=tuple(
                jax.vmap(partial(pattern, stage))(jax.random.split(k, stage.repeats))
                for stage, k in zip(c.stages, keys[2:], strict=True)
            ),
            norm=RMSNorm.init(c.embed, c.norm_offset, c.norm_eps),
            head=None if c.tied else Embedding.init(c.vocab, c.embed, key=keys[1]),
            cfg=c,
            compute_dtype=compute_dtype,
        )

    def embed(self, tokens: Int32[Array, "token"]) -> Float[Array, "token embed"]:
        x = self.embedding(tokens, jnp.dtype(self.compute_dtype))
        return x * jnp.asarray(self.cfg.embed**0.5, x.dtype) if self.cfg.embed_scale else x

    def __call__(
        self,
        tokens: Int32[Array, "batch seq"],
        positions: Int32[Array, "batch seq"],
        segments: Int32[Array, "batch seq"],
        *,
        scan: bool = True,
        remat: Remat = "none",
    ) -> Float[Array, "token embed"]:
        """Normalised hidden states, the input of the output head.

        positions: count from 0 within each document.  segments: number a row's documents from 1; 0 is padding.
        scan: one compiled body per stage; otherwise the layers are unrolled, over the same stacked parameters.
        """
        x = self.embed(tokens.reshape(-1))
        apply = lambda block, x: block(x, positions, segments)

        def body(x: Float[Array, "token embed"], blocks: tuple[Block, ...]) -> tuple[Float[Array, "..."], None]:
            for block in blocks:
                x = jax.checkpoint(apply, policy=POLICIES[remat], prevent_cse=not scan)(block, x)
            return x, None

        for stage, blocks in zip(self.cfg.stages, self.stages, strict=True):
            if scan:
                x, _ = jax.lax.scan(body, x, blocks)
            else:
                for i in range(stage.repeats):
                    x, _ = body(x, jax.tree.map(lambda w, i=i: w[i], blocks))
        return self.norm(x)

    @property
    def output_table(self) -> Float32[Array, "vocab embed"]:
        return (self.embedding if self.head is None else self.head).table
