"""Tiny checkpoints written by Hugging Face transformers, and what transformers computes from them.

`cases/NAME/` is a checkpoint folder; `config_hub.json` is the same config in the older spelling of the official
checkpoints. `reference.safetensors` holds the inputs, the logits, the loss, the hidden states and the gradient norms.
"""

import json
from pathlib import Path

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from mintrain import config, hf_config, hf_names, load_hf, logits, sharding, step
from mintrain.arrays import check, weights
from mintrain.config import Config, ConfigError, Data
from mintrain.layers import sparse
from mintrain.layers.rope import frequencies
from mintrain.layers.router import Router
from mintrain.loss import Batch
from mintrain.model import LM

HERE = Path(__file__).parent
# The mean error of bfloat16 logits that transformers itself makes against exact arithmetic on the same weights. Where
# there are routers and indexers it comes from choices that flip.
CASES = {
    **{
        "gemma2": 0.015,
        "gemma3": 0.015,
        "gemma4-dense": 0.06,
        "gemma4-moe": 0.3,
        "gemma4-e2b": 0.06,
        "gemma4-e4b": 0.06,
    },
    **{"deepseek-v2": 0.06, "deepseek-v2-full": 0.3, "deepseek-v3": 0.3, "deepseek-v3.2": 0.5},
}
REAL = json.loads((HERE / "real_configs.json").read_text())


def config_of(name: str, file: str = "config.json"):
    return hf_config.model_config(json.loads((HERE / "cases" / name / file).read_text()))


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """The name, the model in float32 and the reference."""
    folder = HERE / "cases" / request.param
    return request.param, load_hf(folder), load_file(folder / "reference.safetensors")


def test_both_config_dialects_describe_the_same_model():
    for name in CASES:
        assert config_of(name) == config_of(name, "config_hub.json")


def test_logits(case):
    _, model, reference = case
    ours = logits(model, reference["input_ids"])
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, reference["logits"], rtol=0, atol=5e-4)


def test_hidden_states_routers_and_indexers(case, monkeypatch):
    name, model, reference = case
    monkeypatch.setattr(sparse, "GATHER_FROM", 1000)  # the form that makes a mask; test_logits takes the other one
    tokens = reference["input_ids"]
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    routed, masks = [], []

    def note(into, function):
        def noting(*args):
            into.append(function(*args))
            return into[-1]

        return noting

    monkeypatch.setattr(Router, "__call__", note(routed, Router.__call__))
    monkeypatch.setattr(sparse, "top_mask", note(masks, sparse.top_mask))

    def states(model: LM, *inputs):
        routed.clear(), masks.clear()
        ids = inputs[0].reshape(-1)
        x, shared, done = [model.embed(ids)], {}, 0
        extra = model.per_layer_inputs and model.per_layer_inputs(ids, x[0])
        for stage, blocks in zip(model.cfg.stages, model.stages, strict=True):
            for i in range(stage.repeats):
                for layer, block in zip(stage.pattern, jax.tree.map(lambda w, i=i: w[i], blocks), strict=True):
                    kind = getattr(layer.attention, "kind", None)
                    kv = shared[kind] if getattr(layer.attention, "shares_kv", False) else None
                    y, _, shared[kind] = block(x[-1], *inputs[1:], None if extra is None else extra[done], kv)
                    x.append(y)
                    done += 1
        hidden = tuple(y.reshape(*tokens.shape, -1) for y in (*x, model.norm(x[-1])))
        return hidden, tuple((i, w) for i, w, _ in routed), tuple(masks)

    names = ["hidden.embed", *(f"hidden.{i}" for i in range(len(model.cfg.layers))), "hidden.norm"]
    layout, flat = P(*sharding.BATCH[1:], None), P(sharding.ALL_TOKENS, None)
    run = tiny.sharded(states, model, layout, flat, layout)
    hidden, routers, indexers = run(tokens, positions, np.ones_like(tokens))
    for part, ours in zip(names, hidden, strict=True):
        np.testing.assert_allclose(ours, reference[part], rtol=0, atol=2e-3, err_msg=part)

    expected = sorted({int(key.split(".")[1]) for key in reference if key.startswith("router.")})
    assert len(routers) == len(expected) and bool(expected) == (
        name not in ("gemma2", "gemma3", "gemma4-dense", "gemma4-e2b", "gemma4-e4b")
    )
    for layer, (index, weight) in zip(expected, routers, strict=True):
        index, weight = np.asarray(index), np.asarray(weight)
        order = np.argsort(index, axis=1)
        np.testing.assert_array_equal(np.take_along_axis(index, order, 1), reference[f"router.{layer}.index"])
        ours = np.take_along_axis(weight, order, 1)
        np.testing.assert_allclose(ours, reference[f"router.{layer}.weight"], rtol=0, atol=1e-4)

    expected = sorted(key for key in reference if key.startswith("indexer."))
    assert len(indexers) == len(expected) == (4 if name == "deepseek-v3.2" else 0)
    for key, mask in zip(expected, indexers, strict=True):
        np.testing.assert_array_equal(mask, reference[key].astype(bool), err_msg=key)


