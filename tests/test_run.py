"""A run from the command line on: its folder, its exit codes, stopping, crashing and going on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from mintrain import metrics, options

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "tests" / "tiny_run.py")


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory, tmp_path, monkeypatch):
    """Each run in its own folder, with the tokens encoded once for all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mintrain.data.CACHE", tmp_path_factory.getbasetemp() / "tokens")
    monkeypatch.setattr(train, "stop_requested", False)


def records(run: str = "tiny_run") -> list[dict]:
    return [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]


def losses(run: str = "tiny_run") -> list[tuple]:
    return [
        tuple(r.get(k) for k in ("step", "loss", "bits_per_byte", "grad_norm", "lr", "val_loss")) for r in records(run)
    ]


def checkpoints(run: str = "tiny_run") -> list[str]:
    return sorted(os.listdir(Path("runs", run, "checkpoints")), key=int)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupting(function, when=lambda *args: True):
    def wrapper(*args, **kwargs):
        if when(*args):
            stop()
        return function(*args, **kwargs)

    return wrapper


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The losses of a run that nothing disturbs, and its folder."""
    here, folder = Path.cwd(), tmp_path_factory.mktemp("unbroken")
    os.chdir(folder)
    try:
        assert train.main([CONFIG]) == 0
        return losses(), folder / "runs" / "tiny_run"
    finally:
        os.chdir(here)


def test_a_run_leaves_its_whole_folder(unbroken):
    lines, folder = unbroken
    assert [line[0] for line in lines if line[1] is not None] == [1, 2, 3, 4, 5, 6]
    assert [line[0] for line in lines if line[5] is not None] == [3, 6]
    assert lines[-2][1] < lines[0][1]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "samples.txt").read_text().count("=== step") == 2
    assert sorted(os.listdir(folder / "checkpoints"), key=int) == ["4", "6"]
    assert options.read(folder / "config.json").steps == 6


def test_a_finished_run_is_left_as_it_is(unbroken, capsys):
    lines, folder = unbroken
    os.chdir(folder.parents[1])
    assert train.main([CONFIG]) == 0
    assert losses() == lines
    assert "step 6 of 6" in capsys.readouterr().out


PLACES = {
    "before the state": ("mintrain.step.new_state", lambda *args: True),
    "training": ("train.train_batch", lambda *args: args[2] == 3),
    "evaluation": ("train.heldout_batches", lambda *args: True),
    "sampling": ("mintrain.generate.generate", lambda *args: True),
}


@pytest.mark.parametrize("place", PLACES)
def test_told_to_stop_it_saves_exits_75_and_goes_on_as_if_nothing_had_happened(place, unbroken, monkeypatch):
    target, when = PLACES[place]
    module, _, name = target.rpartition(".")
    original = getattr(sys.modules[module], name)
    monkeypatch.setattr(target, interrupting(original, when))
    assert train.main([CONFIG]) == 75
    assert checkpoints()
    monkeypatch.setattr(target, original)
    monkeypatch.setattr(train, "stop_requested", False)
    assert train.main([CONFIG]) == 0
    assert losses() == unbroken[0]


def test_told_to_stop_while_it_compiles_it_says_so_at_once_and_saves(unbroken, monkeypatch, capfd):
    compile = jax.stages.Lowered.compile

    def interrupted(lowered):
        stop()
        deadline = time.monotonic() + 30
        while not train.stop_requested and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "told to stop: " in capfd.readouterr().err
        return compile(lowered)

    monkeypatch.setattr(jax.stages.Lowered, "compile", interrupted)
    assert train.main([CONFIG]) == 75
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second time kills


@pytest.mark.parametrize("number", train.STOPS, ids=lambda number: number.name)
@pytest.mark.parametrize("action", ["--check", "--help", ""])
def test_with_nothing_to_save_a_first_signal_ends_it_at_once(number, action, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / "gemma4_31b.py"), *action.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(0.7)  # it imports JAX
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == -number  # a shell says 128 + number
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_with_the_same_losses(unbroken):
    command = [sys.executable, str(ROOT / "train.py"), CONFIG, "--run", "killed"]
    random = np.random.default_rng(0)
    for _ in range(3):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        wanted = random.integers(1, 7)  # kill it a moment after this step's line
        for line in process.stdout:
            if line.startswith(f"step {wanted}/"):
                break
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.wait()
    with Path("runs/killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a line that the kill cut off
    assert train.main([CONFIG, "--run", "killed"]) == 0
    assert losses("killed") == unbroken[0]


def spoiled(batches: list[int]):
    original = train.train_batch

    def batch(text, shapes, at, seed):
        good = original(text, shapes, at, seed)
        return jax.tree.map(lambda x: x * jnp.inf if x.dtype == jnp.float32 and at in batches else x, good)

    return batch


def test_an_update_that_is_not_finite_is_skipped_and_the_run_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(train, "train_batch", spoiled([2]))
    assert train.main([CONFIG]) == 0
    assert [r["skipped"] for r in records() if "skipped" in r] == [0, 0, 1, 1, 1, 1]
    assert [r["loss"] is None for r in records() if "loss" in r] == [False, False, True, False, False, False]
    said = capsys.readouterr().out
    assert "step 3: loss nan" in said and "step 3: not finite before the step: batch.weights" in said
    assert Path("runs/tiny_run/nonfinite-3/report.json").is_file()


def test_too_many_in_a_row_stop_the_run_with_exit_code_1_and_a_checkpoint(monkeypatch):
    original = train.train_batch
    monkeypatch.setattr(train, "train_batch", spoiled([1, 2, 3, 4]))
    assert train.main([CONFIG, "--max_nonfinite", "2"]) == 1
    saved = int(checkpoints()[-1])
    assert saved <= 4
    monkeypatch.setattr(train, "train_batch", original)
    assert train.main([CONFIG]) == 0  # the parameters were good
    assert all(r["loss"] is not None for r in records() if "loss" in r and r["step"] > saved)


def test_the_loop_reads_metrics_one_step_late(monkeypatch):
    order = []
    original_batch, original_step = train.train_batch, metrics.Log.step
    monkeypatch.setattr(
        train, "train_batch", lambda *args: (order.append(("batch", args[2] + 1)), original_batch(*args))[1]
    )
    monkeypatch.setattr(
        metrics.Log, "step", lambda self, at, *rest: (order.append(("read", at)), original_step(self, at, *rest))[1]
    )
    assert train.main([CONFIG, "--steps", "4", "--eval_every", "4", "--checkpoint_every", "4"]) == 0
    assert order == [
        ("batch", 1),
        ("batch", 2),
        ("read", 1),
        ("batch", 3),
        ("read", 2),
        ("batch", 4),
        ("read", 3),
        ("read", 4),
    ]


def test_print_config_prints_what_a_run_would_use_and_can_be_run(capsys, tmp_path):
    assert train.main([CONFIG, "--optim.lr", "0.5", "--print-config"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "again.json").write_text(text)
    again, *_ = options.load([str(tmp_path / "again.json")])
    assert again.optim.lr == 0.5
    assert again == options.load([CONFIG, "--optim.lr", "0.5"])[0]


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        options.load([CONFIG, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for option in (
        "--run",
        "--steps",
        "--per_device_batch_size",
        "--scan_layers",
        "--compute_dtype",
        "--mesh.fsdp",
        "--data.seq_len",
        "--check",
    ):
        assert option in said
