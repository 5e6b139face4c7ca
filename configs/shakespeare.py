"""The default: a small Gemma 3 on the plays of Shakespeare, minutes on a laptop's CPU."""

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, Rope, stages

local = Attention(heads=4, kv_heads=2, head_dim=64, scale=64**-0.5, window=64, qk_norm=True)
globe = Attention(heads=4, kv_heads=2, head_dim=64, scale=64**-0.5, rope=Rope(theta=1e6), qk_norm=True)
mlp = MLP(width=768)

config = Config(
    model=Model(
        vocab=4096,
        embed=256,
        stages=stages((Layer(local, mlp), Layer(local, mlp), Layer(globe, mlp)), layers=6),
        norm_offset=1.0,
    ),
    data=Data(path="shakespeare", seq_len=256),
    optim=Optim(name="muon", lr=1e-2, warmup=20, schedule="wsd", decay_fraction=0.5, final_lr=0.05, weight_decay=0.1),
    per_device_batch_size=16,
    steps=300,
    compute_dtype="float32",
    remat="none",
    eval_every=100,
    checkpoint_every=100,
)
