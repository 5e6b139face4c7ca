"""`python -m mintrain.numerics study [FOLDER]`: what float32 is for, measured.

Each experiment is one claim about the NaN of Gemma 4 and DeepSeek-V3.2 (docs/numerics.md), with the remedy and without.
The unsafe forms exist in this file only. They are put in place of mintrain's own functions while one program is traced;
rounding is `reduce_precision`, as XLA may leave out a conversion to bfloat16 and back.

Tables and figures go to FOLDER (runs/study). If it holds numerics.md, what stands there between `<!-- study NAME -->`
and `<!-- end -->` is replaced, too.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jaxtyping import Array, Float, Float32

from mintrain import optim, sharding, step, watch
from mintrain.audit import audit
from mintrain.config import MLP, Attention, Config, Data, Layer, Mesh, Model, Optim, Rope, stages
from mintrain.data import load_data, train_batch
from mintrain.layers import attend, indexer

SEEDS = 5
T_95 = 2.776  # Student's t for five seeds: 95 % lie within this many standard errors


def rounded(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """To bfloat16's 8 bits."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def bfloat16_logits(q: Array, k: Array, scale: float, softcap: float | None) -> Float32[Array, "..."]:
    """UNSAFE: what a product without preferred_element_type gives."""
    return rounded(LOGITS(q, k, scale, softcap))


def bfloat16_softmax(logits: Float32[Array, "..."], mask: Array) -> Float32[Array, "..."]:
    """UNSAFE: every step of the softmax in bfloat16."""
    visible = mask[:, None, None]
    largest = jax.lax.stop_gradient(jnp.max(jnp.where(visible, logits, -1e30), axis=-1, keepdims=True))
    weights = jnp.where(visible, rounded(jnp.exp(rounded(logits - largest))), 0.0)
    total = rounded(jnp.sum(weights, axis=-1, keepdims=True))
    return rounded(weights / jnp.where(total > 0, total, 1.0))


def bfloat16_indexer(q: Array, k: Array) -> Float32[Array, "..."]:
    """UNSAFE: the indexer's logits as a bfloat16 product gives them."""
    return rounded(INDEXER_LOGITS(q, k))


LOGITS, SOFTMAX, INDEXER_LOGITS = attend.attention_logits, attend.masked_softmax, indexer.indexer_logits
FORMS: dict[str, tuple[Callable, Callable]] = {  # of the logits and of the softmax
    "float32": (LOGITS, SOFTMAX),
    "bfloat16 logits": (bfloat16_logits, SOFTMAX),
    "bfloat16 logits and softmax": (bfloat16_logits, bfloat16_softmax),
}


@contextmanager
def form(name: str) -> Iterator[None]:
    """Models that are traced inside have this form of attention."""
    logits, softmax = FORMS[name]
    with mock.patch.object(attend, "attention_logits", logits), mock.patch.object(attend, "masked_softmax", softmax):
        yield


# ------------------------------------------------------------------------------------ claims about one operation


