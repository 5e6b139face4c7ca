"""DeepSeek-V2: 160 experts in 8 groups, of which a token uses 6 from 3 groups, and 2 shared experts."""

from mintrain.config import MLA, MLP, Config, Data, Layer, Model, MoE, Optim, Rope, Yarn, stages

rope = Rope(yarn=Yarn(factor=40, original=4096, mscale=0.707, mscale_all_dim=0.707))
mla = MLA(heads=128, q_lora=1536, kv_lora=512, nope=128, rope_dim=64, v=128, rope=rope)
moe = MoE(experts=160, topk=6, width=1536, groups=8, kept_groups=3, scaling=16.0, balance=0.003)
dense = Layer(mla, MLP(width=12288, activation="silu"), post_norms=False)
sparse = Layer(mla, MLP(width=2 * 1536, activation="silu"), moe, post_norms=False)

config = Config(
    model=Model(vocab=102400, embed=5120, stages=stages((dense,) + (sparse,) * 59), embed_scale=False, tied=False),
    data=Data(seq_len=4096),
    optim=Optim(lr=2.4e-4, warmup=2000),
    steps=100_000,
)
