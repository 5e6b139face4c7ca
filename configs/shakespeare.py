"""The default: a small Gemma 3 on the plays of Shakespeare, a few minutes on the CPU of a laptop."""

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, Rope, stages

heads = dict(heads=4, kv_heads=2, head_dim=48, scale=48**-0.5, qk_norm=True)
local = Layer(Attention(**heads, window=64), MLP(width=576))
globe = Layer(Attention(**heads, rope=Rope(theta=1e6)), MLP(width=576))

config = Config(
    model=Model(
        vocab=4096,
        embed=192,
        stages=stages((local, local, globe) * 2),
        norm_offset=1.0,
    ),
    data=Data(path="shakespeare", seq_len=256),
    optim=Optim(name="muon", lr=1e-2, warmup=20, schedule="wsd", decay_fraction=0.5, final_lr=0.05),
    per_device_batch_size=8,
    compute_dtype="float32",
    remat="dots",
    steps=180,
    log_every=5,
    eval_every=60,
    checkpoint_every=60,
    sample_prompt="ROMEO:\n",
)
