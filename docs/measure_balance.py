"""docs/balance.png: a router that likes two of eight experts, with and without the bias of DeepSeek-V3.

The default text through one layer of experts whose router was turned towards two of them. The learning rate is next
to nothing, so that what changes is the bias. `python docs/measure_balance.py`, some five minutes.
"""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from mintrain import sharding, step
from mintrain.config import MLA, Config, Data, Layer, Model, MoE, Optim, stages
from mintrain.data import load_data, train_batch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = 200


def config(rate: float | None) -> Config:
    mla = MLA(heads=4, q_lora=None, kv_lora=32, nope=16, rope_dim=16, v=16)
    moe = MoE(experts=8, topk=2, width=64, score="sigmoid", normalise=True, bias_rate=rate)
    layer = Layer(mla, None, moe, post_norms=False)
    return Config(
        model=Model(vocab=4096, embed=64, stages=stages((layer,)), embed_scale=False, tied=False),
        data=Data(seq_len=256),
        optim=Optim(lr=1e-9),
        per_device_batch_size=8,
        compute_dtype="float32",
        steps=STEPS,
    )


def skew(state: step.State) -> step.State:
    """Give all token vectors a common direction, and two experts a router weight along it."""

    def change(path: tuple, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if name == ".model.embedding.table":
            return x + 0.7
        if name.endswith(".moe.router.weight") and name.startswith(".model"):
            return x.at[..., jnp.asarray([2, 5])].add(0.5 / x.shape[-2] ** 0.5)
        return x

    changed = jax.tree.map_with_path(change, state)
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), changed, state)


def loads(rate: float | None) -> np.ndarray:
    """The largest load of an expert relative to the mean, after each step."""
    cfg = config(rate)
    mesh = sharding.make_mesh(cfg.mesh)
    text, _, _ = load_data(cfg)
    shapes, state, found = step.abstract_batch(cfg, mesh), skew(step.new_state(cfg, mesh)), []
    train_step = step.make_train_step(cfg, mesh)
    for i in range(STEPS):
        state, metrics = train_step(state, train_batch(text, shapes, i, cfg.seed))
        found.append(float(metrics.expert_load))
    return np.array(found)


if __name__ == "__main__":
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for rate, label in ((None, "no bias"), (0.001, "bias moves 0.001 a step"), (0.003, "0.003 a step")):
        found = loads(rate)
        print(f"{label}: {found[0]:.2f} -> {found[-10:].mean():.2f}", flush=True)
        axes.plot(found, label=f"{label}, last {found[-10:].mean():.2f}")
    axes.set(xlabel="step", ylabel="largest load / mean load", ylim=(0.9, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig("docs/balance.png", dpi=120)
