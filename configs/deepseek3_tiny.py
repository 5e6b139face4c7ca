"""The smoke model of the bug report that mintrain answers: V3 with 61 thin layers and an indexer that keeps 4 keys."""

from mintrain.config import MLA, MLP, Config, Data, Indexer, Layer, Model, MoE, Optim, stages

mla = MLA(heads=4, q_lora=32, kv_lora=16, nope=128, rope_dim=64, v=128, indexer=Indexer(heads=4, head_dim=64, topk=4))
moe = MoE(experts=16, topk=8, width=64, score="sigmoid", normalise=True, scaling=2.5, bias_rate=0.001, balance=0.0001)
dense = Layer(mla, MLP(width=64, activation="silu"), post_norms=False)
sparse = Layer(mla, MLP(width=64, activation="silu"), moe, post_norms=False)

config = Config(
    model=Model(vocab=129280, embed=64, stages=stages((dense,) * 3 + (sparse,) * 58), embed_scale=False, tied=False),
    data=Data(seq_len=64),
    optim=Optim(lr=1e-3, warmup=10),
    per_device_batch_size=4,
    steps=100,
    log_every=1,
    eval_every=50,
    eval_batches=20,
)
