"""Gemma 2 27B (arXiv 2408.00118): local and global layers in turn, soft-capped logits."""

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, stages

attention = dict(heads=32, kv_heads=16, head_dim=128, scale=144**-0.5, softcap=50.0)
mlp = MLP(width=36864)
local = Layer(Attention(**attention, window=4096), mlp)
globe = Layer(Attention(**attention), mlp)

config = Config(
    model=Model(
        vocab=256000,
        embed=4608,
        stages=stages((local, globe) * 23),
        norm_offset=1.0,
        final_softcap=30.0,
    ),
    data=Data(seq_len=4096),
    optim=Optim(lr=2e-4, warmup=1000),
    steps=100_000,
)
