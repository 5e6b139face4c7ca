"""The config files are the released models, and `--check` proves their whole step at full size."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest

from mintrain import check, config, costs, hf_config, options
from mintrain.arrays import weights
from mintrain.model import LM

HERE = Path(__file__).parent
RELEASED = json.loads((HERE / "real_configs.json").read_text())
HUB = json.loads((HERE / "hub_configs.json").read_text())  # config files of the hub, whole, and the parameters
FILES = sorted((HERE.parent / "configs").glob("*.py"))


def without_initialisation(model: config.Model) -> config.Model:
    """Also without the balance loss and the layers of multi-token prediction, which no `config.json` describes."""

    def plain(layer: config.Layer) -> config.Layer:
        attention, moe = layer.attention, layer.moe and dataclasses.replace(layer.moe, balance=0.0)
        if isinstance(attention, config.Attention):
            attention = dataclasses.replace(attention, q_norm_init=1.0)
        return dataclasses.replace(layer, attention=attention, moe=moe)

    stages = (dataclasses.replace(s, pattern=tuple(map(plain, s.pattern))) for s in model.stages)
    return dataclasses.replace(model, stages=tuple(stages), mtp=())


NAMES = {
    **{"gemma-4-26b-a4b": "gemma4_26b", "DeepSeek-V2-Lite": "deepseek2_16b", "DeepSeek-V2": "deepseek2_236b"},
    **{"DeepSeek-V3": "deepseek3_671b", "DeepSeek-V3.2": "deepseek32_671b"},
}


def config_of(name: str) -> config.Config:
    """The config file of a released model."""
    file = NAMES.get(name, name.replace("-", "", 1).replace("-", "_"))
    return options.read(HERE.parent / "configs" / f"{file}.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_file_can_be_read_and_written_as_json(file):
    cfg = options.read(file)
    assert options.from_json(json.loads(options.to_json(cfg))) == cfg


@pytest.mark.parametrize("name", RELEASED)
def test_a_config_file_is_the_released_model(name):
    assert without_initialisation(config_of(name).model) == hf_config.model_config(RELEASED[name]["config"])


MESHES = {
    "gemma-4-31b": "fsdp=32",
    "gemma-3-27b": "fsdp=32",
    "gemma-2-27b": "fsdp=32",
    "gemma-4-26b-a4b": "fsdp=8 expert=4",
}
MESHES |= {
    "DeepSeek-V3": "fsdp=16 expert=8",
    "DeepSeek-V3.2": "fsdp=16 expert=8",
    "DeepSeek-V2": "fsdp=4 expert=8 tensor=2",
}
LARGE = [
    pytest.param(name, marks=pytest.mark.slow if "Deep" in name else ())
    for name in RELEASED
    if "gemma-2-" not in name or "27b" in name
]


@pytest.mark.parametrize("name", LARGE)
def test_the_whole_step_of_a_released_model_traces_and_has_exactly_the_published_parameters(name):
    mesh = [f"--mesh.{axis}" for axis in MESHES.get(name, "fsdp=8").split()]
    report, real = check.report(options.parse(config.Config, mesh, config_of(name))), RELEASED[name]
    lines = {"total": real["total"], "active per token": real["active"]}
    lines |= {"of the total, indexers": real["indexer"]} if real["indexer"] else {}
    for line, count in lines.items():
        assert re.search(rf"^{line} +{count:,}$", report, re.MULTILINE), line
    assert "every declared shape and dtype holds" in report


@pytest.mark.parametrize("name", HUB)
def test_a_config_of_the_hub_alone_in_its_folder_is_read_and_has_exactly_the_published_parameters(name, tmp_path):
    """Before the weights are there; training needs them."""
    (tmp_path / "config.json").write_text(json.dumps(HUB[name]["config"]))
    cfg, action, _ = options.load([str(tmp_path), "--check"])
    shapes = jax.eval_shape(lambda: LM.init(dataclasses.replace(cfg.model, mtp=()), "bfloat16", key=jax.random.key(0)))
    assert sum(w.value.size for w in weights(shapes) if not w.buffer) == HUB[name]["total"]
    assert action == "check" and bool(cfg.model.mtp) == ("DeepSeek-V3" in name or "R1" in name)
    with pytest.raises(config.ConfigError, match=r"has no model"):
        options.load([str(tmp_path)])


def test_flops_are_counted_through_scans_and_devices():
    """Six for each parameter that multiplies and each token, and attention: twice q·k and its use, three times."""
    mesh = ["--mesh.fsdp", "4", "--mesh.tensor", "2", "--per_device_batch_size", "1"]
    cfg = options.parse(config.Config, mesh, options.read(HERE / "tiny_run.py"))
    model, tokens, seq = cfg.model, cfg.batch_size * cfg.data.seq_len, cfg.data.seq_len
    attention = model.layers[0].attention
    per_layer = model.embed * attention.head_dim * (2 * attention.heads + 2 * attention.kv_heads) + 3 * model.embed * 56
    products = 2 * (per_layer + model.vocab * model.embed) + 4 * seq * attention.heads * attention.head_dim
    assert costs.forward_flops(cfg) == tokens * products