def test_loss_and_the_norm_of_every_gradient(case):
    _, model, reference = case
    tokens = reference["input_ids"]
    cfg = Config(model.cfg, data=Data(seq_len=tokens.shape[1]), per_device_batch_size=len(tokens), remat="none")
    place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    counted = (place < tokens.shape[1] - 1).astype(np.float32)  # the last token has no target
    arrays = tokens, np.roll(tokens, -1, axis=1), place, np.ones_like(tokens), counted
    mesh = model.norm.scale.sharding.mesh
    batch = Batch(*jax.device_put(arrays, NamedSharding(mesh, P(*sharding.BATCH[1:]))))
    loss = step.sharded_loss(cfg, mesh, model)
    (total, report), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model, batch, step.count(batch))

    extra = (
        0.0 if report.indexer_kl is None else report.indexer_kl / tokens.size
    )  # transformers does not train indexers
    np.testing.assert_allclose(total - extra, reference["loss"], rtol=0, atol=5e-4)
    np.testing.assert_allclose(report.nll / counted.sum(), reference["loss"], rtol=0, atol=5e-4)

    ours = {}
    for weight, source in zip(weights(grads), hf_names.sources(model), strict=True):
        layers = np.asarray(weight.value) if weight.stacked else np.asarray(weight.value)[None]
        back = " -> ".join(reversed(source.axes.split(" -> ")))
        if weight.buffer:
            assert not layers.any(), weight.path  # transformers does not train it either
            continue
        for names, layer in zip(source.layers, layers, strict=True):
            tensor = einops.rearrange(layer, back, **({"pair": 2} if "pair" in back else {}))
            for name, part in zip(names, tensor if source.stack else [tensor], strict=True):
                assert part.shape == hf_names.file_shape(source, weight)
                ours[f"grad_norm.{'' if name.startswith('lm_head') else 'model.'}{name}"] = np.linalg.norm(part)
    expected = {name: norm for name, norm in reference.items() if name.startswith("grad_norm.")}
    assert {name for name in ours if ".indexer." not in name} == expected.keys()
    for name, norm in expected.items():
        np.testing.assert_allclose(ours[name], norm, rtol=1e-3, atol=1e-7, err_msg=name)


def test_rope_frequencies():
    for name in CASES:
        reference = load_file(HERE / "cases" / name / "reference.safetensors")
        for layer in config_of(name).layers:
            kind = "full_attention" if getattr(layer.attention, "window", None) is None else "sliding_attention"
            expected = reference.get(f"rope.{kind}.inv_freq", reference.get("rope.all.inv_freq"))
            width = layer.attention.rope_dim if isinstance(layer.attention, config.MLA) else layer.attention.head_dim
            ours = frequencies(layer.attention.rope, width)
            np.testing.assert_allclose(ours, expected, rtol=1e-6, err_msg=f"{name} {kind}")


def test_bfloat16_logits_are_as_good_as_those_of_transformers(case):
    name, exact, reference = case
    model = load_hf(HERE / "cases" / name, dtype="bfloat16")
    check(model)  # its parameters are float32 all the same
    rounded = lambda tree: jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), tree)
    ours, exactly = (logits(rounded(m), reference["input_ids"]) for m in (model, exact))
    assert ours.dtype == jnp.float32
    assert 0 < np.abs(ours - exactly).mean() < CASES[name]


def copy_case(name: str, to: Path, change) -> Path:
    """A checkpoint folder after `change(config, tensors)`, which may edit the tensors or return others."""
    config = json.loads((HERE / "cases" / name / "config.json").read_text())
    tensors = load_file(HERE / "cases" / name / "model.safetensors")
    config, tensors = change(config, tensors)
    (to / "config.json").write_text(json.dumps(config))
    save_file(tensors, to / "model.safetensors")
    return to


