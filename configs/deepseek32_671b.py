"""DeepSeek-V3.2: V3 with sparse attention. An indexer of 64 small heads chooses 2048 keys for every query."""

from mintrain.config import MLA, MLP, Config, Data, Indexer, Layer, Model, MoE, Optim, Rope, Yarn, stages

rope = Rope(yarn=Yarn(factor=40, original=4096))
indexer = Indexer(heads=64, head_dim=128, topk=2048)
mla = MLA(heads=128, q_lora=1536, kv_lora=512, nope=128, rope_dim=64, v=128, rope=rope, indexer=indexer)
router = dict(score="sigmoid", groups=8, kept_groups=4, normalise=True, scaling=2.5, bias_rate=0.001, balance=0.0001)
dense = Layer(mla, MLP(width=18432, activation="silu"), post_norms=False)
sparse = Layer(
    mla, MLP(width=2048, activation="silu"), MoE(experts=256, topk=8, width=2048, **router), post_norms=False
)

config = Config(
    model=Model(
        vocab=129280,
        embed=7168,
        stages=stages((dense,) * 3 + (sparse,) * 58),
        embed_scale=False,
        tied=False,
        mtp=(sparse,),
    ),
    data=Data(seq_len=4096),
    optim=Optim(lr=7.3e-6, warmup=0, schedule="wsd", decay_fraction=0.0),
    steps=100_000,
)
