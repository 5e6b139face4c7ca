"""Hugging Face checkpoint folders of all families: safetensors to an Equinox model.

The tables name every weight once: ours, the file's name, and how the axes go from one to the other.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import einops
import jax
import numpy as np
from jax.sharding import NamedSharding

from mintrain import config, sharding
from mintrain.arrays import Weight, check, weights
from mintrain.config import ConfigError
from mintrain.hf_config import model_config
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
    "attention.o": ("self_attn.o_proj.weight", "embed (kv_heads group head) -> kv_heads group head embed"),
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
    "moe.gate_up": ("experts.gate_up_proj", "experts (pair ff) embed -> experts embed pair ff"),
    "moe.down": ("experts.down_proj", "experts embed ff -> experts ff embed"),
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
    "attention.o": ("self_attn.o_proj.weight", "embed (heads v) -> heads v embed"),
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
        "(experts pair) ff embed -> experts embed pair ff",
    ),
    "moe.down": ("mlp.experts.{}.down_proj.weight", "experts embed ff -> experts ff embed"),
}
SHARED_EXPERTS = "mlp.shared_experts."  # the name of `mlp` in the files of layers that also have routed experts
PREFIXES = ("model.language_model.", "language_model.model.", "model.")  # multimodal checkpoints nest the text model


class Source(NamedTuple):
    """Where a weight comes from: for each of its layers, the file's tensors, which are stacked if `stack`."""

    layers: list[list[str]]
    stack: bool
    axes: str


def sources(model: LM) -> list[Source]:
    """The source of each weight of `model`, in the order of its leaves. Names are without the text model's prefix."""
    result, starts = [], [0]
    for stage in model.cfg.stages:
        starts.append(starts[-1] + len(stage.pattern) * stage.repeats)
    for weight in weights(model):
        inside = re.fullmatch(r"stages\[(\d+)\]\[(\d+)\]\.(.*)", weight.path)
        if not inside:
            template, axes = TABLE[weight.path]
            result.append(Source([[template]], False, axes))
            continue
        stage = model.cfg.stages[int(inside[1])]
        layer = stage.pattern[int(inside[2])]
        table = DEEPSEEK if isinstance(layer.attention, config.MLA) else GEMMA
        template, axes = table[inside[3]]
        if layer.moe and table is DEEPSEEK:
            template = re.sub(r"^mlp\.(?=\w+_proj)", SHARED_EXPERTS, template)
        stack, at = "{}" in template, starts[int(inside[1])] + int(inside[2])
        experts = range(layer.moe.experts) if layer.moe and stack else [0]
        names = [name.format(e) for e in experts for name in template.split()]
        numbers = range(at, at + stage.repeats * len(stage.pattern), len(stage.pattern))
        result.append(Source([[f"layers.{i}.{name}" for name in names] for i in numbers], stack, axes))
    return result


def _text_names(names: list[str]) -> dict[str, str]:
    """The text model's tensors, by their names without the prefix. Other towers of a multimodal folder are left out."""
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in names)), "")
    return {name.removeprefix(prefix): name for name in names if name.startswith(prefix) or prefix == "model."}


def _sizes(weight: Weight) -> dict[str, int]:
    return dict(zip(weight.dims, weight.value.shape[weight.stacked :], strict=True))


def file_shape(source: Source, weight: Weight) -> tuple[int, ...]:
    """The shape that each of the weight's tensors has in the file."""
    groups = re.findall(r"\(([^)]*)\)|(\w+)", source.axes.split("->")[0])
    sizes = {**_sizes(weight), "1": 1}
    shape = tuple(math.prod(sizes[name] for name in (many or one).split()) for many, one in groups)
    return shape[1:] if source.stack else shape


def load_hf(folder: str | Path, dtype: str = "float32", mesh: config.Mesh | None = None) -> LM:
    """Read a Hugging Face checkpoint folder. Returns the model, placed on `mesh` (one device by default).

    dtype: "float32" or "bfloat16", in which the model computes; its weights are kept in float32.
    Raises ConfigError that lists every missing, surplus or misshapen tensor.
    """
    from safetensors import safe_open

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    cfg = model_config(json.loads((folder / "config.json").read_text()))
    shapes = jax.eval_shape(lambda: LM.init(cfg, dtype, key=jax.random.key(0)))
    devices = sharding.make_mesh(mesh or config.Mesh())
    handles = [safe_open(file, framework="numpy") for file in sorted(folder.glob("model*.safetensors"))]
    found = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118
    files = _text_names(list(found))
    problems, leaves = [], []
    for weight, source in zip(weights(shapes), sources(shapes), strict=True):
        layers, expected = [], file_shape(source, weight)
        for names in source.layers:
            tensors = []
            for name in names:
                if name not in files:
                    problems.append(f"missing {name}")
                    continue
                full_name = files.pop(name)
                tensors.append(found[full_name].get_tensor(full_name))
                if tensors[-1].shape != expected:
                    problems.append(f"{full_name} has shape {tensors[-1].shape}, expected {expected}")
            if not problems:
                tensor = np.stack(tensors) if source.stack else tensors[0]
                layers.append(einops.rearrange(tensor, source.axes, **_sizes(weight)))
        if not problems:
            leaf = (np.stack(layers) if weight.stacked else layers[0]).astype(np.float32)
            leaves.append(jax.device_put(leaf, NamedSharding(devices, sharding.spec(weight))))
    problems += [f"surplus {name}" for name in files]
    if problems:
        raise ConfigError(f"{folder}: {len(problems)} tensors do not fit config.json: {'; '.join(problems)}")
    model = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    check(model)
    return model
