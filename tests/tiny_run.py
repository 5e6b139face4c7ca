"""A run that compiles quickly: one layer, a few steps."""

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, Stage

layer = Layer(Attention(heads=4, kv_heads=2, head_dim=12, scale=12**-0.5, window=9, qk_norm=True), MLP(width=56))

config = Config(
    model=Model(vocab=264, embed=40, stages=(Stage((layer,)),), norm_offset=1.0),
    data=Data(tokenizer="bytes", seq_len=32),
    optim=Optim(lr=1e-2, warmup=2),
    per_device_batch_size=8,
    compute_dtype="float32",
    steps=6,
    log_every=1,
    eval_every=3,
    eval_batches=4,
    checkpoint_every=2,
    sample_tokens=8,
)
