"""Gemma 4 E2B, the text model: from layer 15 on shared keys and values and wider MLPs; an input for every layer."""

from dataclasses import replace

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, Rope, stages

both = dict(heads=8, kv_heads=1, scale=1.0, qk_norm=True, v_norm=True)
narrow = MLP(width=6144)
wide = MLP(width=12288)
local = Attention(**both, head_dim=256, window=512, q_norm_init=256**-0.5)
globe = Attention(**both, head_dim=512, rope=Rope(theta=1e6, fraction=0.25), q_norm_init=512**-0.5)
first = (Layer(local, narrow, scalar=True),) * 4 + (Layer(globe, narrow, scalar=True),)
local, globe = replace(local, shares_kv=True), replace(globe, shares_kv=True)
later = (Layer(local, wide, scalar=True),) * 4 + (Layer(globe, wide, scalar=True),)

config = Config(
    model=Model(
        vocab=262144,
        embed=1536,
        stages=stages(first * 3 + later * 4),
        final_softcap=30.0,
        per_layer_input=256,
    ),
    data=Data(seq_len=4096),
    optim=Optim(lr=2e-4, warmup=1000),
    steps=100_000,
)
