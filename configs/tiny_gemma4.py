"""Gemma 4 in seconds, for tests."""

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, Rope, stages

both = dict(heads=4, scale=1.0, qk_norm=True, v_norm=True)
mlp = MLP(width=56)
local = Attention(**both, kv_heads=4, head_dim=12, window=9, q_norm_init=12**-0.5)
globe = Attention(
    **both, kv_heads=2, head_dim=20, k_is_v=True, rope=Rope(theta=1e6, fraction=0.25), q_norm_init=20**-0.5
)

config = Config(
    model=Model(
        vocab=264,
        embed=40,
        stages=stages(((Layer(local, mlp, scalar=True),) * 2 + (Layer(globe, mlp, scalar=True),)) * 2),
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