def overflow() -> tuple[str, str, None]:
    """Can logits overflow bfloat16?"""
    rows = [
        (f"{name} {kind.__name__}", f"{float(jnp.finfo(kind).max):.3g}", f"{float(jnp.finfo(kind).eps):.3g}")
        for name, kind in (("numpy", np.float32), ("numpy", np.float16), ("ml_dtypes", ml_dtypes.bfloat16))
    ]
    rng, seen = np.random.default_rng(0), []
    for head_dim in (128, 256, 512):
        q, k = (unit(rng.normal(size=(4096, head_dim))) for _ in range(2))
        seen.append((head_dim, f"{np.max(np.abs(q @ k.T)):.1f}", head_dim))
    text = table(("format", "largest number", "relative step at 1"), rows) + "\n\n"
    text += table(("head_dim", "largest logit of 16.8 million random ones", "bound with QK-norm"), seen)
    below = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max) / max(float(row[1]) for row in seen)
    return text, f"no: bfloat16 has float32's range, {below:.0e} times the largest logit here", None


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of root mean square 1 in bfloat16, as QK-norm makes them."""
    x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def precision() -> tuple[str, str, Any]:
    """How far are the forms of attention from float64, on the same bfloat16 queries and keys?"""
    rows, curves = [], {name: [] for name in FORMS}
    keys, queries = 1024, 2048
    for head_dim in (64, 128, 256, 512):
        for scale, label in ((head_dim**-0.5, "head_dim^-0.5"), (1.0, "1")):
            rng = np.random.default_rng(head_dim)
            q, k = unit(rng.normal(size=(queries, head_dim))), unit(rng.normal(size=(keys, head_dim)))
            exact = scale * q @ k.T
            weights = np.exp(exact - exact.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            narrow = [jnp.asarray(x, jnp.bfloat16)[None, None] for x in (q, k)]
            for name, (logits, softmax) in FORMS.items():
                found = logits(narrow[0][:, :, None], narrow[1], scale, None)
                error = np.max(np.abs(np.asarray(found, np.float64)[0, 0, 0] - exact))
                mixed = np.asarray(softmax(found, jnp.ones((1, queries, keys), bool)), np.float64)[0, 0, 0]
                variation = np.mean(np.abs(mixed - weights).sum(axis=-1)) / 2
                first = 100 * np.mean(mixed.argmax(axis=-1) != exact.argmax(axis=-1))
                best = lambda x: np.sort(np.argpartition(-x, 8, axis=-1)[:, :8], axis=-1)
                eight = 100 * np.mean(np.any(best(np.asarray(found)[0, 0, 0]) != best(exact), axis=-1))
                size = np.abs(exact).max()
                rows.append((head_dim, label, f"{size:.3g}", name, f"{error:.2g}", f"{variation:.2g}",
                             f"{first:.2f}", f"{eight:.1f}"))  # fmt: skip
                curves[name].append((size, variation))
    head = ("head_dim", "scale", "largest logit", "form", "error of a logit", "total variation",
            "argmax flips (%)", "top-8 flips (%)")  # fmt: skip

    def draw(axes: Any) -> None:
        for name, points in curves.items():
            axes.loglog(*zip(*sorted(points), strict=True), "o-", label=name)
        axes.set(xlabel="largest |logit|", ylabel="total variation from float64", title="attention weights")
        axes.legend()

    worst = max(float(row[6]) for row in rows if row[3] == "bfloat16 logits")
    safe = max(float(row[6]) for row in rows if row[3] == "float32")
    verdict = f"bfloat16 logits change the first key of up to {worst:.1f} % of the queries, float32 of {safe:.1f} %"
    return table(head, rows), verdict, draw


def selection() -> tuple[str, str, None]:
    """Does an indexer in bfloat16 choose the same keys?"""
    heads, dim, queries, rows = 64, 128, 64, []
    for keys, topk in ((1024, 64), (4096, 64), (4096, 2048)):
        rng = np.random.default_rng(keys + topk)
        q = rng.normal(size=(queries, heads, dim)).astype(ml_dtypes.bfloat16)
        k = rng.normal(size=(keys, dim)).astype(ml_dtypes.bfloat16)
        w = rng.normal(size=(queries, heads)).astype(np.float32) * heads**-0.5
        products = np.einsum("qnd,kd->nqk", *(x.astype(np.float64) for x in (q, k)), optimize=True)
        exact = np.einsum("qn,nqk->qk", w.astype(np.float64), np.maximum(products * dim**-0.5, 0.0), optimize=True)
        chosen = lambda scores, topk=topk: np.argsort(-scores, axis=-1, kind="stable")[:, :topk]
        best = chosen(exact)
        for name, logits, scores in (
            ("float32", INDEXER_LOGITS, lambda x: x),
            ("bfloat16 logits", bfloat16_indexer, lambda x: x),
            ("bfloat16 logits and scores", bfloat16_indexer, rounded),
        ):
            seen = indexer.indexer_scores(logits(jnp.asarray(q)[None], jnp.asarray(k)[None]), jnp.asarray(w)[None])
            other = chosen(np.asarray(scores(seen))[0])
            same = [len(np.intersect1d(a, b)) / topk for a, b in zip(best, other, strict=True)]
            changed = 100 * np.mean(np.array(same) < 1)
            rows.append((f"{topk} of {keys}", name, f"{100 * np.mean(same):.2f}", f"{changed:.0f}"))
    least, most = min(float(row[2]) for row in rows), max(int(row[3]) for row in rows if row[1] != "float32")
    same = max(int(row[3]) for row in rows if row[1] == "float32")
    verdict = (
        f"almost: {least:.1f} % of the keys at least are the same, but up to {most} % of the queries get another set; "
        f"with float32 {same} %"
    )
    return (
        table(("chosen", "form", "keys in common with float64 (%)", "queries with another set (%)"), rows),
        verdict,
        None,
    )


def masks() -> tuple[str, str, None]:
    """What does a query do that sees no key?"""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 1, 2, 6)), jnp.float32)
    mask = jnp.asarray([[[True, True, False, True, False, False], [False] * 6]])
    low = -0.7 * float(jnp.finfo(jnp.float32).max)
    bias = jnp.where(mask, 0.0, low)[:, None, None]
    softmax = lambda x: jax.nn.softmax(x, axis=-1)
    ways: dict[str, Callable] = {
        "boolean (mintrain)": lambda x: SOFTMAX(x, mask),
        "one mask of -0.7 max(float32) added": lambda x: softmax(x + bias),
        "two masks of -0.7 max(float32) added": lambda x: softmax(x + bias + bias),
        "the same two in bfloat16": lambda x: softmax(rounded(rounded(x + bias) + bias)),
        "-inf where masked": lambda x: softmax(jnp.where(mask[:, None, None], x, -jnp.inf)),
    }
    rows = []
    for name, way in ways.items():
        out = way(logits)
        grad = jax.grad(lambda x, way=way: jnp.sum(jnp.square(way(x))))(logits)
        hidden = jnp.sum(jnp.where(mask[:, None, None], 0.0, out), axis=-1)[0, 0, 0]
        show = lambda x: "NaN" if np.isnan(x) else f"{float(x):.3g}"
        good = [bool(jnp.all(jnp.isfinite(x[0, 0, 0, 1]))) for x in (out, grad)]
        rows.append((name, show(hidden[0]), show(hidden[1]), *("finite" if ok else "NaN" for ok in good)))
    head = (
        "mask",
        "weight on hidden keys, query that sees some",
        "query that sees none",
        "its weights",
        "its gradient",
    )
    bad = [row[0] for row in rows if "NaN" in row[2:]]
    return table(head, rows), f"NaN, with: {'; '.join(bad)}", None


def poisoned() -> tuple[str, str, None]:
    """How far does one bad number in one gradient go?"""
    cfg = gemma(6, 16, 1.0, "float32")
    mesh = sharding.make_mesh(cfg.mesh)
    text, _, _ = load_data(cfg)
    state, batch = step.new_state(cfg, mesh), train_batch(text, step.abstract_batch(cfg, mesh), 0, 0)
    model, holds_nan = state.model, lambda model: sum(bool(jnp.any(jnp.isnan(x))) for x in jax.tree.leaves(model))
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.ones_like, model))
    leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].set(jnp.nan)
    transform = optim.optimizer(cfg.optim, cfg.steps, model)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(transform.update)(jax.tree.unflatten(tree, leaves), transform.init(model), model)
        applied = holds_nan(optax.apply_updates(model, updates))
    bad = dataclasses.replace(batch, weights=jnp.nan * batch.weights)
    new, _ = step.make_train_step(cfg, mesh)(state, bad)
    rows = [
        ("one NaN in a gradient, update applied", f"{applied} of {len(leaves)}"),
        ("mintrain's step on a batch whose loss is NaN", f"{holds_nan(new.model)} of {len(leaves)}"),
    ]
    text = table(("step", "arrays of weights that hold a NaN afterwards"), rows)
    return text, f"clipping by the global norm spreads one NaN to {applied} of {len(leaves)} arrays of weights", None


# ------------------------------------------------------------------------------------------ claims about training


def gemma(layers: int, head_dim: int, q_norm: float | None, dtype: str, batch: int = 8, steps: int = 1) -> Config:
    """The shape of Gemma 4 31B at width 128. q_norm: what the query norm starts at; None is head_dim ** -0.5."""
    both = dict(heads=4, scale=1.0, qk_norm=True, v_norm=True)
    start = lambda head: head**-0.5 if q_norm is None else q_norm
    local = Attention(**both, kv_heads=2, head_dim=head_dim, window=64, q_norm_init=start(head_dim))
    wide = 2 * head_dim
    rope = Rope(theta=1e6, fraction=0.25)
    globe = Attention(**both, kv_heads=1, head_dim=wide, k_is_v=True, rope=rope, q_norm_init=start(wide))
    pattern = (Layer(local, MLP(256), scalar=True),) * 5 + (Layer(globe, MLP(256), scalar=True),)
    return Config(
        model=Model(vocab=4096, embed=128, stages=stages(pattern * (layers // 6)), final_softcap=30.0),
        data=Data(seq_len=128),
        optim=Optim(lr=3e-3, warmup=10, schedule="wsd", decay_fraction=0.01),
        per_device_batch_size=batch,
        compute_dtype=dtype,
        steps=steps,
    )


def first_step(cfg: Config) -> tuple[float, float]:
    """Gradient norm and largest attention logit of a fresh model."""
    mesh = sharding.make_mesh(cfg.mesh)
    text, _, _ = load_data(cfg)
    batch = train_batch(text, step.abstract_batch(cfg, mesh), 0, 0)
    _, metrics = step.make_train_step(cfg, mesh, watched=True)(step.new_state(cfg, mesh), batch)
    return float(metrics.grad_norm), max(watch.by_layer(cfg.model, metrics.seen)["attention_logit"])


def initialisation() -> tuple[str, str, Any]:
    """What does the gradient norm of a fresh Gemma 4 depend on?"""
    rows, curves = [], {}
    for head_dim in (64, 256):
        for dtype in ("float32", "bfloat16"):
            for q_norm in (1.0, None):
                label = "1" if q_norm else "head_dim^-0.5"
                for layers in (6, 24, 60):
                    if dtype == "bfloat16" and layers != 24:
                        continue
                    norm, logit = first_step(gemma(layers, head_dim, q_norm, dtype))
                    rows.append((f"{head_dim} / {2 * head_dim}", layers, dtype, label, f"{logit:.3g}", f"{norm:.3g}"))
                    if dtype == "float32":
                        curves.setdefault(f"head_dim {head_dim}, from {label}", []).append((layers, norm))

    def draw(axes: Any) -> None:
        for name, points in curves.items():
            axes.loglog(*zip(*points, strict=True), "o-", label=name)
        axes.set(xlabel="layers", ylabel="gradient norm", title="a fresh Gemma 4, float32, by query norm")
        axes.legend()

    head = ("head_dim, local / global", "layers", "compute", "query norm starts at", "largest logit", "gradient norm")
    big, small = (max(float(row[5]) for row in rows if (row[3] == "1") == plain) for plain in (True, False))
    return table(head, rows), f"on where the query norm starts: up to {big:.3g} from 1, {small:.3g} otherwise", draw


CURVES = {  # form of attention, what the query norm starts at
    "float32": ("float32", None),
    "bfloat16 logits": ("bfloat16 logits", None),
    "bfloat16 logits and softmax": ("bfloat16 logits and softmax", None),
    "float32, query norm from 1": ("float32", 1.0),
    "bfloat16 logits, query norm from 1": ("bfloat16 logits", 1.0),
}


def training() -> tuple[str, str, Any]:
    """What does each remedy do to the loss? Gemma 4's shape, 6 layers, bfloat16, on Shakespeare."""
    steps, curves = 80, {}
    for name, (attention, q_norm) in CURVES.items():
        cfg = gemma(6, 256, q_norm, "bfloat16", batch=4, steps=steps)
        mesh = sharding.make_mesh(cfg.mesh)
        text, _, _ = load_data(cfg)
        shapes = step.abstract_batch(cfg, mesh)
        with form(attention):
            compiled = step.make_train_step(cfg, mesh).trace(step.abstract_state(cfg, mesh), shapes).lower().compile()
        runs = []
        for seed in range(SEEDS):
            state, run = step.new_state(dataclasses.replace(cfg, seed=seed), mesh), []
            for at in range(steps):
                state, metrics = compiled(state, train_batch(text, shapes, at, seed))
                run.append((metrics.loss, metrics.grad_norm, metrics.finite))
            runs.append(np.array(run, np.float64))
        curves[name] = np.moveaxis(np.stack(runs), -1, 0)  # loss, norm and whether they are finite, by seed and step
    ends = {name: loss[:, -20:].mean(axis=1) for name, (loss, _, _) in curves.items()}
    rows, other = [], []
    for name, (_, norm, finite) in curves.items():
        gap = ends[name] - ends["float32"]
        spread = T_95 * gap.std(ddof=1) / SEEDS**0.5
        other += [name] if abs(gap.mean()) > spread else []
        told = "" if name == "float32" else f"{gap.mean():+.4f} ± {spread:.4f}"
        rows.append((name, int(np.sum(finite == 0)), f"{np.median(norm[:, 0]):.3g}", f"{ends[name].mean():.4f}", told))

    def draw(axes: Any) -> None:
        for name, (loss, _, _) in curves.items():
            axes.plot(np.arange(1, steps + 1), loss.mean(axis=0), label=name, linewidth=1.2)
        axes.set(xlabel="step", ylabel=f"loss, mean of {SEEDS} seeds", title="training")
        axes.legend()

    head = ("form", f"bad steps of {SEEDS * steps}", "gradient norm, step 1", f"loss, steps {steps - 19} to {steps}",
            "against float32, same seeds (95 %)")  # fmt: skip
    bad = sum(row[1] for row in rows)
    verdict = f"another loss than float32's, beyond the spread of seeds, have: {'; '.join(other) or 'none'}"
    return table(head, rows), f"{verdict}. {bad} steps of all had a number that was not finite", draw


