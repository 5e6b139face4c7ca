"""Rotary positions as `config.json` says them, in every spelling, against what transformers makes of the same file."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintrain import hf_config
from mintrain.config import ConfigError, Rope, Yarn
from mintrain.hf_rope import deepseek_rope, from_rope, gemma_rope
from mintrain.layers import rope as formula

GEMMA = dict(
    **dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6, vocab_size=256, num_attention_heads=4),
    **dict(num_key_value_heads=2, head_dim=24, sliding_window=9, query_pre_attn_scalar=24),
)
DEEPSEEK = dict(
    **dict(hidden_size=64, intermediate_size=96, moe_intermediate_size=20, vocab_size=256, num_hidden_layers=4),
    **dict(num_attention_heads=4, num_key_value_heads=4, n_routed_experts=12, num_experts_per_tok=4, n_group=4),
    **dict(topk_group=2, qk_rope_head_dim=16, q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=12, v_head_dim=10),
)
LINEAR, PLAIN = {"factor": 8.0, "rope_type": "linear"}, {"rope_type": "default"}
YARN = dict(factor=40, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=4096)
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def ropes(family: str, keys: dict) -> tuple[Rope, Rope]:
    """Of the first and of the last layer."""
    base = DEEPSEEK if family.startswith("deepseek") else GEMMA
    name = family if family.startswith("deepseek") or family == "gemma2" else f"{family}_text"
    layers = hf_config.model_config({"model_type": name, **base, **copy.deepcopy(keys)}).layers
    return layers[0].attention.rope, layers[-1].attention.rope


STRETCHED = (Rope(1e4), Rope(1e6, 8.0))
MIXED = {
    "theta beside": ("gemma3", {"rope_theta": 1e6, "rope_parameters": {GLOBAL: LINEAR, LOCAL: PLAIN}}, STRETCHED),
    "one kind only": ("gemma3", {"rope_parameters": {GLOBAL: {**LINEAR, "rope_theta": 1e6}}}, STRETCHED),
    "scaling laid over": (
        "gemma3",
        {
            "rope_parameters": {GLOBAL: {**PLAIN, "rope_theta": 1e6}, LOCAL: {**PLAIN, "rope_theta": 1e4}},
            "rope_scaling": LINEAR,
        },
        STRETCHED,
    ),
    "flat counts for nothing": ("gemma3", {"rope_parameters": {**LINEAR, "rope_theta": 5.0}}, (Rope(1e4), Rope(1e6))),
    "factor of a default": (
        "gemma2",
        {"rope_parameters": {**PLAIN, "rope_theta": 9.0, "factor": 8.0}},
        (Rope(9.0),) * 2,
    ),
    "yarn, theta beside": (
        "deepseek_v3",
        {"rope_theta": 5e4, "rope_parameters": {**YARN, "rope_type": "yarn"}},
        (Rope(5e4, yarn=Yarn(40, 4096)),) * 2,
    ),
    "yarn, scaling replaces": (
        "deepseek_v3",
        {"rope_parameters": {**PLAIN, "rope_theta": 7.0}, "rope_scaling": {**YARN, "type": "yarn"}},
        (Rope(1e4, yarn=Yarn(40, 4096)),) * 2,
    ),
    "yarn of the whole context": (
        "deepseek_v3",
        {"rope_scaling": {"factor": 40, "type": "yarn"}, "max_position_embeddings": 163_840},
        (Rope(1e4, yarn=Yarn(40, 163_840, mscale=0, mscale_all_dim=0)),) * 2,
    ),
    "yarn, own factor": (
        "deepseek_v2",
        {"rope_scaling": {**YARN, "type": "yarn", "attention_factor": 1.7, "truncate": False}},
        (Rope(1e4, yarn=Yarn(40, 4096, attention_factor=1.7, truncate=False)),) * 2,
    ),
    "without any": ("gemma4", {}, (Rope(1e4), Rope(1e6, fraction=0.25))),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_file_that_mixes_spellings_is_read_by_the_rule_of_transformers(name):
    family, keys, expected = MIXED[name]
    assert ropes(family, keys) == expected


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("deepseek_v3", {"rope_scaling": {"type": "yarn"}}, "has no factor"),
        ("gemma2", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not read"),
        ("gemma2", {"rope_parameters": {GLOBAL: LINEAR, LOCAL: PLAIN}}, "goes by type of layer"),
        ("gemma3", {"rope_parameters": {GLOBAL: {**PLAIN, "partial_rotary_factor": 0.5}}}, "partial_rotary_factor=0.5"),
        ("gemma4", {"rope_parameters": {GLOBAL: {"rope_theta": 1e6}}}, "no rope_theta for sliding_attention"),
        ("gemma3", {"rope_theta": "high"}, "theta='high' is not of type float"),
        ("deepseek_v3", {"rope_theta": None}, "theta=None is not of type"),
    ],
)
def test_what_the_decoder_does_not_compute_is_one_line_with_the_key(family, keys, message):
    with pytest.raises(ConfigError, match=message) as error:
        ropes(family, keys)
    assert "\n" not in str(error.value)


def test_the_last_layer_of_a_gemma4_is_global_whatever_the_file_says():
    local = {"global_head_dim": 24, "layer_types": [LOCAL] * 6, "hidden_size_per_layer_input": 0}
    layers = hf_config.model_config({"model_type": "gemma4_text", **GEMMA, **local}).layers
    assert [layer.attention.window for layer in layers] == [9] * 5 + [None]


@pytest.mark.parametrize(
    "rope",
    [Rope(7.0), Rope(7.0, 3.0), Rope(7.0, fraction=0.5), Rope(7.0, 3.0, 0.5), Rope(7.0, yarn=Yarn(4.0, 99)),
     Rope(7.0, yarn=Yarn(4.0, 99, 16.0, 2.0, 0.7, 0.0, 1.5, truncate=False))],
    ids=str,
)  # fmt: skip
def test_a_rope_comes_back_from_what_is_written(rope):
    written = from_rope(rope)
    if rope.yarn:
        assert deepseek_rope({"rope_theta": 1.0, "max_position_embeddings": 1, "rope_parameters": written}) == rope
    else:
        assert gemma_rope({"rope_parameters": {GLOBAL: written}}, "gemma4", GLOBAL) == rope


number = lambda *values: st.sampled_from(values)
SCALING = st.fixed_dictionaries(
    {},
    optional=dict(
        rope_type=number("default", "linear", "yarn", "proportional"),
        type=number("default", "linear", "yarn"),
        rope_theta=number(100.0, 5e4, 10_000),
        factor=number(0.5, 1.0, 4, 40.0),
        partial_rotary_factor=number(1.0, 0.5),
        mscale=number(0, 0.7, 1.0),
        mscale_all_dim=number(0, 0.7, 1.0),
        attention_factor=number(None, 1.7),
        truncate=st.booleans(),
        beta_fast=number(None, 16, 32),
        beta_slow=number(2, 1),
        original_max_position_embeddings=number(64, 4096),
    ),
)
KEYS = st.fixed_dictionaries(
    {},
    optional=dict(
        rope_theta=number(300.0, 1e6),
        rope_local_base_freq=number(500.0, 1e4),
        rope_scaling=SCALING,
        rope_parameters=st.one_of(
            st.none(), SCALING, st.fixed_dictionaries({}, optional={LOCAL: SCALING, GLOBAL: SCALING})
        ),
        max_position_embeddings=number(512, 8192),
    ),
)
PEER = {
    **{"gemma2": ("gemma2", "Gemma2"), "gemma3": ("gemma3", "Gemma3Text"), "gemma4": ("gemma4", "Gemma4Text")},
    **{f"deepseek_{v}": (f"deepseek_{v}", f"Deepseek{v.upper()}") for v in ("v2", "v3", "v32")},
}


@pytest.mark.parametrize("family", PEER)
def test_frequencies_and_factors_of_any_spelling_are_those_of_transformers_or_it_is_refused(family):
    transformers = pytest.importorskip("transformers")
    from importlib import import_module

    module, name = PEER[family]
    where = f"transformers.models.{module}"
    make_config = getattr(transformers, f"{name}Config")
    modeling = import_module(f"{where}.modeling_{module}")
    rotary = getattr(modeling, f"{name}RotaryEmbedding", None) or getattr(
        modeling, f"{name.removesuffix('Text')}RotaryEmbedding"
    )
    base, read = DEEPSEEK if family.startswith("deepseek") else GEMMA, 0

    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(KEYS)
    def same(keys):
        nonlocal read
        try:
            ours = ropes(family, keys)
        except ConfigError as error:
            assert "\n" not in str(error)
            return
        try:
            theirs = rotary(make_config(**base, **copy.deepcopy(keys)))
        except KeyError:  # transformers cannot read it either: rope_scaling beside a rope_parameters without its layers
            return
        read += 1
        for rope, kind in zip(ours, (LOCAL, GLOBAL), strict=True):
            layered = hasattr(theirs, f"{kind}_inv_freq")
            expected = getattr(theirs, f"{kind}_inv_freq" if layered else "inv_freq").numpy()
            factor = getattr(theirs, f"{kind}_attention_scaling" if layered else "attention_scaling")
            np.testing.assert_allclose(formula.frequencies(rope, 2 * len(expected)), expected, rtol=2e-6)
            assert formula.rotation_factor(rope) == pytest.approx(factor, rel=1e-6)

    same()
    assert read >= 10
