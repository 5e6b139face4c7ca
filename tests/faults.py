"""Faults planted in a tiny Gemma: in weights, in the batch and in the code.

Those in the code do nothing unless a weight holds MARK or a row is fully masked, so that one program serves for all.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mintrain import loss, step
from mintrain.layers import attend
from mintrain.layers.attention import Attention
from mintrain.layers.mlp import MLP

HUGE, MARK = 3e38, 1234.0
# Two repeats of the pattern. A norm without epsilon: a zero vector makes 0/0.
MODEL = dataclasses.replace(tiny.GEMMA4, stages=tiny.stages(tiny.PATTERN * 2), norm_eps=0.0, norm_offset=0.0)


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
BACKWARD = "backward"

FAULTS = {
    "q": Fault("stages[0][0].attention.q", 1, fill(HUGE), 2, "stages[0][0].attention", DOT),
    "k": Fault("stages[0][1].attention.k", 0, fill(HUGE), 1, "stages[0][1].attention", DOT),
    "v": Fault("stages[0][0].attention.v", 0, fill(HUGE), 0, "stages[0][0].attention", DOT),
    "o": Fault("stages[0][1].attention.o", 0, fill(HUGE), 1, "stages[0][1].attention", DOT),
    "q_norm": Fault("stages[0][0].attention.q_norm.scale", 1, fill(HUGE), 2, "stages[0][0].attention", SCALE),
    "gate": Fault("stages[0][1].mlp.gate", 1, fill(HUGE), 3, "stages[0][1].mlp", DOT),
    "up": Fault("stages[0][0].mlp.up", 1, fill(HUGE), 2, "stages[0][0].mlp", DOT),
    "down": Fault("stages[0][1].mlp.down", 1, fill(HUGE), 3, "stages[0][1].mlp", DOT),
    "per-layer gate": Fault("stages[0][1].per_layer.gate", 0, fill(HUGE), 1, "stages[0][1].per_layer", DOT),
    "per-layer inputs": Fault("per_layer_inputs.projection", None, fill(HUGE), None, "", DOT),
    "embedding": Fault("embedding.table", None, fill(HUGE), None, "", SCALE),
    "last norm": Fault("norm.scale", None, fill(HUGE), None, "", SCALE),
    "post norm": Fault("stages[0][0].mlp_post_norm.scale", 1, fill(HUGE), 2, "stages[0][0]", SCALE),
    "zero vector": Fault("stages[0][1].attention.o", 1, fill(0.0), 3, "stages[0][1]", ("rsqrt",)),
    "layer scalar": Fault("stages[0][1].scalar", 1, fill(HUGE), 3, "stages[0][1]", SCALE),
    "masked row": Fault("batch.segments", None, forget, 0, "stages[0][0].attention", ("sub", "exp")),
    "attention backward": Fault("stages[0][1].attention.o", 1, mark, 3, "stages[0][1].attention", ("div",), BACKWARD),
    "mlp backward": Fault("stages[0][0].mlp.gate", 1, mark, 2, "stages[0][0].mlp", ("div",), BACKWARD),
}


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

    around(MLP, "mlp", lambda self, out: poison(out, self.gate))
    around(Attention, "attention", lambda self, out: (poison(out[0], self.o), *out[1:]))

    def unsafe(logits, mask):
        """The softmax of a row without a visible key is NaN: -inf - -inf."""
        return jax.nn.softmax(jnp.where(mask[:, None, None], logits, -jnp.inf), axis=-1)

    patch.setattr(attend, "masked_softmax", unsafe)


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
    where = lambda s: eval(f"model.{fault.path}", {"model": s.model})
    return eqx.tree_at(where, state, changed(where(state))), batch
