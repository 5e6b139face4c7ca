"""A run on four devices: experts over one axis, weights over it and another."""

import runpy
from dataclasses import replace
from pathlib import Path

from mintrain.config import MLP, Attention, Layer, Mesh, MoE, Stage

one = runpy.run_path(str(Path(__file__).with_name("tiny_run.py")))["config"]
routed = MoE(experts=8, topk=3, width=20, score="sigmoid", normalise=True, bias_rate=0.01, balance=0.1)
layer = Layer(Attention(heads=4, kv_heads=2, head_dim=12, scale=12**-0.5, qk_norm=True), MLP(width=28), routed)

config = replace(
    one,
    model=replace(one.model, stages=(Stage((layer,)),)),
    mesh=Mesh(fsdp=2, expert=2),
    per_device_batch_size=2,
    steps=40,
    eval_every=20,
    checkpoint_every=10,
)
