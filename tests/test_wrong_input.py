"""What a user can get wrong: exit code 2, one line that names the field, the value and the remedy, nothing lost."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import train

CONFIG = str(Path(__file__).parent / "tiny_run.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two steps, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([CONFIG, "--steps", "2", "--sample_tokens", "0", "--eval_batches", "1"]) == 0
    return folder / "runs"


def written(name: str, content: str | bytes) -> str:
    (Path(name).write_bytes if isinstance(content, bytes) else Path(name).write_text)(content)
    return name


def edited_config(old: str, new: str) -> str:
    text = Path(CONFIG).read_text()
    assert old in text
    return written("edited.py", text.replace(old, new))


WRONG = {
    "a misspelled option": (lambda: ["--stesp", "3"], "--stesp"),
    "a value of the wrong type": (lambda: ["--steps", "many"], "--steps.*many"),
    "an unknown choice": (lambda: ["--optim.name", "sgd"], "sgd.*adamw"),
    "an option without a value": (lambda: ["--steps"], "--steps"),
    "no steps": (lambda: ["--steps", "0"], "steps=0.*1 or more"),
    "an axis of no devices": (lambda: ["--mesh.fsdp", "0"], "mesh.fsdp=0.*1 or more"),
    "more devices than there are": (lambda: ["--mesh.fsdp", "16"], "fsdp 16 needs 16 devices.*has 8"),
    "a batch that the devices do not divide": (
        lambda: ["--mesh.fsdp", "8", "--per_device_batch_size", "0.5"],
        "per_device_batch_size=0.5.*multiple of 1",
    ),
    "no share of the memory": (lambda: ["--gather_ahead", "0"], "gather_ahead=0 .* use 90"),
    "a part of a sequence": (lambda: ["--per_device_batch_size", "0.3"], "per_device_batch_size=0.3.*multiple"),
    "accumulation that does not divide the batch": (lambda: ["--accumulate", "3"], "accumulate = 3"),
    "heads that the mesh does not divide": (
        lambda: ["--mesh.tensor", "8"],
        "mesh.tensor=8 does not divide kv_heads=2 of stages.*attention.*use one of 1, 2",
    ),
    "a sequence that the mesh does not divide": (
        lambda: ["--mesh.context", "8", "--data.seq_len", "36"],
        "data.seq_len=36.*mesh.context=8",
    ),
    "a run name that is a path": (lambda: ["--run", "../elsewhere"], "run='../elsewhere'"),
    "missing data": (lambda: ["--data.path", "nowhere.txt"], "data.path=nowhere.txt"),
    "data of an unknown kind": (lambda: ["--data.path", written("a.parquet", "x")], "a.parquet.*\\.jsonl"),
    "empty data": (lambda: ["--data.path", written("a.txt", "")], "a.txt holds no text"),
    "too little data": (
        lambda: ["--data.path", written("a.txt", "To be" * 9)],
        "a.txt has .* tokens, fewer than data.seq_len=32",
    ),
    "data that is not UTF-8": (
        lambda: ["--data.path", written("a.txt", b"\xff\xfe\xfa" * 99)],
        "a.txt cannot be read as UTF-8",
    ),
    "a line that is not JSON": (
        lambda: ["--data.path", written("a.jsonl", '{"text": "x"}\n{oops\n')],
        "a.jsonl line 2 is not JSON",
    ),
    "a line without text": (
        lambda: ["--data.path", written("a.jsonl", '{"txt": "x"}\n')],
        'a.jsonl line 1 has no "text"',
    ),
    "half a character": (
        lambda: ["--data.path", written("a.jsonl", '{"text": "x"}\n{"text": "cut \\ud83d"}\n')],
        r"a.jsonl line 2 holds half of a character, '\\ud83d'",
    ),
    "half a character in a chat": (
        lambda: ["--data.path", written("a.jsonl", '{"messages": [{"role": "user", "content": "\\udc00 b"}]}\n')],
        r"a.jsonl line 1 holds half of a character",
    ),
    "a list as deep as a well": (
        lambda: ["--data.path", written("a.jsonl", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")],
        "a.jsonl line 1 is not JSON",
    ),
    "a number of thousands of digits": (
        lambda: ["--data.path", written("a.jsonl", '{"text": "x", "n": ' + "9" * 5000 + "}\n")],
        "a.jsonl line 1 is not JSON",
    ),
    "an option that is not UTF-8": (lambda: ["--sample_prompt", "caf\udce9"], "is not UTF-8 text"),
    "half a token": (lambda: ["--data.path", written("a.bin", b"123")], "a.bin has 3 bytes"),
    "a token beyond the vocabulary": (
        lambda: ["--data.path", written("a.bin", np.full(999, 300, np.uint16).tobytes())],
        "a.bin has token id 300, but the vocabulary has 257",
    ),
    "a missing tokenizer": (lambda: ["--data.tokenizer", "none.json"], "data.tokenizer=none.json"),
    "a file that is no tokenizer": (
        lambda: ["--data.tokenizer", written("t.json", "{}")],
        "data.tokenizer=t.json is not",
    ),
    "a tokenizer larger than the model's vocabulary": (
        lambda: ["--data.tokenizer", "shakespeare"],
        "data.tokenizer=shakespeare has 4096 tokens, model.vocab=264",
    ),
    "an unknown field in the config file": (lambda: [edited_config("steps=6", "stesp=6")], "edited.py: .*stesp"),
    "a field of the wrong type in the config file": (
        lambda: [edited_config("steps=6", "steps='6'")],
        "edited.py: steps='6'",
    ),
    "heads that are no multiple of the key heads": (
        lambda: [edited_config("heads=4, kv_heads=2", "heads=4, kv_heads=3")],
        "heads=4 .*kv_heads=3",
    ),
    "a config file that defines nothing": (lambda: [written("nothing.py", "x = 1\n")], "nothing.py does not define"),
    "a config.json that is cut off": (lambda: [written("cut.json", '{"model": ')], "cut.json is not JSON"),
    "a config.json of something else": (lambda: [written("else.json", "[1]")], "else.json: data="),
    "a config file that is not there": (lambda: ["configs/nowhere.py"], "configs/nowhere.py is not a config"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = WRONG[case]
    arguments = arguments()
    config = [] if arguments[0].endswith((".py", ".json")) else [CONFIG]
    assert train.main([*config, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert re.search(message, said), said
    assert not list(Path("runs").glob("*/checkpoints/*"))


def foreign_folder(run: Path) -> list[str]:
    (run / "checkpoints" / "holiday").mkdir()
    return []


def empty_step(run: Path) -> list[str]:
    (run / "checkpoints" / "11").mkdir()
    return []


def broken_checkpoint(run: Path) -> list[str]:
    shutil.rmtree(run / "checkpoints" / "2" / "default" / "d")
    return ["--steps", "4"]


def flipped_byte(run: Path) -> list[str]:
    file = max((run / "checkpoints" / "2" / "default").rglob("*"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return ["--steps", "4"]


def other_model(run: Path) -> list[str]:
    saved = json.loads((run / "config.json").read_text())
    saved["model"]["embed"] = 48
    (run / "config.json").write_text(json.dumps(saved))
    return []


def broken_config(run: Path) -> list[str]:
    (run / "config.json").write_text("{")
    return []


SPOILT = {
    foreign_folder: "checkpoints/holiday is not a checkpoint",
    empty_step: "checkpoints/11 is not a checkpoint",
    broken_checkpoint: "is missing; remove it to go on from the one before",
    flipped_byte: "has changed since it was written; remove it",
    other_model: "trains something else: model.embed 48 -> 40",
    broken_config: "config.json is not JSON",
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_run_is_refused_and_left_as_it_is(spoil, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "runs")
    run = Path("runs/tiny_run").resolve()
    arguments = spoil(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train.main([CONFIG, "--steps", "2", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert SPOILT[spoil] in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
