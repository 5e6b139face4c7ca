"""Gemma 3 1B (arXiv 2503.19786): five local layers to a global one, normalised queries and keys."""

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, Rope, stages

attention = dict(heads=4, kv_heads=1, head_dim=256, scale=256**-0.5, qk_norm=True)
mlp = MLP(width=6912)
local = Layer(Attention(**attention, window=512), mlp)
globe = Layer(Attention(**attention, rope=Rope(theta=1e6)), mlp)

config = Config(
    model=Model(
        vocab=262144,
        embed=1152,
        stages=stages((((local,) * 5 + (globe,)) * 5)[:26]),
        norm_offset=1.0,
    ),
    data=Data(seq_len=4096),
    optim=Optim(lr=2e-4, warmup=1000),
    steps=100_000,
)
