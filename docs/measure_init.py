"""The numbers of "Initialisation" in docs/models.md: `python docs/measure_init.py`, some ten minutes on two cores.

A Gemma 4 of growing depth on the text of the default config, in float32, with the query norm starting at 1 and at
head_dim ** -0.5: the raw gradient norm of the first step, and the loss after 30 steps of AdamW.
"""

import dataclasses

import numpy as np

from mintrain import sharding, step
from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, Rope, stages
from mintrain.data import load_data, train_batch


def config(layers: int, head_dim: int, scaled: bool) -> Config:
    both = dict(heads=4, scale=1.0, qk_norm=True, v_norm=True)
    init = lambda head: head**-0.5 if scaled else 1.0
    local = Attention(**both, kv_heads=2, head_dim=head_dim, window=64, q_norm_init=init(head_dim))
    globe = Attention(
        **both,
        kv_heads=1,
        head_dim=2 * head_dim,
        k_is_v=True,
        rope=Rope(theta=1e6, fraction=0.25),
        q_norm_init=init(2 * head_dim),
    )
    pattern = (Layer(local, MLP(256), scalar=True),) * 5 + (Layer(globe, MLP(256), scalar=True),)
    return Config(
        model=Model(vocab=4096, embed=128, stages=stages(pattern * (layers // len(pattern))), final_softcap=30.0),
        data=Data(seq_len=128),
        optim=Optim(lr=3e-3, warmup=10, schedule="wsd", decay_fraction=0.01),
        per_device_batch_size=8,
        compute_dtype="float32",
        steps=30,
    )


def main() -> None:
    print(f"{'layers':>6} {'head_dim':>9} {'q norm':>12} {'grad norm, step 0':>18} {'loss, step 0':>13} {'step 30':>8}")
    for layers, head_dim in ((6, 64), (24, 64), (60, 64), (24, 256)):
        for scaled in (False, True):
            cfg = config(layers, head_dim, scaled)
            mesh = sharding.make_mesh(cfg.mesh)
            text, _, _ = load_data(cfg)
            shapes, state = step.abstract_batch(cfg, mesh), step.new_state(cfg, mesh)
            train_step, results = step.make_train_step(cfg, mesh), []
            for i in range(cfg.steps):
                state, metrics = train_step(state, train_batch(text, shapes, i, cfg.seed))
                results.append(dataclasses.astuple(metrics)[:2])
            losses, norms = np.array(results, np.float64).T
            name = "head_dim^-0.5" if scaled else "1"
            print(
                f"{layers:6} {head_dim:9} {name:>13} {norms[0]:17.3g} {losses[0]:13.3f} {losses[-5:].mean():8.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