def contract() -> tuple[str, str, None]:
    """Does mintrain see such forms before the first step?"""

    def plain(q: Array, k: Array, scale: float, softcap: float | None) -> Float[Array, "..."]:
        return jnp.einsum("bngqh,bnkh->bngqk", q, k) * jnp.asarray(scale, q.dtype)

    def cast(q: Array, k: Array, scale: float, softcap: float | None) -> Float32[Array, "..."]:
        return plain(q, k, scale, softcap).astype(jnp.float32)

    rows, mesh = [], sharding.make_mesh(Mesh())
    for name, logits in (("float32", LOGITS), ("a bfloat16 product", plain), ("the same, cast to float32", cast)):
        cfg = gemma(6, 16, None, "bfloat16")
        with mock.patch.object(attend, "attention_logits", logits):
            try:
                traced = step.make_train_step(cfg, mesh).trace(
                    step.abstract_state(cfg, mesh), step.abstract_batch(cfg, mesh)
                )
                found = sum(finding.faulty for finding in audit(traced.jaxpr))
                rows.append((name, "accepted", f"{found} faults"))
            except TypeError:  # jaxtyping's
                rows.append((name, "refused: masked_softmax takes float32", "not reached"))
    seen = [row[1].startswith("refused") or not row[2].startswith("0") for row in rows[1:]]
    text = table(("attention logits", "types, when it is traced", "audit of the traced step"), rows)
    return text, f"yes, {sum(seen)} of {len(seen)}", None


EXPERIMENTS = (overflow, precision, selection, masks, poisoned, initialisation, training, contract)


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def main(folder: Path) -> None:
    """Run every experiment, print what it found, and write it to `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    document = folder / "numerics.md"
    for experiment in EXPERIMENTS:
        text, verdict, draw = experiment()
        name, question = experiment.__name__, experiment.__doc__.splitlines()[0]
        print(f"{name}: {question} {verdict}\n\n{text}\n", flush=True)
        block = f"{question} **{verdict[0].upper()}{verdict[1:]}.**\n\n{text}\n"
        if draw is not None:
            figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
            draw(axes)
            axes.grid(alpha=0.3)
            figure.savefig(folder / f"numerics-{name}.png", dpi=120)
            plt.close(figure)
            block += f"\n![{name}](numerics-{name}.png)\n"
        if document.is_file():
            new = f"<!-- study {name} -->\n{block}<!-- end -->"
            document.write_text(
                re.sub(
                    rf"<!-- study {name} -->.*?<!-- end -->", lambda _, new=new: new, document.read_text(), flags=re.S
                )
            )
