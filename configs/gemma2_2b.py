"""Gemma 2 2B (arXiv 2408.00118): local and global layers in turn, soft-capped logits."""

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, stages

attention = dict(heads=8, kv_heads=4, head_dim=256, scale=256**-0.5, softcap=50.0)
mlp = MLP(width=9216)
local = Layer(Attention(**attention, window=4096), mlp)
globe = Layer(Attention(**attention), mlp)

config = Config(
    model=Model(
        vocab=256000,
        embed=2304,
        stages=stages((local, globe) * 13),
        norm_offset=1.0,
        final_softcap=30.0,
    ),
    data=Data(seq_len=4096),
    optim=Optim(lr=2e-4, warmup=1000),
    steps=100_000,
)
