"""The decoder: one for all families. What differs between them is data (`config.Model`).

batch, seq: sequences, `batch` split over replica x fsdp x expert and `seq` over context.  token: batch * seq, the
form in which everything but attention takes them.  embed: residual stream.
Everything here runs inside `jax.shard_map` (step.py); shapes are those of one device.
"""

from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from mintrain import config, watch
from mintrain.block import Aux, Block
from mintrain.layers.cache import KV, Latents
from mintrain.layers.embedding import Embedding
from mintrain.layers.linear import gather, normal
from mintrain.layers.norm import RMSNorm
from mintrain.layers.per_layer import PerLayerInputs
from mintrain.lora import Adapted

Remat = Literal["none", "dots", "full"]
POLICIES = {  # what the backward pass finds saved; gathered weights never are, or FSDP would save no memory
    "none": jax.checkpoint_policies.save_anything_except_these_names("gathered"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Caches(eqx.Module):
    """What decoding keeps of each layer, in the order of `LM.stages`; None for layers that share keys."""

    stages: tuple[tuple[KV | Latents | None, ...], ...]


class MTP(eqx.Module):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): a layer that reads one token further.

    Token vectors and output head are the model's.
    """

    hidden_norm: RMSNorm
    token_norm: RMSNorm
    join: Float32[Array, "pair embed joined"]  # of token and hidden state
    block: Block
    norm: RMSNorm

    @staticmethod
    def init(c: config.Layer, model: config.Model, warmup: bool, *, key: PRNGKeyArray) -> "MTP":
        keys, norm = jax.random.split(key), partial(RMSNorm.init, model.embed, model.norm_offset, model.norm_eps)
        join = normal(keys[0], (2, model.embed, model.embed), fan_in=2 * model.embed)
        return MTP(norm(), norm(), join, Block.init(c, model, warmup, key=keys[1]), norm())

    def __call__(
        self,
        x: Float[Array, "token embed"],
        following: Float[Array, "token embed"],
        positions: Int32[Array, "batch seq"],
        segments: Int32[Array, "batch seq"],
    ) -> tuple[Float[Array, "token embed"], Aux]:
        """Normalised hidden states from those of the model (or the module before) and the next token's vector."""
        pair = jnp.stack([self.token_norm(following), self.hidden_norm(x)])
        join = gather("pair embed/fsdp/expert joined -> pair embed joined", self.join, x.dtype)
        x, aux, _ = self.block(jnp.einsum("ptd,pdj->tj", pair, join), positions, segments)
        return self.norm(x), aux


class LM(eqx.Module):
    embedding: Embedding
    per_layer_inputs: PerLayerInputs | None
    stages: tuple[tuple[Block | Adapted, ...], ...]  # per stage, its pattern; every array has a leading axis of repeats
    norm: RMSNorm
    head: Embedding | None  # None: the head is the embedding table, one leaf used twice
    mtp: tuple[MTP, ...]
    cfg: config.Model = eqx.field(static=True)
    compute_dtype: str = eqx.field(static=True)  # of activations and matmul inputs; parameters are float32

    @staticmethod
    def init(c: config.Model, compute_dtype: str, warmup: bool = False, *, key: PRNGKeyArray) -> "LM":
        """Random parameters for training from scratch (docs/models.md says why these scales).

        warmup: the indexers' first stage, in which attention is dense (config.Config.indexer).
        """
        keys = jax.random.split(key, len(c.stages) + len(c.mtp) + 3)
        at_stages, at_mtp = keys[3 : 3 + len(c.stages)], keys[3 + len(c.stages) :]

        def pattern(stage: config.Stage, key: PRNGKeyArray) -> tuple[Block, ...]:
            layers = zip(stage.pattern, jax.random.split(key, len(stage.pattern)), strict=True)
            return tuple(Block.init(layer, c, warmup, key=k) for layer, k in layers)

        small = c.embed**-0.5
        return LM(
            embedding=Embedding.init(c.vocab, c.embed, small if c.embed_scale else 1.0, key=keys[0]),
            per_layer_inputs=PerLayerInputs.init(c, key=keys[2]) if c.per_layer_input else None,
            stages=tuple(
                jax.vmap(partial(pattern, stage))(jax.random.split(k, stage.repeats))
                for stage, k in zip(c.stages, at_stages, strict=True)
            ),
            norm=RMSNorm.init(c.embed, c.norm_offset, c.norm_eps),
            head=None if c.tied else Embedding.init(c.vocab, c.embed, small, key=keys[1]),
            mtp=tuple(MTP.init(layer, c, warmup, key=k) for layer, k in zip(c.mtp, at_mtp, strict=True)),
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
        watched: bool = False,
        caches: Caches | None = None,
    ) -> tuple[Float[Array, "token embed"], tuple[Aux, ...], Caches | None]:
        """Normalised hidden states, the input of the output head, and what the layers say beside them.

        positions: count from 0 within each document.  segments: number a row's documents from 1; 0 is padding.
        scan: one compiled body per stage; otherwise the layers are unrolled, over the same stacked parameters.
        watched: layers also say what they have seen (watch.py).
        caches: keys of the tokens before these; they come back with these.
        """
        x = self.embed(tokens.reshape(-1))
        inputs = None if self.per_layer_inputs is None else self.per_layer_inputs(tokens.reshape(-1), x)
        apply = watch.layer(lambda block, x, *inputs: block(x, positions, segments, *inputs), watched)
        kinds = {layer.attention.kind for layer in self.cfg.layers if _shares(layer)}
        shared: dict[str, KV] = {}  # keys and values by kind of layer, from the last stage that made its own
        done, all_aux, all_kept = 0, [], []

        def body(
            at: int, x: Float[Array, "token embed"], xs: tuple[tuple[eqx.Module, ...], Any, Any]
        ) -> tuple[Float[Array, "token embed"], tuple[tuple[Aux, ...], dict[str, KV], Any]]:
            auxs, made, caches = [], {}, []
            for i, (layer, block) in enumerate(zip(self.cfg.stages[at].pattern, xs[0], strict=True)):
                layer_input, cache = (None if part is None else part[i] for part in xs[1:])
                kv = shared[layer.attention.kind] if _shares(layer) else None
                step = jax.checkpoint(apply, policy=POLICIES[remat], prevent_cse=not scan)
                with jax.named_scope(f"stages[{at}][{i}]"):
                    x, aux, kept = step(block, x, layer_input, kv, cache)
                auxs.append(aux)
                caches.append(None if cache is None else kept)
                if kinds and not _shares(layer) and layer.attention.kind in kinds:
                    made[layer.attention.kind] = kept
            return x, (tuple(auxs), made, tuple(caches))

        for i, (stage, blocks) in enumerate(zip(self.cfg.stages, self.stages, strict=True)):
            layers, layer_inputs = len(stage.pattern) * stage.repeats, None
            if inputs is not None:
                layer_inputs = rearrange(inputs[done : done + layers], "(r p) t w -> r p t w", r=stage.repeats)
            xs = blocks, layer_inputs, None if caches is None else caches.stages[i]
            done += layers
            if scan:
                x, (aux, made, kept) = jax.lax.scan(partial(body, i), x, xs)
            else:
                steps = []
                for repeat in range(stage.repeats):
                    with jax.named_scope(f"repeat{repeat}"):
                        x, y = body(i, x, jax.tree.map(lambda w, repeat=repeat: w[repeat], xs))
                    steps.append(y)
                aux, made, kept = jax.tree.map(lambda *y: jnp.stack(y), *steps)
            shared |= jax.tree.map(lambda y: y[-1], made)
            all_aux.extend(aux)
            all_kept.append(kept)
        return self.norm(x), tuple(all_aux), None if caches is None else Caches(tuple(all_kept))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All layers: of the stages, each with its repeats stacked, then of `mtp`."""
        layers = [layer for stage in self.stages for layer in stage]
        return tuple(_bare(layer) for layer in (*layers, *(module.block for module in self.mtp)))

    @property
    def output_table(self) -> Float32[Array, "vocab embed"]:
        return (self.embedding if self.head is None else self.head).table


def _bare(layer: eqx.Module) -> Block:
    """A layer without what is around it, such as adapters."""
    return layer if isinstance(layer, Block) else _bare(layer.block)


def _shares(layer: config.Layer) -> bool:
    return isinstance(layer.attention, config.Attention) and layer.attention.shares_kv
