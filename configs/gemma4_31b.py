"""Gemma 4 31B, the text model: global layers with wider heads, fewer of them for keys, and keys that are the values."""

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, Optim, Rope, stages

both = dict(heads=32, scale=1.0, qk_norm=True, v_norm=True)
mlp = MLP(width=21504)
local = Attention(**both, kv_heads=16, head_dim=256, window=1024, q_norm_init=256**-0.5)
globe = Attention(
    **both, kv_heads=4, head_dim=512, k_is_v=True, rope=Rope(theta=1e6, fraction=0.25), q_norm_init=512**-0.5
)

config = Config(
    model=Model(
        vocab=262144,
        embed=5376,
        stages=stages(((Layer(local, mlp, scalar=True),) * 5 + (Layer(globe, mlp, scalar=True),)) * 10),
        final_softcap=30.0,
    ),
    data=Data(seq_len=4096),
    optim=Optim(lr=2e-4, warmup=1000),
    steps=100_000,
    gather_ahead=48,  # below 16 GiB a chip on v6e-32, at 2048 tokens; 90 gathers more beside products, in 18 GiB
)
