"""`config.json` of a Hugging Face folder to a `config.Model` and back; two spellings are read, the hub's is written.

The other spelling is that of transformers 5, which for example gives each layer's head width on its own.
"""

from dataclasses import replace
from typing import Any

from jaxtyping import TypeCheckError

from mintrain import config
from mintrain.config import ConfigError, wrong_type
from mintrain.hf_rope import deepseek_rope, from_rope, gemma_rope

# What a hub config leaves out: the defaults of the config classes of transformers 5.23.
HEADS = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, rms_norm_eps=1e-6)
GEMMA = dict(HEADS, tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh")
GEMMA4 = dict(GEMMA, vocab_size=262_144, sliding_window=512, global_head_dim=512)
DEEPSEEK = dict(
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    hidden_act="silu",
    rope_theta=1e4,
    max_position_embeddings=4096,
    n_shared_experts=1,
    n_group=8,
    topk_group=4,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    first_k_dense_replace=3,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    kv_lora_rank=512,
    q_lora_rank=1536,
)
DEFAULTS = {
    "gemma2": dict(
        GEMMA,
        vocab_size=256_000,
        sliding_window=4096,
        rope_theta=1e4,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3": dict(GEMMA, vocab_size=262_208, sliding_window=4096, rope_theta=1e6),
    "gemma4": dict(GEMMA4, hidden_size_per_layer_input=256),
    "gemma4_unified": dict(GEMMA4, hidden_size_per_layer_input=0),  # 12B: Gemma 4 with other towers beside the text
    "deepseek_v2": dict(
        DEEPSEEK,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        max_position_embeddings=2048,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        first_k_dense_replace=0,
    ),
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": dict(
        DEEPSEEK, index_topk=2048, index_n_heads=64, index_head_dim=128, max_position_embeddings=163_840
    ),
}
# The values of switches that this decoder computes; others would load and give other numbers. A key of the other family
# has no effect there: each Gemma 2 of the hub names `hidden_act` too, and its MLP reads `hidden_activation`.
GEMMA_READ = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (None, False, "vision"),
}
DEEPSEEK_READ = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True,),
    "moe_layer_freq": (1,),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "scoring_func": ("softmax", "sigmoid"),
}


def model_config(hf: dict[str, Any]) -> config.Model:
    """The architecture that a `config.json` describes. Raises ConfigError for one that mintrain does not compute."""
    hf = hf.get("text_config") or hf
    family = str(hf.get("model_type")).removesuffix("_text")
    if family not in DEFAULTS:
        raise ConfigError(f"model_type={hf.get('model_type')!r} is not read; use {', '.join(DEFAULTS)}")
    hf, family = {**DEFAULTS[family], **hf}, family.removesuffix("_unified")
    for name, allowed in (GEMMA_READ if family.startswith("gemma") else DEEPSEEK_READ).items():
        if name in hf and hf[name] not in allowed:
            raise ConfigError(
                f"{name}={hf[name]!r} in config.json is not read; only {' or '.join(map(repr, allowed))} is"
            )
    try:
        return _deepseek(hf, family) if family.startswith("deepseek") else _gemma(hf, family)
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(f"config.json has no {error.args[0]}; add it") from error
    except TypeCheckError as error:
        raise ConfigError(f"config.json describes no model: {wrong_type(error)}; download it again") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"config.json describes no model: {error}; download it again") from error


def _gemma(hf: dict[str, Any], family: str) -> config.Model:
    return config.Model(
        vocab=hf["vocab_size"],
        embed=hf["hidden_size"],
        stages=config.stages(tuple(_gemma_layer(hf, family, i, kind) for i, kind in enumerate(_kinds(hf, family)))),
        norm_offset=0.0 if family == "gemma4" else 1.0,
        norm_eps=hf["rms_norm_eps"],
        final_softcap=hf.get("final_logit_softcapping"),
        per_layer_input=hf.get("hidden_size_per_layer_input") or 0,
    )


def _kinds(hf: dict[str, Any], family: str) -> list[str]:
    """Each layer's type of attention."""
    count, kinds = hf["num_hidden_layers"], hf.get("layer_types")
    if not kinds:
        period = 2 if family == "gemma2" else hf.get("sliding_window_pattern") or 6
        kinds = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(count)]
    if len(kinds) != count:
        raise ConfigError(f"layer_types in config.json names {len(kinds)} layers, num_hidden_layers={count}; mend one")
    # transformers makes the last layer of a Gemma 4 global whatever the file says.
    return [*kinds[:-1], "full_attention"] if family == "gemma4" else kinds


