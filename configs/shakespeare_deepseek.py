"""A small DeepSeek-V3.2 on the plays of Shakespeare: latent attention over 64 chosen keys, 8 experts, a few minutes."""

from mintrain.config import MLA, MLP, Config, Data, Indexer, Layer, Model, MoE, Optim, stages

indexer = Indexer(heads=2, head_dim=16, topk=64)
mla = MLA(heads=4, q_lora=96, kv_lora=64, nope=32, rope_dim=16, v=48, indexer=indexer)
moe = MoE(experts=8, topk=2, width=192, score="sigmoid", normalise=True, bias_rate=0.001, balance=0.0001)
dense = Layer(mla, MLP(width=576, activation="silu"), post_norms=False)
sparse = Layer(mla, MLP(width=192, activation="silu"), moe, post_norms=False)

config = Config(
    model=Model(vocab=4096, embed=192, stages=stages((dense,) + (sparse,) * 3), embed_scale=False, tied=False),
    data=Data(path="shakespeare", seq_len=256),
    optim=Optim(name="muon", lr=1e-2, warmup=20, schedule="wsd", decay_fraction=0.5, final_lr=0.05),
    per_device_batch_size=8,
    compute_dtype="float32",
    remat="dots",
    steps=140,
    log_every=5,
    eval_every=35,
    checkpoint_every=70,
    sample_prompt="ROMEO:\n",
)
