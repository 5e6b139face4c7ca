"""Gemma 4 E4B, the text model: from layer 24 on shared keys and values; an input for every layer."""

from dataclasses import replace

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, Rope, stages

both = dict(heads=8, kv_heads=2, scale=1.0, qk_norm=True, v_norm=True)
mlp = MLP(width=10240)
local = Attention(**both, head_dim=256, window=512, q_norm_init=256**-0.5)
globe = Attention(**both, head_dim=512, rope=Rope(theta=1e6, fraction=0.25), q_norm_init=512**-0.5)
first = (Layer(local, mlp, scalar=True),) * 5 + (Layer(globe, mlp, scalar=True),)
local, globe = replace(local, shares_kv=True), replace(globe, shares_kv=True)
later = (Layer(local, mlp, scalar=True),) * 5 + (Layer(globe, mlp, scalar=True),)

config = Config(
    model=Model(
        vocab=262144,
        embed=2560,
        stages=stages(first * 4 + later * 3),
        final_softcap=30.0,
        per_layer_input=256,
    ),
    data=Data(seq_len=4096),
    optim=Optim(lr=2e-4, warmup=1000),
    steps=100_000,
)