def _gemma_layer(hf: dict[str, Any], family: str, i: int, kind: str) -> config.Layer:
    full = kind == "full_attention"
    head, kv_heads = hf["head_dim"], hf["num_key_value_heads"]
    k_is_v = full and bool(hf.get("attention_k_eq_v"))
    if family == "gemma4" and full:
        per_layer = {int(k): v for k, v in (hf.get("per_layer_config") or {}).items()}  # keys such as "05"
        own = per_layer.get(i, {})  # transformers 5 writes this, the hub the fields below
        head = own.get("head_dim", hf.get("global_head_dim") or head)
        fewer = hf.get("num_global_key_value_heads") if k_is_v else None
        kv_heads = own.get("num_key_value_heads", fewer or kv_heads)
    shares = i >= hf["num_hidden_layers"] - (hf.get("num_kv_shared_layers") or 0)
    moe = None
    if hf.get("enable_moe_block"):
        for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            if hf.get(name) is None:
                raise ConfigError(f"enable_moe_block=true in config.json, but {name} is missing; add it")
        moe = config.MoE(
            experts=hf["num_experts"],
            topk=hf["top_k_experts"],
            width=hf["moe_intermediate_size"],
            activation="gelu",
            normalise=True,
            learned_scales=True,
        )
    return config.Layer(
        attention=config.Attention(
            heads=hf["num_attention_heads"],
            kv_heads=kv_heads,
            head_dim=head,
            scale=1.0 if family == "gemma4" else hf["query_pre_attn_scalar"] ** -0.5,
            rope=gemma_rope(hf, family, kind),
            window=None if full else hf["sliding_window"],
            softcap=hf.get("attn_logit_softcapping") if family == "gemma2" else None,
            qk_norm=family != "gemma2",
            v_norm=family == "gemma4",
            k_is_v=k_is_v,
            shares_kv=shares,
        ),
        mlp=config.MLP(hf["intermediate_size"] * (2 if shares and hf.get("use_double_wide_mlp") else 1)),
        moe=moe,
        scalar=family == "gemma4",
    )


def _deepseek(hf: dict[str, Any], family: str) -> config.Model:
    indexer = None
    if family == "deepseek_v32":
        indexer = config.Indexer(hf["index_n_heads"], hf["index_head_dim"], hf["index_topk"])
    mla = config.MLA(
        heads=hf["num_attention_heads"],
        q_lora=hf["q_lora_rank"],
        kv_lora=hf["kv_lora_rank"],
        nope=hf["qk_nope_head_dim"],
        rope_dim=hf["qk_rope_head_dim"],
        v=hf["v_head_dim"],
        rope=deepseek_rope(hf),
        indexer=indexer,
    )
    v2 = family == "deepseek_v2"
    grouped = not v2 or hf["topk_method"] == "group_limited_greedy"
    moe = config.MoE(
        experts=hf["n_routed_experts"],
        topk=hf["num_experts_per_tok"],
        width=hf["moe_intermediate_size"],
        score="softmax" if v2 else "sigmoid",
        groups=hf["n_group"] if grouped else 1,
        kept_groups=hf["topk_group"] if grouped else 1,
        normalise=not v2 and hf["norm_topk_prob"],  # transformers ignores it in V2, and no released V2 sets it
        scaling=hf["routed_scaling_factor"],
        bias_rate=None if v2 else 0.001,
        balance=hf.get("aux_loss_alpha", 0.0),
    )
    shared = (
        config.MLP(hf["n_shared_experts"] * hf["moe_intermediate_size"], "silu") if hf["n_shared_experts"] else None
    )
    dense = config.Layer(mla, config.MLP(hf["intermediate_size"], "silu"), post_norms=False)
    sparse = config.Layer(mla, shared, moe, post_norms=False)
    first = hf["first_k_dense_replace"]
    return config.Model(
        vocab=hf["vocab_size"],
        embed=hf["hidden_size"],
        stages=config.stages((dense,) * first + (sparse,) * (hf["num_hidden_layers"] - first)),
        norm_eps=hf["rms_norm_eps"],
        embed_scale=False,
        tied=False,
    )


def from_model(model: config.Model) -> dict[str, Any]:
    """The inverse of `model_config`, in the spelling of the hub. Raises ConfigError for what has no form there."""
    mla = any(isinstance(layer.attention, config.MLA) for layer in model.layers)
    try:
        hf = _to_deepseek(model) if mla else _to_gemma(model)
        if model_config(hf) == plain(model):
            return hf
    except (StopIteration, AttributeError, ConfigError, IndexError):
        pass  # some layer is not what its family's layers are
    raise ConfigError("this model has no Hugging Face form: its layers are not those of one family; see docs/models.md")


