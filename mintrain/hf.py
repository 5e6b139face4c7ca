"""Hugging Face checkpoint folders of the Gemma families: `config.json` and safetensors to an Equinox model.

`model_config` reads both spellings of the configs (the hub's own and what transformers 5 writes). `TABLE`
names every weight once: the file's name, ours, and how the axes go from one to the other.
"""

import json
import re
from pathlib import Path
from typing import Any

import einops
import jax
import numpy as np
from jax.sharding import NamedSharding

from mintrain import config, sharding
from mintrain.arrays import Weight, check, weights
from mintrain.config import ConfigError
from mintrain.model import LM

LINEAR = "ff embed -> embed ff"
TABLE = {  # ours: (the file's, axes of the file -> our axes, for one layer)
    "embedding.table": ("embed_tokens.weight", "vocab embed -> vocab embed"),
    "norm.scale": ("norm.weight", "dim -> dim"),
    "attention_norm.scale": ("input_layernorm.weight", "dim -> dim"),
    "attention.q": ("self_attn.q_proj.weight", "(kv_heads group head) embed -> embed kv_heads group head"),
    "attention.k": ("self_attn.k_proj.weight", "(kv_heads head) embed -> embed kv_heads head"),
    "attention.v": ("self_attn.v_proj.weight", "(kv_heads head) embed -> embed kv_heads head"),
    "attention.o": ("self_attn.o_proj.weight", "embed (kv_heads group head) -> kv_heads group head embed"),
    "attention.q_norm.scale": ("self_attn.q_norm.weight", "dim -> dim"),
    "attention.k_norm.scale": ("self_attn.k_norm.weight", "dim -> dim"),
    "attention_post_norm.scale": ("post_attention_layernorm.weight", "dim -> dim"),
    "mlp_norm.scale": ("pre_feedforward_layernorm.weight", "dim -> dim"),
    "mlp.gate": ("mlp.gate_proj.weight", LINEAR),
    "mlp.up": ("mlp.up_proj.weight", LINEAR),
    "mlp.down": ("mlp.down_proj.weight", "embed ff -> ff embed"),
    "mlp_post_norm.scale": ("post_feedforward_layernorm.weight", "dim -> dim"),
    "scalar": ("layer_scalar", "1 -> "),
}
PREFIXES = ("model.language_model.", "language_model.model.", "model.")  # multimodal checkpoints nest the text model

# What a hub config leaves out: the defaults of the config classes of transformers 5.23.
HEADS = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, rms_norm_eps=1e-6)
DEFAULTS = {
    "gemma2": dict(
        HEADS,
        vocab_size=256_000,
        sliding_window=4096,
        rope_theta=1e4,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3": dict(HEADS, vocab_size=262_208, sliding_window=4096, rope_theta=1e6),
    "gemma4": dict(HEADS, vocab_size=262_144, sliding_window=512, global_head_dim=512, hidden_size_per_layer_input=256),
}
READ = {  # the values of switches that this decoder computes; others would load and give other numbers
    "hidden_activation": ("gelu_pytorch_tanh",),
    "tie_word_embeddings": (True,),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False, "vision"),
    "enable_moe_block": (None, False),
    "num_kv_shared_layers": (None, 0),
    "hidden_size_per_layer_input": (None, 0),
}


def model_config(hf: dict[str, Any]) -> config.Model:
    """The architecture that a Gemma 2, 3 or 4 (dense) `config.json` describes. Raises ConfigError for any other."""
    hf = hf.get("text_config") or hf
    family = str(hf.get("model_type")).removesuffix("_text")
    if family not in DEFAULTS:
        raise ConfigError(f"model_type={hf.get('model_type')!r} is not read; use gemma2, gemma3 or gemma4")
    hf = {**DEFAULTS[family], **hf}
    for name, allowed in READ.items():
        if name in hf and hf[name] not in allowed:
            raise ConfigError(
                f"{name}={hf[name]!r} in config.json is not read; only {' or '.join(map(repr, allowed))} is"
            )
    try:
        types = _layer_types(hf, family)
        layers = tuple(_layer(hf, family, i, kind) for i, kind in enumerate(types))
        period = next(p for p in range(1, len(layers) + 1) if all(a == layers[i % p] for i, a in enumerate(layers)))
        return config.Model(
            vocab=hf["vocab_size"],
            embed=hf["hidden_size"],
            stages=config.stages(layers[:period], len(layers)),
            norm_offset=0.0 if family == "gemma4" else 1.0,
            norm_eps=hf["rms_norm_eps"],
            final_softcap=hf.get("final_logit_softcapping"),
        )
    except KeyError as error:
        raise ConfigError(f"config.json has no {error.args[0]}; add it") from error


