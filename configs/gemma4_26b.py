"""Gemma 4 26B-A4B, the text model: 128 experts beside a dense MLP in every layer, of which a token uses 8."""

from mintrain.config import MLP, Attention, Config, Data, Layer, Model, MoE, Optim, Rope, stages

both = dict(heads=16, scale=1.0, qk_norm=True, v_norm=True)
mlp = MLP(width=2112)
moe = MoE(experts=128, topk=8, width=704, activation="gelu", normalise=True, learned_scales=True, balance=0.001)
local = Attention(**both, kv_heads=8, head_dim=256, window=1024, q_norm_init=256**-0.5)
globe = Attention(
    **both, kv_heads=2, head_dim=512, k_is_v=True, rope=Rope(theta=1e6, fraction=0.25), q_norm_init=512**-0.5
)

config = Config(
    model=Model(
        vocab=262144,
        embed=2816,
        stages=stages(((Layer(local, mlp, moe, scalar=True),) * 5 + (Layer(globe, mlp, moe, scalar=True),)) * 5),
        final_softcap=30.0,
    ),
    data=Data(seq_len=4096),
    optim=Optim(lr=2e-4, warmup=1000),
    steps=100_000,
    gather_ahead=48,  # 1.4 GiB less than 90 on v6e-32 at 2048 tokens; nearly as many gathers beside products
)