def plain(model: config.Model) -> config.Model:
    """Without what only training from scratch knows."""

    def without(layer: config.Layer) -> config.Layer:
        attention, moe = layer.attention, layer.moe
        if isinstance(attention, config.Attention):
            attention = replace(attention, q_norm_init=1.0)
        if moe is not None:
            moe = replace(moe, balance=0.0, bias_rate=None if moe.bias_rate is None else 0.001)
        return replace(layer, attention=attention, moe=moe)

    return replace(model, stages=config.stages(tuple(map(without, model.layers))), mtp=())


def _to_gemma(model: config.Model) -> dict[str, Any]:
    layers = model.layers
    family = "gemma4" if model.norm_offset == 0 else "gemma3" if layers[0].attention.qk_norm else "gemma2"
    local = next((layer.attention for layer in layers if layer.attention.window), layers[0].attention)
    globe = next((layer.attention for layer in layers if not layer.attention.window), None)
    kinds = ["sliding_attention" if layer.attention.window else "full_attention" for layer in layers]
    hf = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family if family == "gemma2" else f"{family}_text",
        "vocab_size": model.vocab,
        "hidden_size": model.embed,
        "intermediate_size": layers[0].mlp.width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": local.heads,
        "num_key_value_heads": local.kv_heads,
        "head_dim": local.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": model.norm_eps,
        "sliding_window": local.window or 4096,
        "layer_types": kinds,
        "final_logit_softcapping": model.final_softcap,
        "tie_word_embeddings": True,
        "attention_bias": False,
    }
    ropes = {"sliding_attention": from_rope(local.rope), "full_attention": from_rope((globe or local).rope)}
    if family != "gemma4":
        hf["query_pre_attn_scalar"] = _whole(round(local.scale**-2, 6))
        hf["attn_logit_softcapping"] = local.softcap
        return hf | {"rope_parameters": ropes if family == "gemma3" else ropes["sliding_attention"]}
    globe, last, moe = globe or local, layers[-1], layers[0].moe
    return hf | {
        "rope_parameters": ropes,
        "global_head_dim": globe.head_dim,
        "num_global_key_value_heads": globe.kv_heads if globe.k_is_v else None,
        "attention_k_eq_v": globe.k_is_v,
        "num_kv_shared_layers": sum(layer.attention.shares_kv for layer in layers),
        "use_double_wide_mlp": last.mlp.width == 2 * layers[0].mlp.width,
        "hidden_size_per_layer_input": model.per_layer_input,
        "vocab_size_per_layer_input": model.vocab,
        "enable_moe_block": moe is not None,
        "num_experts": moe and moe.experts,
        "top_k_experts": moe and moe.topk,
        "moe_intermediate_size": moe and moe.width,
    }


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _to_deepseek(model: config.Model) -> dict[str, Any]:
    mla = model.layers[0].attention
    first = next((i for i, layer in enumerate(model.layers) if layer.moe), len(model.layers))
    moe, shared = model.layers[first].moe, model.layers[first].mlp
    family = "deepseek_v32" if mla.indexer else "deepseek_v3" if moe.score == "sigmoid" else "deepseek_v2"
    yarn, rope = mla.rope.yarn, from_rope(mla.rope)
    names = {"deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3", "deepseek_v32": "DeepseekV32"}
    hf = {
        "architectures": [f"{names[family]}ForCausalLM"],
        "model_type": family,
        "vocab_size": model.vocab,
        "hidden_size": model.embed,
        "intermediate_size": model.layers[0].mlp.width,
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": mla.heads,
        "num_key_value_heads": mla.heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "q_lora_rank": mla.q_lora,
        "kv_lora_rank": mla.kv_lora,
        "qk_nope_head_dim": mla.nope,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.v,
        "rope_parameters": rope,
        "first_k_dense_replace": first,
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.topk,
        "moe_intermediate_size": moe.width,
        "n_shared_experts": shared.width // moe.width if shared else 0,
        "n_group": moe.groups,
        "topk_group": moe.kept_groups,
        "norm_topk_prob": moe.normalise,
        "routed_scaling_factor": moe.scaling,
        "max_position_embeddings": round(yarn.factor * yarn.original) if yarn else 4096,
    }
    if family == "deepseek_v2":
        hf |= {"topk_method": "group_limited_greedy" if moe.groups > 1 else "greedy"}
    if mla.indexer:
        hf |= {"index_n_heads": mla.indexer.heads, "index_head_dim": mla.indexer.head_dim}
        hf |= {"index_topk": mla.indexer.topk}
    return hf | ({"num_nextn_predict_layers": len(model.mtp)} if model.mtp else {})
