"""The config files are the released models, and `--check` proves their whole step at full size."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from mintrain import check, config, hf, options

HERE = Path(__file__).parent
RELEASED = json.loads((HERE / "real_configs.json").read_text())
FILES = sorted((HERE.parent / "configs").glob("*.py"))


def without_initialisation(model: config.Model) -> config.Model:
    plain = lambda layer: dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, q_norm_init=1.0))
    stages = (dataclasses.replace(s, pattern=tuple(map(plain, s.pattern))) for s in model.stages)
    return dataclasses.replace(model, stages=tuple(stages))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_file_can_be_read_and_written_as_json(file):
    cfg = options.read(file)
    assert options.from_json(json.loads(options.to_json(cfg))) == cfg


@pytest.mark.parametrize("name", RELEASED)
def test_a_config_file_is_the_released_model(name):
    file = HERE.parent / "configs" / f"{name.replace('-', '', 1).replace('-', '_')}.py"
    assert without_initialisation(options.read(file).model) == hf.model_config(RELEASED[name]["config"])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gemma4_31b", 30_697_345_280), ("gemma3_27b", 27_009_346_304), ("gemma2_27b", 27_227_128_320)],
)
def test_the_whole_step_of_the_largest_models_traces_on_32_devices(name, parameters):
    cfg = options.override(options.read(HERE.parent / "configs" / f"{name}.py"), ["--mesh.fsdp", "32"])
    report = check.report(cfg)
    assert re.search(rf"^total +{parameters:,}$", report, re.MULTILINE)
    assert "every declared shape and dtype holds" in report


def test_flops_are_counted_through_scans_and_devices():
    """Six for each parameter that multiplies and each token, and attention: twice q·k and its use, three times."""
    cfg = options.override(
        options.read(HERE / "tiny_run.py"), ["--mesh.fsdp", "4", "--mesh.tensor", "2", "--per_device_batch_size", "1"]
    )
    model, tokens, seq = cfg.model, cfg.batch_size * cfg.data.seq_len, cfg.data.seq_len
    attention = model.layers[0].attention
    per_layer = model.embed * attention.head_dim * (2 * attention.heads + 2 * attention.kv_heads) + 3 * model.embed * 56
    products = 2 * (per_layer + model.vocab * model.embed) + 4 * seq * attention.heads * attention.head_dim
    assert check.forward_flops(cfg) == tokens * products