def _layer_types(hf: dict[str, Any], family: str) -> list[str]:
    count = hf["num_hidden_layers"]
    if types := hf.get("layer_types"):
        if len(types) != count:
            raise ConfigError(
                f"layer_types in config.json names {len(types)} layers, num_hidden_layers={count}; mend one"
            )
        return types
    period = 2 if family == "gemma2" else hf.get("sliding_window_pattern") or 6
    types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(count)]
    return [*types[:-1], "full_attention"] if family == "gemma4" else types


def _layer(hf: dict[str, Any], family: str, i: int, kind: str) -> config.Layer:
    full = kind == "full_attention"
    head, kv_heads = hf["head_dim"], hf["num_key_value_heads"]
    k_is_v = full and bool(hf.get("attention_k_eq_v"))
    if family == "gemma4" and full:
        per_layer = {int(k): v for k, v in (hf.get("per_layer_config") or {}).items()}  # keys such as "05"
        own = per_layer.get(i, {})  # transformers 5 writes this, the hub the fields below
        head = own.get("head_dim", hf.get("global_head_dim") or head)
        shared = hf.get("num_global_key_value_heads") if k_is_v else None
        kv_heads = own.get("num_key_value_heads", shared or kv_heads)
    return config.Layer(
        attention=config.Attention(
            heads=hf["num_attention_heads"],
            kv_heads=kv_heads,
            head_dim=head,
            scale=1.0 if family == "gemma4" else hf["query_pre_attn_scalar"] ** -0.5,
            rope=_rope(hf, family, kind),
            window=None if full else hf["sliding_window"],
            softcap=hf.get("attn_logit_softcapping") if family == "gemma2" else None,
            qk_norm=family != "gemma2",
            v_norm=family == "gemma4",
            k_is_v=k_is_v,
        ),
        mlp=config.MLP(hf["intermediate_size"]),
        scalar=family == "gemma4",
    )


def _rope(hf: dict[str, Any], family: str, kind: str) -> config.Rope:
    parameters = hf.get("rope_parameters") or {}
    rope = parameters.get(kind, parameters)
    if not rope and family == "gemma3" and kind == "sliding_attention":
        rope = {"rope_theta": hf.get("rope_local_base_freq", 10_000.0)}
    elif not rope:
        rope = {"rope_theta": hf["rope_theta"], **(hf.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "proportional"):
        raise ConfigError(f"rope_type={kind!r} is not read; use default, linear or proportional")
    return config.Rope(
        theta=rope["rope_theta"],
        factor=rope.get("factor", 1.0),
        fraction=rope.get("partial_rotary_factor", 1.0) if kind == "proportional" else 1.0,
    )


def rows(model: LM) -> list[tuple[list[str], str]]:
    """For each weight of `model`, in the order of its leaves: the file's names (one a layer), and the axes."""
    result, starts = [], [0]
    for stage in model.cfg.stages:
        starts.append(starts[-1] + len(stage.pattern) * stage.repeats)
    for weight in weights(model):
        inside = re.fullmatch(r"stages\[(\d+)\]\[(\d+)\]\.(.*)", weight.path)
        name, axes = TABLE[inside[3] if inside else weight.path]
        if inside:
            stage = model.cfg.stages[int(inside[1])]
            at = [starts[int(inside[1])] + r * len(stage.pattern) + int(inside[2]) for r in range(stage.repeats)]
            result.append(([f"layers.{i}.{name}" for i in at], axes))
        else:
            result.append(([name], axes))
    return result


def _text_names(names: list[str]) -> dict[str, str]:
    """The text model's tensors, by their names without the prefix. Other towers of a multimodal folder are left out."""
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in names)), "")
    return {name.removeprefix(prefix): name for name in names if name.startswith(prefix) or prefix == "model."}


def _read(array: np.ndarray, axes: str, weight: Weight) -> np.ndarray | None:
    """One layer's tensor with our axes, or None if it does not have the shape of `weight`."""
    shape = weight.value.shape[weight.stacked :]
    try:
        array = einops.rearrange(array, axes, **dict(zip(weight.dims, shape, strict=True)))
    except einops.EinopsError:
        return None
    return array if array.shape == shape else None


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
    for weight, (names, axes) in zip(weights(shapes), rows(shapes), strict=True):
        layers = []
        for name in names:
            full_name = files.pop(name, None)
            if full_name is None:
                problems.append(f"missing {name}")
                continue
            array = found[full_name].get_tensor(full_name)
            layers.append(_read(array, axes, weight))
            if layers[-1] is None:
                problems.append(f"{full_name} has shape {array.shape}")
        if not problems:
            leaf = (np.stack(layers) if weight.stacked else layers[0]).astype(np.float32)
            leaves.append(jax.device_put(leaf, NamedSharding(devices, sharding.spec(weight))))
    problems += [f"surplus {name}" for name in files]
    if problems:
        raise ConfigError(f"{folder}: {len(problems)} tensors do not fit config.json: {'; '.join(problems)}")
    model = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    check(model)
    return model
