"""DeepSeek-V3.2 in seconds, for tests: sparse attention, routed experts and the prediction of a second token."""

from mintrain.config import MLA, MLP, Config, Data, Indexer, Layer, Model, MoE, Optim, Rope, Yarn, stages

rope = Rope(yarn=Yarn(factor=4, original=16))
indexer = Indexer(heads=3, head_dim=12, topk=6)
mla = MLA(heads=4, q_lora=24, kv_lora=16, nope=10, rope_dim=8, v=14, rope=rope, indexer=indexer)
router = dict(score="sigmoid", groups=4, kept_groups=2, normalise=True, scaling=2.5, bias_rate=0.001, balance=0.0001)
dense = Layer(mla, MLP(width=56, activation="silu"), post_norms=False)
sparse = Layer(mla, MLP(width=20, activation="silu"), MoE(experts=8, topk=3, width=20, **router), post_norms=False)

config = Config(
    model=Model(
        vocab=264, embed=40, stages=stages((dense,) + (sparse,) * 2), embed_scale=False, tied=False, mtp=(sparse,)
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
