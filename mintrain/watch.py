"""What a run watches of its layers: `--watch_every N`.

Every N steps the step also returns, for each layer, the numbers below. `layer` opens one while it is traced, and
`record`, called where a number is made, gives it to the layer that is open; with none open it does nothing, so that
steps that are not watched hold none of this.
"""

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from mintrain.arrays import weights
from mintrain.config import Model

# What is watched, the bound past which it is said, and why it matters. All are largest magnitudes, but for MEANS.
BOUNDS = {
    "attention_logit": (100.0, "the softmax picks single keys, and its bfloat16 inputs are off by 0.4 %"),
    "indexer_logit": (1e4, "scores of keys are told apart no more finely than their rounding"),
    "router_logit": (100.0, "experts are picked with certainty, and no gradient moves the choice"),
    "residual_rms": (1e4, "what layers add is lost in the rounding of the residual stream"),
    "near_limit": (1e-6, "values of the residual stream are about to overflow or to become 0"),
}
GRADIENT_BOUND = (1e3, "clipping leaves almost nothing of all other gradients")
MEANS = ("attention_entropy", "residual_square", "near_limit")
MODULES = ("attention", "mlp", "moe", "per_layer")  # of a layer; all else is its norms
NEAR = 2.0**8  # of the format's largest or smallest normal value

_open: ContextVar[dict[str, Array] | None] = ContextVar("watched layer", default=None)


class Seen(eqx.Module):
    layers: tuple[dict[str, Float32[Array, "..."]], ...]  # in the order of `LM.blocks`, each of all its repeats
    load: tuple[Float32[Array, "..."] | None, ...]  # tokens of each expert, in the same order
    gradients: tuple[dict[str, Float32[Array, "..."]], ...]  # norms by module, in the same order
    outside: dict[str, Float32[Array, ""]]  # norms of gradients outside the layers


def layer(apply: Callable[..., tuple], watched: bool) -> Callable[..., tuple]:
    """A function of a layer that returns the residual stream and an `Aux`: with what it records, if `watched`."""

    def recorded(*inputs: Any) -> tuple:
        seen: dict[str, Array] = {}
        token = _open.set(seen)
        try:
            x, aux, *rest = apply(*inputs)
            _residual(x)
        finally:
            _open.reset(token)
        return x, replace(aux, seen=seen), *rest

    return recorded if watched else apply


def on() -> bool:
    return _open.get() is not None


def record(name: str, value: Callable[[], Float32[Array, ""]]) -> None:
    """Give the open layer a number, the largest or the mean (MEANS) of this device. It has no gradient."""
    if (seen := _open.get()) is not None:
        seen[name] = jax.lax.stop_gradient(value())


def _residual(x: Float[Array, "token embed"]) -> None:
    """The residual stream after a layer: its mean square, and the share of its values near the limits of its dtype."""
    limits = jnp.finfo(x.dtype)

    def near() -> Float32[Array, ""]:
        size = jnp.abs(x.astype(jnp.float32))
        close = (size > float(limits.max) / NEAR) | ((size > 0) & (size < float(limits.tiny) * NEAR))
        return jnp.mean(close.astype(jnp.float32))

    record("residual_square", lambda: jnp.mean(jnp.square(x.astype(jnp.float32))))
    record("near_limit", near)


def over_devices(seen: dict[str, Float32[Array, "..."]] | None) -> dict[str, Float32[Array, "..."]] | None:
    """The largest or the mean of all devices."""

    def reduce(name: str, x: Float32[Array, "..."]) -> Float32[Array, "..."]:
        axes = tuple(jax.typeof(x).manual_axis_type.varying)
        return (jax.lax.pmean if name in MEANS else jax.lax.pmax)(x, axes) if axes else x

    return None if seen is None else {name: reduce(name, x) for name, x in seen.items()}


def over_microbatches(layers: tuple[dict[str, Array] | None, ...]) -> tuple[dict[str, Array] | None, ...]:
    """The same over the first axis, of the layers of several microbatches."""
    reduce = lambda name, x: (jnp.mean if name in MEANS else jnp.max)(x, axis=0)
    return tuple(seen and {name: reduce(name, x) for name, x in seen.items()} for seen in layers)


