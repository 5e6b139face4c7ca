"""Gemma 3 12B, the text model (arXiv 2503.19786): five local layers to a global one, normalised queries and keys."""

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, Rope, stages

attention = dict(heads=16, kv_heads=8, head_dim=256, scale=256**-0.5, qk_norm=True)
mlp = MLP(width=15360)
local = Layer(Attention(**attention, window=1024), mlp)
globe = Layer(Attention(**attention, rope=Rope(theta=1e6, factor=8.0)), mlp)

config = Config(
    model=Model(
        vocab=262208,
        embed=3840,
        stages=stages(((local,) * 5 + (globe,)) * 8),
        norm_offset=1.0,
    ),
    data=Data(seq_len=4096),
    optim=Optim(lr=2e-4, warmup=1000),
    steps=100_000,
)