def test_everything_wrong_with_a_checkpoint_is_listed_at_once(tmp_path):
    def change(config, tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(5, np.float32)
        tensors["model.layers.2.self_attn.o_proj.weight"] = np.zeros((7, 11), np.float32)
        tensors["model.layers.3.input_layernorm.weight"] = np.zeros(63, np.float32)
        return config, tensors

    with pytest.raises(ConfigError) as error:
        load_hf(copy_case("gemma3", tmp_path, change))
    for part in (
        "5 tensors",
        "missing layers.1.mlp.up_proj.weight",
        "missing norm.weight",
        "surplus layers.0.self_attn.q_proj.bias",
        "layers.2.self_attn.o_proj.weight is F32 (7, 11), expected floats (64, 96)",
        "layers.3.input_layernorm.weight is F32 (63,), expected floats (64,)",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_stored_in_bfloat16_are_read_exactly(tmp_path):
    def change(config, tensors):
        return config, {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}

    model, exact = load_hf(copy_case("gemma2", tmp_path, change)), load_hf(HERE / "cases" / "gemma2")
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), exact)
    jax.tree.map(np.testing.assert_array_equal, model, rounded)


def test_a_folder_without_a_config_and_an_unknown_family_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="config.json"):
        load_hf(tmp_path)
    with pytest.raises(ConfigError, match="'llama'"):
        hf_config.model_config({"model_type": "llama"})


@pytest.mark.parametrize(
    "name, prefix", [("gemma4-dense", "model.language_model."), ("gemma3", "language_model.model.")]
)
def test_multimodal_checkpoints_load(name, prefix, tmp_path):
    def change(config, tensors):
        nested = {"model_type": name[:6], "text_config": config, "vision_config": {}}
        return nested, {prefix + key.removeprefix("model."): value for key, value in tensors.items()}

    plain, nested = load_hf(HERE / "cases" / name), load_hf(copy_case(name, tmp_path, change))
    assert jax.tree.structure(nested) == jax.tree.structure(plain)
    jax.tree.map(np.testing.assert_array_equal, nested, plain)


@pytest.mark.parametrize("name", REAL)
def test_released_sizes_have_exactly_the_published_number_of_parameters(name):
    real = REAL[name]
    shapes = jax.eval_shape(lambda: LM.init(hf_config.model_config(real["config"]), "bfloat16", key=jax.random.key(0)))
    sizes = [(w.buffer, w.value.size) for w in weights(shapes)]
    assert sum(size for buffer, size in sizes if not buffer) == real["total"]
    assert sum(size for buffer, size in sizes if buffer) == real["buffers"]


@pytest.mark.parametrize("name", [name for name in REAL if name.startswith("gemma") and name != "gemma-4-e2b"])
def test_the_pattern_of_layers_is_derived_where_a_config_leaves_it_out(name):
    config = REAL[name]["config"]
    assert hf_config.model_config({k: v for k, v in config.items() if k != "layer_types"}) == hf_config.model_config(
        config
    )


def test_what_a_hub_config_leaves_out_is_what_transformers_assumes():
    text = dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)
    text |= dict(sliding_window=1024, rope_scaling={"factor": 8.0, "rope_type": "linear"})
    released = json.loads((HERE / "real_configs.json").read_text())["gemma-3-4b"]["config"]
    assert hf_config.model_config({"model_type": "gemma3", "text_config": text}) == hf_config.model_config(released)
    with pytest.raises(ConfigError, match="no hidden_size"):
        hf_config.model_config({name: value for name, value in text.items() if name != "hidden_size"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_activation", "silu"),
        ("attention_bias", True),
        ("tie_word_embeddings", False),
        ("use_bidirectional_attention", "all"),
        ("enable_moe_block", True),
        ("num_hidden_layers", 5),
    ],
)
def test_a_config_that_would_load_and_compute_something_else_is_refused(field, value):
    saved = json.loads((HERE / "cases" / "gemma4-dense" / "config.json").read_text())
    with pytest.raises(ConfigError, match=field):
        hf_config.model_config({**saved, field: value})


def test_other_towers_of_a_multimodal_checkpoint_are_left_out(tmp_path):
    def change(config, tensors):
        renamed = {name.replace("model.", "language_model.model.", 1): value for name, value in tensors.items()}
        return config, {**renamed, "vision_tower.x.weight": np.zeros((2, 3), np.float32)}

    model = load_hf(copy_case("gemma3", tmp_path, change))
    jax.tree.map(np.testing.assert_array_equal, model, load_hf(HERE / "cases" / "gemma3"))
