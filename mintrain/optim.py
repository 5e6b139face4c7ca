"""The optimizer, from optax. It runs outside `shard_map`, on whole arrays, in the same jit as the gradient."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int32, PyTree

from mintrain.arrays import Weight, weights
from mintrain.config import Config, Optim
from mintrain.model import LM


def schedule(cfg: Optim, steps: int) -> Callable[[Int32[Array, ""]], Float32[Array, ""]]:
    """The learning rate by the number of applied updates. It reaches `lr * final_lr` at `steps`.

    wsd is warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395), with a linear decay.
    """
    warmup = min(cfg.warmup, steps)
    decay = steps - warmup if cfg.schedule == "cosine" else min(round(cfg.decay_fraction * steps), steps - warmup)
    if cfg.schedule == "cosine":
        end = optax.cosine_decay_schedule(1.0, max(decay, 1), alpha=cfg.final_lr)
    else:
        end = optax.linear_schedule(1.0, cfg.final_lr, max(decay, 1))
    start = optax.linear_schedule(1.0 / max(warmup, 1), 1.0, max(warmup - 1, 1))
    relative = optax.join_schedules([start, optax.constant_schedule(1.0), end], [warmup, steps - decay])

    def lr(count: Int32[Array, ""]) -> Float32[Array, ""]:
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(cfg.lr * relative(count), jnp.float32)

    return lr


def trainable(cfg: Config, model: LM) -> LM:
    """Which weights a run trains: True or False for each. The others have no gradients and no optimizer state."""
    part = "indexer" if cfg.indexer == "warmup" else "adapters" if cfg.lora.rank else ""
    return _per_weight(model, lambda weight: not weight.buffer and part in weight.path)


def optimizer(cfg: Optim, steps: int, model: LM) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW or Muon. `model` may be abstract: only its annotations are read.

    Indexers are clipped apart from the rest, as nothing else joins their gradients.

    Under Muon the matrices of the layers are orthogonalised and scaled so that an update has the size of
    AdamW's (Liu et al. 2025, arXiv 2502.16982): one `lr` serves both. Embeddings and norms use AdamW.
    """
    lr = schedule(cfg, steps)
    # Trees of the model's type are callable, and optax would call them: hence the lambdas.
    if cfg.name == "adamw":
        decayed = _per_weight(model, lambda weight: len(weight.dims) >= 2)
        update = optax.adamw(
            lr, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=lambda _: decayed
        )
    else:
        matrices = _per_weight(model, _matrix)
        update = optax.contrib.muon(
            lr,
            beta=cfg.b2,
            weight_decay=cfg.weight_decay,
            adam_b1=cfg.b1,
            adam_b2=cfg.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda _: matrices,
        )
    indexer = _per_weight(model, lambda weight: "indexer" in weight.path)

    def clip(grads: LM, _: LM | None) -> LM:
        norms = {kind: group_norm(grads, indexer, kind) for kind in (True, False)}
        shrink = {kind: jnp.minimum(1.0, cfg.clip / jnp.maximum(norm, cfg.clip)) for kind, norm in norms.items()}
        return jax.tree.map(lambda g, kind: g * shrink[kind], grads, indexer)

    whole = optax.chain(optax.stateless(clip), update)
    return rounded(whole) if cfg.moments == "bfloat16" else whole


class Rounded(eqx.Module):
    """An optimizer's state with moments in bfloat16, as DeepSeek-V3 keeps them (arXiv 2412.19437, section 3.3.2)."""

    state: PyTree[BFloat16[Array, "..."] | Int32[Array, "..."]]


def rounded(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Half the memory between steps. An update is computed in float32, and its moments rounded after it."""

    def cast(tree: PyTree, old: str, new: str) -> PyTree:
        return jax.tree.map(lambda x: x.astype(new) if x.dtype == old else x, tree)

    def init(model: LM) -> Rounded:
        return Rounded(cast(transform.init(model), "float32", "bfloat16"))

    def update(grads: LM, opt: Rounded, model: LM) -> tuple[LM, Rounded]:
        updates, state = transform.update(grads, cast(opt.state, "bfloat16", "float32"), model)
        return updates, Rounded(cast(state, "float32", "bfloat16"))

    return optax.GradientTransformation(init, update)


def group_norm(grads: LM, groups: LM, group: bool) -> Float32[Array, ""]:
    """The norm of the gradients of one group of weights."""
    return optax.tree.norm(
        [g for g, kind in zip(jax.tree.leaves(grads), jax.tree.leaves(groups), strict=True) if kind == group]
    )


def _per_weight(model: LM, value: Callable[[Weight], Any]) -> LM:
    return jax.tree.unflatten(jax.tree.structure(model), [value(weight) for weight in weights(model)])


def _matrix(weight: Weight) -> optax.contrib.MuonDimensionNumbers | None:
    """The axes of both sides, from the end: a stage's repeats come first."""
    if weight.sides is None:
        return None
    inward, outward = weight.sides
    axes = lambda dims: tuple(weight.dims.index(dim) - len(weight.dims) for dim in dims)
    return optax.contrib.MuonDimensionNumbers(axes(inward), axes(outward))
