"""Gemma 4 31B's 60 layers at a fiftieth of its width: the other smoke model of docs/numerics.md."""

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, Rope, stages

both = dict(heads=4, scale=1.0, qk_norm=True, v_norm=True)
mlp = MLP(width=384)
local = Attention(**both, kv_heads=2, head_dim=32, window=64, q_norm_init=32**-0.5)
globe = Attention(
    **both, kv_heads=1, head_dim=64, k_is_v=True, rope=Rope(theta=1e6, fraction=0.25), q_norm_init=64**-0.5
)

config = Config(
    model=Model(
        vocab=4096,
        embed=96,
        stages=stages(((Layer(local, mlp, scalar=True),) * 5 + (Layer(globe, mlp, scalar=True),)) * 10),
        final_softcap=30.0,
    ),
    data=Data(seq_len=128),
    optim=Optim(lr=2e-3, warmup=20),
    per_device_batch_size=4,
    steps=200,
    eval_every=100,
    eval_batches=20,
)
