"""Gemma 3 in seconds, for tests: one global layer, and a pattern that does not come out even."""

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, Rope, stages

attention = dict(heads=4, kv_heads=2, head_dim=12, scale=10**-0.5, qk_norm=True)
mlp = MLP(width=56)
local = Layer(Attention(**attention, window=9), mlp)
globe = Layer(Attention(**attention, rope=Rope(theta=1e6, factor=8.0)), mlp)

config = Config(
    model=Model(
        vocab=264,
        embed=40,
        stages=stages((local, local, globe) * 2 + (local,)),
        norm_offset=1.0,
    ),
    data=Data(tokenizer="bytes", seq_len=32),
    optim=Optim(lr=1e-2, warmup=2),
    per_device_batch_size=8,
    compute_dtype="float32",
    steps=20,
    log_every=1,
    eval_every=10,
    eval_batches=4,
    checkpoint_every=5,
    sample_tokens=8,
)
