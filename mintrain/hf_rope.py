"""Rotary positions in `config.json` to a `config.Rope` and back, each spelling by the rule of transformers 5.23.

`rope_parameters` is the newer spelling (by type of layer in Gemma 3 and 4), `rope_theta`, `rope_local_base_freq` and
`rope_scaling` are the older one; files that mix them exist. Source: `RotaryEmbeddingConfigMixin` and the configs'
`convert_rope_params_to_dict` there.
"""

from typing import Any

from mintrain import config
from mintrain.config import ConfigError

Keys = dict[str, Any]
UNSAID = {  # what a Gemma 4 without rope_parameters has
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}


def gemma_rope(hf: Keys, family: str, kind: str) -> config.Rope:
    """kind: "sliding_attention" or "full_attention"."""
    rope = {"gemma2": _flat, "gemma3": _gemma3, "gemma4": _gemma4}[family](hf, kind)
    type_ = _type(rope, "default", "linear", *(["proportional"] if family == "gemma4" else []))
    if type_ == "default":
        return config.Rope(theta=rope["rope_theta"])  # every other key is without effect
    if type_ == "linear":
        return config.Rope(theta=rope["rope_theta"], factor=_given(rope, "factor"))
    fraction = rope.get("partial_rotary_factor", 1.0)
    return config.Rope(theta=rope["rope_theta"], factor=rope.get("factor", 1.0), fraction=fraction)


def deepseek_rope(hf: Keys) -> config.Rope:
    rope = _flat(hf)
    if _type(rope, "default", "yarn") == "default":
        return config.Rope(theta=rope["rope_theta"])
    original = rope.get("original_max_position_embeddings", hf["max_position_embeddings"])
    yarn = config.Yarn(
        factor=_given(rope, "factor"),
        original=original,
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        mscale=rope.get("mscale") or 0.0,
        mscale_all_dim=rope.get("mscale_all_dim") or 0.0,
        attention_factor=rope.get("attention_factor"),
        truncate=rope.get("truncate", True),
    )
    return config.Rope(theta=rope["rope_theta"], yarn=yarn)


def _flat(hf: Keys, kind: str = "") -> Keys:
    """The same for all layers. An older `rope_scaling` replaces the whole of `rope_parameters`."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError("rope_parameters in config.json goes by type of layer, which this model does not; give one")
    return {"rope_theta": hf["rope_theta"], **rope}


def _gemma3(hf: Keys, kind: str) -> Keys:
    """By type of layer; what is not under a type counts for nothing. `rope_scaling` is laid over the global layers'."""
    given = hf.get("rope_parameters")
    rope = {"rope_type": "default"} if given is None else given.get(kind) or {}
    if kind == "sliding_attention":
        return {"rope_theta": hf.get("rope_local_base_freq", 1e4), **rope}
    return {"rope_theta": hf["rope_theta"], **rope, **(hf.get("rope_scaling") or {})}


def _gemma4(hf: Keys, kind: str) -> Keys:
    """By type of layer. There is no older spelling of it."""
    if hf.get("rope_scaling") is not None:
        raise ConfigError("rope_scaling in config.json has no meaning in a Gemma 4; say it in rope_parameters")
    rope = hf.get("rope_parameters")
    if rope is None:
        return UNSAID[kind]
    if not isinstance(rope.get(kind), dict) or "rope_theta" not in rope[kind]:
        raise ConfigError(f"rope_parameters in config.json has no rope_theta for {kind}; add it")
    return rope[kind]


def _type(rope: Keys, *read: str) -> str:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in read:
        raise ConfigError(f"rope_type={kind!r} is not read; use {' or '.join(read)}")
    if kind != "proportional" and (part := rope.get("partial_rotary_factor", 1.0)) != 1:
        raise ConfigError(f"partial_rotary_factor={part} is not read beside rope_type={kind!r}; remove it")
    return kind


def _given(rope: Keys, name: str) -> Any:
    if rope.get(name) is None:
        raise ConfigError(f"rope_type={rope.get('rope_type', rope.get('type'))!r} in config.json has no {name}; add it")
    return rope[name]


def from_rope(rope: config.Rope) -> Keys:
    """The newer spelling."""
    plain = {"rope_type": "default", "rope_theta": rope.theta}
    if yarn := rope.yarn:
        more = {"beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow, "mscale": yarn.mscale}
        more |= {"mscale_all_dim": yarn.mscale_all_dim, "original_max_position_embeddings": yarn.original}
        more |= {} if yarn.attention_factor is None else {"attention_factor": yarn.attention_factor}
        more |= {} if yarn.truncate else {"truncate": False}
        return plain | {"rope_type": "yarn", "factor": yarn.factor, **more}
    factor = {} if rope.factor == 1 else {"factor": rope.factor}
    if rope.fraction != 1:
        return plain | {"rope_type": "proportional", "partial_rotary_factor": rope.fraction, **factor}
    return plain | ({"rope_type": "linear", **factor} if factor else {})
