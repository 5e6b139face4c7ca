"""The names of every weight, ours and Hugging Face's, and how the axes go from one to the other.

One table a family serves reading and writing.
"""

import math
import re
from typing import NamedTuple

from mintrain import config
from mintrain.arrays import Weight, weights
from mintrain.model import LM

SAME = "dim -> dim"
TABLE = {  # ours: (the file's, axes of the file -> our axes, for one layer)
    "embedding.table": ("embed_tokens.weight", "vocab embed -> vocab embed"),
    "head.table": ("lm_head.weight", "vocab embed -> vocab embed"),
    "norm.scale": ("norm.weight", SAME),
    "per_layer_inputs.embedding.table": ("embed_tokens_per_layer.weight", "vocab embed -> vocab embed"),
    "per_layer_inputs.projection": ("per_layer_model_projection.weight", "layers_width embed -> embed layers_width"),
    "per_layer_inputs.norm.scale": ("per_layer_projection_norm.weight", SAME),
    "attention_norm.scale": ("input_layernorm.weight", SAME),
    "mlp.gate": ("mlp.gate_proj.weight", "ff embed -> embed ff"),
    "mlp.up": ("mlp.up_proj.weight", "ff embed -> embed ff"),
    "mlp.down": ("mlp.down_proj.weight", "embed ff -> ff embed"),
}
GEMMA = TABLE | {
    "attention.q": ("self_attn.q_proj.weight", "(kv_heads group head) embed -> embed kv_heads group head"),
    "attention.k": ("self_attn.k_proj.weight", "(kv_heads head) embed -> embed kv_heads head"),
    "attention.v": ("self_attn.v_proj.weight", "(kv_heads head) embed -> embed kv_heads head"),
    "attention.o": ("self_attn.o_proj.weight", "embed heads_value -> heads_value embed"),
    "attention.q_norm.scale": ("self_attn.q_norm.weight", SAME),
    "attention.k_norm.scale": ("self_attn.k_norm.weight", SAME),
    "attention_post_norm.scale": ("post_attention_layernorm.weight", SAME),
    "mlp_norm.scale": ("pre_feedforward_layernorm.weight", SAME),
    "mlp_post_norm.scale": ("post_feedforward_layernorm.weight", SAME),
    "scalar": ("layer_scalar", "1 -> "),
    # 26B
    "branches.mlp_post_norm.scale": ("post_feedforward_layernorm_1.weight", SAME),
    "branches.moe_norm.scale": ("pre_feedforward_layernorm_2.weight", SAME),
    "branches.moe_post_norm.scale": ("post_feedforward_layernorm_2.weight", SAME),
    "moe.router.weight": ("router.proj.weight", "routes embed -> embed routes"),
    "moe.router.scale": ("router.scale", SAME),
    "moe.router.expert_scale": ("router.per_expert_scale", "routes -> routes"),
    "moe.gate_up": ("experts.gate_up_proj", "experts (pair ff) expert_embed -> experts expert_embed pair ff"),
    "moe.down": ("experts.down_proj", "experts expert_embed ff -> experts ff expert_embed"),
    # E2B, E4B
    "per_layer.gate": ("per_layer_input_gate.weight", "width embed -> embed width"),
    "per_layer.out": ("per_layer_projection.weight", "embed width -> width embed"),
    "per_layer.norm.scale": ("post_per_layer_input_norm.weight", SAME),
}
DEEPSEEK = TABLE | {
    "attention.q": ("self_attn.q_proj.weight", "(heads head) embed -> embed heads head"),
    "attention.q_a": ("self_attn.q_a_proj.weight", "q_lora embed -> embed q_lora"),
    "attention.q_norm.scale": ("self_attn.q_a_layernorm.weight", SAME),
    "attention.q_b": ("self_attn.q_b_proj.weight", "(heads head) q_latent -> q_latent heads head"),
    "attention.kv_a": ("self_attn.kv_a_proj_with_mqa.weight", "compressed embed -> embed compressed"),
    "attention.kv_norm.scale": ("self_attn.kv_a_layernorm.weight", SAME),
    "attention.kv_b": ("self_attn.kv_b_proj.weight", "(heads nope_v) kv_latent -> kv_latent heads nope_v"),
    "attention.o": ("self_attn.o_proj.weight", "embed heads_value -> heads_value embed"),
    "attention.indexer.q": (
        "self_attn.indexer.wq_b.weight",
        "(index_heads index_dim) q_latent -> q_latent index_heads index_dim",
    ),
    "attention.indexer.k": ("self_attn.indexer.wk.weight", "index_dim embed -> embed index_dim"),
    "attention.indexer.k_norm.scale": ("self_attn.indexer.k_norm.weight", SAME),
    "attention.indexer.k_norm.bias": ("self_attn.indexer.k_norm.bias", SAME),
    "attention.indexer.head_weights": (
        "self_attn.indexer.weights_proj.weight",
        "index_heads embed -> embed index_heads",
    ),
    "mlp_norm.scale": ("post_attention_layernorm.weight", SAME),
    "moe.router.weight": ("mlp.gate.weight", "routes embed -> embed routes"),
    "moe.router.bias": ("mlp.gate.e_score_correction_bias", "routes -> routes"),
    # one tensor for each expert: {} counts them, and all that one of ours is made of are stacked along a first axis
    "moe.gate_up": (
        "mlp.experts.{}.gate_proj.weight mlp.experts.{}.up_proj.weight",
        "(experts pair) ff expert_embed -> experts expert_embed pair ff",
    ),
    "moe.down": ("mlp.experts.{}.down_proj.weight", "experts expert_embed ff -> experts ff expert_embed"),
}
SHARED_EXPERTS = "mlp.shared_experts."  # the name of `mlp` in the files of layers that also have routed experts
MTP = {  # beside the layer itself; its token vectors and head are the model's
    "hidden_norm.scale": ("hnorm.weight", SAME),
    "token_norm.scale": ("enorm.weight", SAME),
    "join": ("eh_proj.weight", "joined (pair embed) -> pair embed joined"),
    "norm.scale": ("shared_head.norm.weight", SAME),
}
PREFIXES = ("model.language_model.", "language_model.model.", "model.")  # multimodal checkpoints nest the text model


