"""Checkpoints out of mintrain: transformers computes the same from them, and every tensor comes back bit for bit."""

import json
import os
import pickle
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from mintrain import hf, hf_config, hf_files, load_hf, save_hf
from mintrain.arrays import weights
from mintrain.config import ConfigError, Mesh

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).parent
CASES = sorted(folder.name for folder in (HERE / "cases").iterdir())
REAL = json.loads((HERE / "real_configs.json").read_text())


@pytest.mark.parametrize("name", REAL)
def test_a_released_config_comes_back_from_its_model(name):
    model = hf_config.model_config(REAL[name]["config"])
    assert hf_config.model_config(hf_config.from_model(model)) == model


def test_a_model_without_a_form_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no Hugging Face form"):
        hf_config.from_model(tiny.MODEL)  # a soft cap beside query norms


@pytest.mark.parametrize("shard", [1 << 30, 200_000])
@pytest.mark.parametrize("name", CASES)
def test_import_then_export_gives_back_every_tensor_bit_for_bit(name, shard, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD", shard)
    spread = (
        Mesh(fsdp=4) if name.startswith("gemma4") else Mesh(fsdp=2, tensor=2)
    )  # Gemma 4 has layers with one key head
    mesh = Mesh() if shard > 200_000 else spread
    save_hf(load_hf(HERE / "cases" / name, mesh=mesh), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == 200_000)
    written = {key: value for file in files for key, value in load_file(file).items()}
    original = load_file(HERE / "cases" / name / "model.safetensors")
    assert written.keys() == original.keys()
    for key, value in original.items():
        assert written[key].dtype == value.dtype
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == original.keys()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in original.values())


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_the_same_logits_from_an_export_as_from_the_original(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    save_hf(load_hf(HERE / "cases" / name), tmp_path / "out")
    reference = load_file(HERE / "cases" / name / "reference.safetensors")

    def peer(folder):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
        )
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            return model(torch.tensor(reference["input_ids"], dtype=torch.long)).logits.numpy()

    ours = peer(tmp_path / "out")
    np.testing.assert_array_equal(ours, peer(HERE / "cases" / name))
    # Recorded on another CPU: the peer's float32 is up to 5.5e-5 from its float64, and its kernels are the CPU's.
    np.testing.assert_allclose(ours, reference["logits"], rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------- what checkpoints may hold


def copy_of(name: str, to: Path, change) -> Path:
    """A checkpoint folder after `change(config, tensors)`."""
    config = json.loads((HERE / "cases" / name / "config.json").read_text())
    tensors = load_file(HERE / "cases" / name / "model.safetensors")
    change(config, tensors)
    (to / "config.json").write_text(json.dumps(config))
    save_file(tensors, to / "model.safetensors")
    return to


def leaves(model) -> dict[str, np.ndarray]:
    return {w.path: np.asarray(w.value) for w in weights(model)}


def test_float8_blocks_are_multiplied_by_their_factors_exactly(tmp_path):
    """A projection of 150 x 200: four blocks, of which three are not whole."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(150, 200)).astype(jnp.float8_e4m3fn)
    factors = rng.uniform(0.5, 2.0, (2, 2)).astype(np.float32)
    header = {
        "w": {"dtype": "F8_E4M3", "shape": [150, 200], "data_offsets": [0, values.nbytes]},
        "w_scale_inv": {"dtype": "F32", "shape": [2, 2], "data_offsets": [values.nbytes, values.nbytes + 16]},
    }
    raw = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + values.tobytes() + factors.tobytes())
    (name, tensor), *others = hf_files.tensors(tmp_path).items()
    assert (name, others) == ("w", [])
    ours = tensor.read()
    assert ours.dtype == np.float32
    for i, j in np.ndindex(150, 200):
        assert ours[i, j] == np.float32(values[i, j]) * factors[i // 128, j // 128]

    header["w_scale_inv"]["shape"] = [4, 1]
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + values.tobytes() + factors.tobytes())
    with pytest.raises(ConfigError, match=r"w is float8 and has F32 \(4, 1\) as w_scale_inv; it needs F32 \(2, 2\)"):
        hf_files.tensors(tmp_path)


def test_what_is_shared_or_computed_may_stand_in_the_files_too(tmp_path):
    """Keys of layers that share them (E2B), a tied head, tables of rope."""

    def change(_, tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.5.self_attn.k_proj.weight"] = np.zeros((20, 64), np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(10, np.float32)

    plain, more = load_hf(HERE / "cases" / "gemma4-e2b"), load_hf(copy_of("gemma4-e2b", tmp_path, change))
    assert leaves(plain).keys() == leaves(more).keys()
    for path, value in leaves(plain).items():
        np.testing.assert_array_equal(value, leaves(more)[path])


def test_the_layer_of_multi_token_prediction_is_read_and_written(tmp_path):
    """As in the files of V3: one layer more than `num_hidden_layers`, with copies of token vectors and head."""
    rng = np.random.default_rng(0)
    join = rng.normal(size=(64, 128)).astype(np.float32)

    def change(config, tensors):
        config["num_nextn_predict_layers"] = 1
        last = [name for name in tensors if name.startswith("model.layers.3.")]
        tensors.update({name.replace(".3.", ".4.", 1): rng.permutation(tensors[name]) for name in last})
        tensors.update(
            {f"model.layers.4.{n}.weight": np.ones(64, np.float32) for n in ("enorm", "hnorm", "shared_head.norm")}
        )
        tensors["model.layers.4.eh_proj.weight"] = join
        tensors["model.layers.4.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.4.shared_head.head.weight"] = tensors["lm_head.weight"]

    (tmp_path / "in").mkdir()
    model = load_hf(copy_of("deepseek-v3", tmp_path / "in", change))
    assert len(model.mtp) == 1
    np.testing.assert_array_equal(model.mtp[0].join[0], join[:, :64].T)  # the token's half comes first
    save_hf(model, tmp_path / "out")
    original, written = (load_file(tmp_path / f / "model.safetensors") for f in ("in", "out"))
    for name in original.keys() - {"model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"}:
        np.testing.assert_array_equal(written[name], original[name], err_msg=name)


def test_an_export_in_bfloat16_keeps_the_selection_bias_in_float32(tmp_path):
    save_hf(load_hf(HERE / "cases" / "deepseek-v3"), tmp_path / "out", "bfloat16")
    for name, tensor in hf_files.tensors(tmp_path / "out").items():
        assert tensor.dtype == ("F32" if name.endswith("e_score_correction_bias") else "BF16"), name


def test_an_export_touches_no_folder_that_holds_something(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="holds something already"):
        save_hf(load_hf(HERE / "cases" / "gemma2"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


# -------------------------------------------------------------------------------------------- hostile files

GOOD = (HERE / "cases" / "gemma2" / "model.safetensors").read_bytes()
LENGTH = int.from_bytes(GOOD[:8], "little")


class Executed:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def with_header(change) -> bytes:
    header = json.loads(GOOD[8 : 8 + LENGTH])
    change(header)
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + GOOD[8 + LENGTH :]


def overlap(header):
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


HOSTILE = {
    "cut off": GOOD[: len(GOOD) // 2],
    "cut off in its header": GOOD[:100],
    "empty": b"",
    "a header of eight exabytes": (1 << 63).to_bytes(8, "little") + GOOD[8:],
    "a header longer than the file": (len(GOOD) * 2).to_bytes(8, "little") + GOOD[8:],
    "overlapping tensors": with_header(overlap),
    "offsets beyond the file": with_header(
        lambda h: h["model.norm.weight"].update(data_offsets=[1 << 40, (1 << 40) + 256])
    ),
    "a shape that is not the offsets'": with_header(lambda h: h["model.norm.weight"].update(shape=[1 << 40])),
    "a dtype that is none": with_header(lambda h: h["model.norm.weight"].update(dtype="EVIL")),
    "integers instead of floats": with_header(lambda h: h["model.norm.weight"].update(dtype="I32")),
    "a pickle": pickle.dumps(Executed()),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_without_memory_and_without_running_it(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text((HERE / "cases" / "gemma2" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[kind])
    tracemalloc.start()
    with pytest.raises(ConfigError) as error:
        load_hf(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert peak < 64 << 20
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 7, "gone.safetensors"]
)
def test_an_index_may_only_name_files_of_its_own_folder(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    (folder / "config.json").write_text((HERE / "cases" / "gemma2" / "config.json").read_text())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ConfigError, match=r"index\.json names"):
        load_hf(folder)
