"""DeepSeek-V2-Lite: latent attention with plain queries, 64 experts of which a token uses 6, and 2 shared ones."""

from mintrain.config import MLA, MLP, Config, Data, Layer, Model, MoE, Optim, Rope, Yarn, stages

rope = Rope(yarn=Yarn(factor=40, original=4096, mscale=0.707, mscale_all_dim=0.707))
mla = MLA(heads=16, q_lora=None, kv_lora=512, nope=128, rope_dim=64, v=128, rope=rope)
moe = MoE(experts=64, topk=6, width=1408, balance=0.001)
dense = Layer(mla, MLP(width=10944, activation="silu"), post_norms=False)
sparse = Layer(mla, MLP(width=2 * 1408, activation="silu"), moe, post_norms=False)

config = Config(
    model=Model(vocab=102400, embed=2048, stages=stages((dense,) + (sparse,) * 26), embed_scale=False, tied=False),
    data=Data(seq_len=4096),
    optim=Optim(lr=4.2e-4, warmup=2000),
    steps=100_000,
)