class Source(NamedTuple):
    """Where a weight comes from: for each of its layers, the file's tensors.

    stack: several tensors of a layer are stacked along a first axis, as "experts" or "(experts pair)" in `axes` says.
    """

    layers: list[list[str]]
    stack: bool
    axes: str


def sources(model: LM) -> list[Source]:
    """The source of each weight of `model`, in the order of its leaves. Names are without the text model's prefix."""
    result, starts, layers = [], [0], model.cfg.layers
    for stage in model.cfg.stages:
        starts.append(starts[-1] + len(stage.pattern) * stage.repeats)
    for weight in weights(model):
        inside = re.fullmatch(r"(stages\[(\d+)\]\[(\d+)\]|mtp\[(\d+)\](\.block)?)\.(.*)", weight.path)
        if not inside:
            name, axes = TABLE[weight.path]
            result.append(Source([[name]], False, axes))
        elif inside[4] is None:
            stage = model.cfg.stages[int(inside[2])]
            first, period = starts[int(inside[2])] + int(inside[3]), len(stage.pattern)
            numbers = range(first, first + stage.repeats * period, period)
            result.append(_source(stage.pattern[int(inside[3])], inside[6], numbers))
        else:
            depth, table = int(inside[4]), None if inside[5] else MTP
            result.append(_source(model.cfg.mtp[depth], inside[6], [len(layers) + depth], table))
    return result


def _source(layer: config.Layer, path: str, numbers, table: dict[str, tuple[str, str]] | None = None) -> Source:
    latent = isinstance(layer.attention, config.MLA)
    template, axes = (table or (DEEPSEEK if latent else GEMMA))[path]
    if layer.moe and latent:
        template = re.sub(r"^mlp\.(?=\w+_proj)", SHARED_EXPERTS, template)
    stack = "{}" in template
    experts = range(layer.moe.experts) if layer.moe and stack else [0]
    names = [name.format(e) for e in experts for name in template.split()]
    return Source([[f"layers.{i}.{name}" for name in names] for i in numbers], stack, axes)


def unused(model: config.Model) -> re.Pattern:
    """Tensors that some checkpoints hold and nothing reads: copies of what is shared, and tables that are computed."""
    shared = [i for i, layer in enumerate(model.layers) if getattr(layer.attention, "shares_kv", False)]
    patterns = [r".*rotary_emb\.inv_freq", *([r"lm_head\.weight"] if model.tied else [])]
    patterns += [rf"layers\.{i}\.self_attn\.[kv]_(proj|norm)\.weight" for i in shared]
    patterns += [
        rf"layers\.{len(model.layers) + i}\.(embed_tokens|shared_head\.head)\.weight" for i in range(len(model.mtp))
    ]
    return re.compile("|".join(patterns))


def text_names(names: list[str]) -> dict[str, str]:
    """The text model's tensors, by their names without the prefix. Other towers of a multimodal folder are left out."""
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in names)), "")
    return {name.removeprefix(prefix): name for name in names if name.startswith(prefix) or prefix == "model."}


def sizes(weight: Weight) -> dict[str, int]:
    return dict(zip(weight.dims, weight.value.shape[weight.stacked :], strict=True))


def file_shape(source: Source, weight: Weight) -> tuple[int, ...]:
    """The shape that each of the weight's tensors has in the file."""
    groups = re.findall(r"\(([^)]*)\)|(\w+)", source.axes.split("->")[0])
    known = {**sizes(weight), "1": 1}
    shape = tuple(math.prod(known[name] for name in (many or one).split()) for many, one in groups)
    return shape[1:] if source.stack else shape
