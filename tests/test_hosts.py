"""Many hosts: as many processes of this machine, joined by gloo. They train the run of one process, bit for bit.

That one process has gloo too. Without it XLA adds up what four devices hold in another order, and the last bit differs.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from mintrain import options, sharding, step
from mintrain.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "tests" / "tiny_hosts.py")


def start(count: int, folders: list[Path], *args: str) -> list[subprocess.Popen]:
    """`count` processes of the same command, with four devices in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={4 // count}")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    command = [sys.executable, str(ROOT / "train.py"), CONFIG, "--distributed", *args]
    return [
        subprocess.Popen(
            command,
            cwd=folders[index % len(folders)],
            env={**env, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes: list[subprocess.Popen]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, what was printed, and what was said on stderr."""
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = lambda text: "\n".join(line for line in text.splitlines() if line.strip() and "[Gloo]" not in line)
    return [process.returncode for process in processes], [lines(out) for out, _ in said], [err for _, err in said]


def records(folder: Path) -> list[dict]:
    """All that was measured, but for the time it took."""
    lines = (folder / "runs" / "tiny_hosts" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("tokens_per_s", "step_s")} for line in lines]


def arrays(folder: Path) -> tuple[int, list[np.ndarray]]:
    """The latest checkpoint."""
    cfg, *_ = options.load([CONFIG])
    checkpoints = Checkpoints(folder / "runs" / "tiny_hosts" / "checkpoints", 2)
    state = checkpoints.restore(step.abstract_state(cfg, sharding.make_mesh(cfg.mesh)))
    return checkpoints.latest, [np.asarray(x) for x in jax.tree.leaves(state)]


def assert_same_run(folder: Path, other: Path) -> None:
    assert records(folder) == records(other)
    assert (folder / "runs/tiny_hosts/samples.txt").read_text() == (other / "runs/tiny_hosts/samples.txt").read_text()
    (at, ours), (there, theirs) = arrays(folder), arrays(other)
    assert at == there == 40
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    codes, _, errors = finish(start(1, [folder]))
    assert codes == [0], errors
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_many_processes_train_the_run_of_one(count, whole, tmp_path):
    codes, printed, errors = finish(start(count, [tmp_path]))
    assert codes == [0] * count, errors
    assert_same_run(tmp_path, whole)
    assert "step 40/40" in printed[0] and not any(printed[1:])
    tokens = os.listdir(tmp_path / "runs" / ".tokens")
    assert len(tokens) == 4 and not any(name.endswith(".tmp") for name in tokens)


@pytest.mark.slow
def test_one_that_is_told_to_stop_stops_all_at_one_step_and_one_process_goes_on(whole, tmp_path):
    processes = start(2, [tmp_path])
    for line in processes[0].stdout:
        if line.startswith("step 13/"):
            processes[1].send_signal(signal.SIGTERM)
            break
    codes, printed, errors = finish(processes)
    assert codes == [75, 75], errors
    saved = int(printed[0].split("told to stop: step ")[1].split()[0])
    assert 13 <= saved < 40
    folders = os.listdir(tmp_path / "runs" / "tiny_hosts" / "checkpoints")
    assert sorted(map(int, folders)) == sorted({saved, saved // 10 * 10 if saved % 10 else saved - 10})
    codes, printed, errors = finish(start(1, [tmp_path]))
    assert codes == [0], errors
    assert f"step {saved} of 40" in printed[0]
    assert_same_run(tmp_path, whole)


def test_an_error_on_one_host_ends_all_and_is_said_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    codes, _, errors = finish(start(2, [tmp_path, tmp_path / "elsewhere"]))
    assert codes == [2, 2]
    said = [[line for line in error.splitlines() if line.startswith("error: ")] for error in errors]
    assert said == [[], ["error: run=tiny_hosts: host 1 does not see runs/tiny_hosts; all must share its folder"]]


@pytest.mark.parametrize("wrong", ["coordinator_address should be defined.", ""])
def test_hosts_that_cannot_be_found_are_an_error_with_a_remedy(wrong, monkeypatch, capsys):
    def initialize(**_):
        raise ValueError(wrong)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert train.main([CONFIG, "--distributed"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --distributed cannot find the other hosts: {wrong}") and said.count("\n") == 1
    assert "set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID" in said


def test_a_mesh_that_leaves_a_host_without_work_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(train.ConfigError, match="mesh fsdp 2 has 2 devices .* 2 hosts .* use all 8 devices"):
        sharding.make_mesh(options.load([CONFIG, "--mesh.expert", "1"])[0].mesh)