def gradient_norms(
    grads: eqx.Module, model: Model
) -> tuple[tuple[dict[str, Float32[Array, "..."]], ...], dict[str, Float32[Array, ""]]]:
    """The norm of the gradient of each module of each layer, and of those outside the layers."""
    places = [f"stages[{i}][{j}]" for i, stage in enumerate(model.stages) for j in range(len(stage.pattern))]
    places += [f"mtp[{i}].block" for i in range(len(model.mtp))]
    layers: dict[str, dict[str, list[Array]]] = {place: {} for place in places}
    outside: dict[str, list[Array]] = {}
    for weight in weights(grads):
        place = next((place for place in places if weight.path.startswith(f"{place}.")), None)
        rest = weight.path if place is None else weight.path.removeprefix(f"{place}.").removeprefix("block.")
        module = rest.split(".")[0]
        axes = tuple(range(weight.stacked, weight.value.ndim))
        norms, name = (outside, module) if place is None else (layers[place], module if module in MODULES else "norms")
        norms.setdefault(name, []).append(jnp.sum(jnp.square(weight.value), axis=axes))
    total = lambda squares: {name: jnp.sqrt(sum(parts)) for name, parts in squares.items()}
    return tuple(map(total, layers.values())), total(outside)


def by_layer(model: Model, seen: Seen) -> dict[str, list[float | None]]:
    """Each watched number of all layers, those that predict further ahead last; None where a layer has none."""
    rows: list[dict[str, float]] = []
    for watched, load, gradients in zip(seen.layers, seen.load, seen.gradients, strict=True):
        found = {**watched, **{f"gradient {name}": x for name, x in gradients.items()}}
        if load is not None:
            load = np.asarray(load)
            found["expert_load"] = load.max(axis=-1) / np.maximum(load.mean(axis=-1), 1e-9)
        rows.append({name: np.atleast_1d(np.asarray(x)) for name, x in found.items()})
    order, start = [], 0
    for stage in model.stages:
        places = range(start, start + len(stage.pattern))
        order += [(place, repeat) for repeat in range(stage.repeats) for place in places]
        start += len(stage.pattern)
    order += [(place, 0) for place in range(start, len(rows))]
    layers = [{name: float(x[repeat]) for name, x in rows[place].items()} for place, repeat in order]
    for one in layers:
        one["residual_rms"] = one.pop("residual_square") ** 0.5
    names = dict.fromkeys(name for one in layers for name in one)
    return {name: [one.get(name) for one in layers] for name in names}


def past_bounds(watched: dict[str, list[float | None]]) -> Iterator[tuple[str, str]]:
    """What has grown past its bound: its name, and a line about it with the layer."""
    for name, values in watched.items():
        bound, why = GRADIENT_BOUND if name.startswith("gradient ") else BOUNDS.get(name, (float("inf"), ""))
        largest = max((x for x in values if x is not None), default=0.0)
        if not largest <= bound:
            yield name, f"{name} {largest:.4g} in layer {values.index(largest)} is past {bound:g}: {why}"


def picture(records: list[dict]) -> Any:
    """A figure of layers over steps, one panel for each number, coloured by its logarithm."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    seen = [record for record in records if "layers" in record]
    names = list(dict.fromkeys(name for record in seen for name in record["layers"]))
    columns = min(3, len(names))
    figure, panels = plt.subplots(
        -(-len(names) // columns), columns, figsize=(4 * columns, 1.9 * -(-len(names) // columns)), squeeze=False,
        sharex=True, layout="constrained",
    )  # fmt: skip
    steps = [record["step"] for record in seen]
    for i, (panel, name) in enumerate(zip(panels.flat, names, strict=False)):
        rows = np.array([record["layers"][name] for record in seen], float).T
        positive = rows[np.isfinite(rows) & (rows > 0)]
        low, high = (positive.min(), positive.max()) if positive.size else (1, 1)
        norm = LogNorm(low, max(high, low * 1.01))
        image = panel.pcolormesh(steps, np.arange(len(rows)), np.maximum(rows, low), norm=norm, shading="nearest")
        bar = figure.colorbar(image, ax=panel, ticks=np.geomspace(norm.vmin, norm.vmax, 3), format="%.2g")
        bar.ax.minorticks_off()
        if not positive.size:
            bar.set_ticks([])
        panel.set_title(name.replace("_", " ") + ("" if positive.size else ": 0"), fontsize=9)
        panel.set_yticks(sorted({0, len(rows) - 1}))
        if i + columns >= len(names):  # the lowest one of its column
            panel.tick_params(labelbottom=True)
            panel.set_xlabel("step")
    for panel in panels.flat[len(names) :]:
        panel.axis("off")
    for panel in panels[:, 0]:
        panel.set_ylabel("layer")
    return figure
