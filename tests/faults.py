"""Faults planted in the tiny models: in weights, in the optimizer's state, in the batch, and in the code.

Those in the code do nothing unless a weight holds MARK or a row is fully masked, so that one program serves for all.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mintrain import loss, numerics, step
from mintrain.layers import attend
from mintrain.layers.attention import Attention
from mintrain.layers.indexer import Indexer
from mintrain.layers.mla import MLA
from mintrain.layers.mlp import MLP
from mintrain.layers.moe import MoE

HUGE, MARK = 3e38, 1234.0
# Two repeats of each pattern. A norm without epsilon: a zero vector makes 0/0.
GEMMA = dataclasses.replace(
    tiny.GEMMA4, stages=tiny.stages(tiny.PATTERN * 2 + tiny.LATER * 2), norm_eps=0.0, norm_offset=0.0
)
DEEPSEEK = dataclasses.replace(tiny.DEEPSEEK, stages=tiny.stages((tiny.DENSE,) * 2 + (tiny.SPARSE,) * 2))


class Fault(NamedTuple):
    path: str  # the weight, or the part of the state or the batch, that it is planted in
    repeat: int | None  # of its stage
    change: Callable[[np.ndarray], np.ndarray]
    layer: int | None  # where it must be found,
    module: str
    operations: tuple[str, ...]
    phase: str = "forward"


def fill(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.full_like(x, value)


def mark(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.reshape(-1)[-1] = MARK
    return x


def forget(x: np.ndarray) -> np.ndarray:
    """Padding at the end of a row: its queries see no key."""
    x = x.copy()
    x[..., 0, -3:] = 0
    return x


DOT = ("dot_general",)
SCALE = ("mul",)
GROUPED = ("cond",)  # on a CPU the product of the experts is a branch (`platform_dependent`)
BACKWARD = "backward"

GEMMA_FAULTS = {
    "q": Fault("stages[0][0].attention.q", 1, fill(HUGE), 2, "stages[0][0].attention", DOT),
    "k": Fault("stages[0][1].attention.k", 0, fill(HUGE), 1, "stages[0][1].attention", DOT),
    "v": Fault("stages[0][0].attention.v", 0, fill(HUGE), 0, "stages[0][0].attention", DOT),
    "o": Fault("stages[1][1].attention.o", 0, fill(HUGE), 5, "stages[1][1].attention", DOT),
    "q_norm": Fault("stages[0][0].attention.q_norm.scale", 1, fill(HUGE), 2, "stages[0][0].attention", SCALE),
    "gate": Fault("stages[0][1].mlp.gate", 1, fill(HUGE), 3, "stages[0][1].mlp", DOT),
    "up": Fault("stages[1][0].mlp.up", 1, fill(HUGE), 6, "stages[1][0].mlp", DOT),
    "down": Fault("stages[1][1].mlp.down", 1, fill(HUGE), 7, "stages[1][1].mlp", DOT),
    "router": Fault("stages[1][0].moe.router.weight", 0, fill(HUGE), 4, "stages[1][0].moe.router", DOT),
    "experts in": Fault("stages[1][1].moe.gate_up", 0, fill(HUGE), 5, "stages[1][1].moe", GROUPED),
    "experts out": Fault("stages[1][0].moe.down", 1, fill(HUGE), 6, "stages[1][0].moe", GROUPED),
    "per-layer gate": Fault("stages[0][1].per_layer.gate", 0, fill(HUGE), 1, "stages[0][1].per_layer", DOT),
    "per-layer inputs": Fault("per_layer_inputs.projection", None, fill(HUGE), None, "", DOT),
    "embedding": Fault("embedding.table", None, fill(HUGE), None, "", SCALE),
    "last norm": Fault("norm.scale", None, fill(HUGE), None, "", SCALE),
    "post norm": Fault("stages[1][0].mlp_post_norm.scale", 1, fill(HUGE), 6, "stages[1][0]", SCALE),
    "zero vector": Fault("stages[0][1].attention.o", 1, fill(0.0), 3, "stages[0][1]", ("rsqrt",)),
    "layer scalar": Fault("stages[0][1].scalar", 1, fill(HUGE), 3, "stages[0][1]", SCALE),
    "masked row": Fault("batch.segments", None, forget, 0, "stages[0][0].attention", ("sub", "exp")),
    "attention backward": Fault("stages[1][0].attention.o", 1, mark, 6, "stages[1][0].attention", ("div",), BACKWARD),
    "mlp backward": Fault("stages[0][0].mlp.gate", 1, mark, 2, "stages[0][0].mlp", ("div",), BACKWARD),
    "experts backward": Fault("stages[1][1].moe.down", 1, mark, 7, "stages[1][1].moe", ("div",), BACKWARD),
    "second moment": Fault("opt.nu", None, fill(-1.0), None, "optimizer", ("sqrt",)),
}

DEEPSEEK_FAULTS = {
    "queries": Fault("stages[0][0].attention.q_b", 1, fill(HUGE), 1, "stages[0][0].attention", DOT),
    "latents": Fault("stages[0][0].attention.kv_a", 0, fill(HUGE), 0, "stages[0][0].attention", DOT),
    "expansion": Fault("stages[1][0].attention.kv_b", 1, fill(HUGE), 3, "stages[1][0].attention", DOT),
    "latent norm": Fault("stages[1][0].attention.kv_norm.scale", 0, fill(HUGE), 2, "stages[1][0].attention", SCALE),
    "indexer queries": Fault(
        "stages[1][0].attention.indexer.q", 1, fill(HUGE), 3, "stages[1][0].attention.indexer", DOT
    ),
    "indexer keys": Fault(
        "stages[0][0].attention.indexer.k_norm.scale", 1, fill(HUGE), 1, "stages[0][0].attention.indexer", SCALE
    ),
    "indexer heads": Fault(
        "stages[1][0].attention.indexer.head_weights", 0, fill(HUGE), 2, "stages[1][0].attention.indexer", DOT
    ),
    "routed experts": Fault("stages[1][0].moe.gate_up", 1, fill(HUGE), 3, "stages[1][0].moe", GROUPED),
    "shared expert": Fault("stages[1][0].mlp.down", 0, fill(HUGE), 2, "stages[1][0].mlp", DOT),
    "mtp join": Fault("mtp[0].join", None, fill(HUGE), 4, "mtp[0]", DOT),
    "mtp mlp": Fault("mtp[0].block.mlp.up", None, fill(HUGE), 4, "mtp[0].mlp", DOT),
    "head": Fault("head.table", None, fill(HUGE), None, "head", DOT),
    "head backward": Fault("head.table", None, mark, None, "head", ("div",), BACKWARD),
    "attention backward": Fault("stages[1][0].attention.o", 0, mark, 2, "stages[1][0].attention", ("div",), BACKWARD),
    "indexer backward": Fault(
        "stages[0][0].attention.indexer.k", 1, mark, 1, "stages[0][0].attention.indexer", ("div",), BACKWARD
    ),
    "first moment": Fault("opt.mu", None, fill(HUGE), None, "optimizer", ("mul", "div")),
}

FAULTS = {"gemma": GEMMA_FAULTS, "deepseek": DEEPSEEK_FAULTS}
MODELS = {"gemma": GEMMA, "deepseek": DEEPSEEK}


@jax.custom_vjp
def poison(x, weight):
    """`x`, whose gradient is divided by zero where `weight` is marked."""
    return x


def _forward(x, weight):
    marked = jnp.any(weight == MARK).astype(jnp.float32)
    axes = jax.typeof(marked).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return x, jax.lax.pmax(marked, tuple(axes)) if axes else marked


def _backward(marked, g):
    return (g / (1 - marked).astype(g.dtype), None)


poison.defvjp(_forward, _backward)


def plant(patch: pytest.MonkeyPatch) -> None:
    """Put the faults of the code into it."""

    def around(owner: type, scope: str, change: Callable) -> None:
        original = owner.__call__
        changed = lambda self, *inputs: change(self, original(self, *inputs))
        patch.setattr(owner, "__call__", jax.named_scope(scope)(changed))

    first = lambda weight: lambda self, out: (poison(out[0], weight(self)), *out[1:])
    around(MLP, "mlp", lambda self, out: poison(out, self.gate))
    around(MoE, "moe", first(lambda self: self.down))
    around(Attention, "attention", first(lambda self: self.o))
    around(MLA, "attention", first(lambda self: self.o))
    around(Indexer, "indexer", lambda self, out: (out[0], poison(out[1], self.k), out[2]))

    def unsafe(logits, mask):
        """The softmax of a row without a visible key is NaN: -inf - -inf."""
        return jax.nn.softmax(jnp.where(mask[:, None, None], logits, -jnp.inf), axis=-1)

    patch.setattr(attend, "masked_softmax", unsafe)
    logits = loss.output_logits
    patch.setattr(loss, "output_logits", lambda x, table, cap: poison(logits(x, table, cap), table))


def plant_in(fault: Fault, state: step.State, batch: loss.Batch) -> tuple[step.State, loss.Batch]:
    """The same state and batch with this fault."""

    def changed(x: jax.Array) -> jax.Array:
        value = np.asarray(x).copy()
        if fault.repeat is None:
            value = fault.change(value)
        else:
            value[fault.repeat] = fault.change(value[fault.repeat])
        return jax.device_put(value, x.sharding)

    if fault.path == "batch.segments":
        return state, eqx.tree_at(lambda b: b.segments, batch, changed(batch.segments))
    if fault.path.startswith("opt."):
        where = lambda s: getattr(_adam(s.opt), fault.path.removeprefix("opt.")).embedding.table
    else:
        where = lambda s: eval(f"model.{fault.path}", {"model": s.model})
    return eqx.tree_at(where, state, changed(where(state))), batch


def _adam(opt: Any) -> optax.ScaleByAdamState:
    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)
    return next(part for part in jax.tree.leaves(opt, is_leaf=is_adam) if is_adam(part))


if __name__ == "__main__":  # a fresh process: replay what stands in these folders, with the faults in the code
    with pytest.MonkeyPatch.context() as monkeypatch:
        plant(monkeypatch)
        for folder in sys.argv[1:]:
            print(f"=== {folder}\n{numerics.replay(Path(folder), [])}")
