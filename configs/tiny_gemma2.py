"""Gemma 2 in seconds, for tests."""

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, stages

attention = dict(heads=4, kv_heads=2, head_dim=12, scale=10**-0.5, softcap=50.0)
mlp = MLP(width=56)
local = Layer(Attention(**attention, window=9), mlp)
globe = Layer(Attention(**attention), mlp)

config = Config(
    model=Model(
        vocab=264,
        embed=40,
        stages=stages((local, globe) * 2),
        norm_offset=1.0,
        final_softcap=30.0,
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
