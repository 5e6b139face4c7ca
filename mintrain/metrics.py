"""What a run writes for people and programs: progress lines, metrics.jsonl, samples.txt, loss.png."""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import jax

from mintrain import options, watch
from mintrain.config import Config, ConfigError
from mintrain.step import Metrics

NATS_TO_BITS = 1 / math.log(2)


def open_run(cfg: Config) -> Path:
    """The folder runs/NAME. Raises ConfigError if the run there has another model; says what else changed."""
    if not re.fullmatch(r"\w[\w.-]*", cfg.run):
        raise ConfigError(f"run={cfg.run!r} is not a folder name; use letters, digits, dots and dashes")
    folder = Path("runs") / cfg.run
    saved = folder / "config.json"
    if saved.is_file():
        try:
            data = json.loads(saved.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{saved} is not JSON: {error}; mend it, or use another --run") from error
        changed = options.differences(data, cfg)
        if model := [change for change in changed if change.startswith(("model.", "lora.", "indexer "))]:
            raise ConfigError(
                f"{folder} trains something else: {'; '.join(model[:3])}; use the old config, or another --run, "
                f"which --init_from {folder} starts from this one's weights"
            )
        if changed:
            print(f"changed since the last start: {'; '.join(changed)}")
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
        raise ConfigError(f"run={cfg.run}: host {jax.process_index()} does not see {folder}; all must share its folder")
    return folder


class Log:
    """`metrics.jsonl`, one object a line, beginning again after `step`; the rest is made from it.

    Of many hosts all keep the records, as what is due depends on them, and the first one writes the files.
    """

    def __init__(self, folder: Path, step: int, cfg: Config, bytes_per_token: float | None):
        self.path, self.folder, self.cfg, self.bytes_per_token = folder / "metrics.jsonl", folder, cfg, bytes_per_token
        self.records = [record for record in _read(self.path) if record["step"] <= step]
        self.first = jax.process_index() == 0
        if self.first:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
            temporary.rename(self.path)
        self.restart(step)

    def restart(self, at: int) -> None:
        """Time the steps after `at` from now on."""
        self.clock, self.timed = time.perf_counter(), at

    def step(self, at: int, metrics: Metrics, nonfinite: int) -> int:
        """Wait for a step's metrics, write them if it is their turn; returns the count of steps in a row not finite."""
        finite = bool(metrics.finite)
        if metrics.seen is not None:
            self.watched(at, watch.by_layer(self.cfg.model, metrics.seen))
        if not finite:
            print(f"step {at}: loss {float(metrics.loss)}, grad {float(metrics.grad_norm)}: update not applied")
        if at % self.cfg.log_every == 0 or at == self.cfg.steps or not finite:
            step_s = (time.perf_counter() - self.clock) / max(at - self.timed, 1)
            self.restart(at)
            loss = float(metrics.loss)
            record = {
                "step": at,
                "loss": _json(loss),
                "bits_per_byte": self.bits_per_byte(loss, self.bytes_per_token),
                "grad_norm": _json(float(metrics.grad_norm)),
                "lr": float(metrics.lr),
                "skipped": int(metrics.skipped),
                "tokens_per_s": round(self.cfg.batch_size * self.cfg.data.seq_len / step_s, 1),
                "step_s": round(step_s, 4),
            }
            parts = {name: getattr(metrics, name) for name in ("mtp_loss", "balance", "expert_load", "indexer_kl")}
            record |= {name: _json(float(value)) for name, value in parts.items() if value is not None}
            self._write(record)
            if finite:
                print(_progress(record, self.cfg.steps), flush=True)
        return 0 if finite else nonfinite + 1

    def watched(self, at: int, numbers: dict[str, list[float | None]]) -> None:
        """Write what was seen of the layers, and say once of each number that it has grown past its bound."""
        told = {name for record in self.records for name in record.get("past_bounds", ())}
        past = {name: line for name, line in watch.past_bounds(numbers) if name not in told}
        for line in past.values():
            print(f"step {at}: {line}", flush=True)
        layers = {name: [None if x is None else _json(x) for x in values] for name, values in numbers.items()}
        self._write({"step": at, "layers": layers, "past_bounds": list(past)})

    def evaluation(self, at: int, loss: float, bytes_per_token: float | None) -> None:
        bits = self.bits_per_byte(loss, bytes_per_token)
        self._write({"step": at, "val_loss": _json(loss), "val_bits_per_byte": bits})
        shown = "" if bits is None else f"  bits/byte {bits:.3f}"
        print(f"step {at}/{self.cfg.steps}  held out: loss {loss:.4f}{shown}", flush=True)
        self.plot()

    def evaluated(self, at: int) -> bool:
        return any(record["step"] == at and "val_loss" in record for record in self.records)

    def sample(self, at: int, text: str) -> None:
        heading = f"=== step {at} ==="
        path = self.folder / "samples.txt"
        old = path.read_text() if path.is_file() else ""
        if self.first and heading not in old:
            path.write_text(f"{old}{heading}\n{text.strip()}\n\n")
        print("\n".join("    | " + line for line in text.strip().splitlines()))

    @staticmethod
    def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
        return None if bytes_per_token is None else _json(loss * NATS_TO_BITS / bytes_per_token)

    def _write(self, record: dict) -> None:
        self.records.append(record)
        if self.first:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def plot(self) -> None:
        """Draw loss.png: the losses over the steps, in bits per byte where they are known."""
        if not self.first:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        unit = "loss" if self.bytes_per_token is None else "bits_per_byte"
        for key, label, style in ((unit, "training", "-"), (f"val_{unit}", "held out", "o-")):
            points = [(r["step"], r[key]) for r in self.records if r.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=f"{label}, last {points[-1][1]:.3f}", linewidth=1.2)
        axes.set(xlabel="step", ylabel=unit.replace("_", " "))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        self._save(figure, "loss.png")
        if any("layers" in record for record in self.records):
            self._save(watch.picture(self.records), "layers.png")

    def _save(self, figure: Any, name: str) -> None:
        import matplotlib.pyplot as plt

        temporary = self.folder / f"new-{name}"
        figure.savefig(temporary, dpi=120)
        plt.close(figure)
        temporary.rename(self.folder / name)


def _read(path: Path) -> list[dict]:
    """The whole records of a file that a crash may have cut off."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _json(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def _progress(record: dict, steps: int) -> str:
    """One line for a terminal and for grep: name and value, always in the same order."""
    minutes, seconds = divmod(round(record["step_s"] * (steps - record["step"])), 60)
    left = f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"
    bits = "" if record["bits_per_byte"] is None else f"  bits/byte {record['bits_per_byte']:.3f}"
    kl = f"  indexer {record['indexer_kl']:.3f}" if "indexer_kl" in record else ""
    return (
        f"step {record['step']}/{steps}  loss {record['loss']:.4f}{bits}{kl}  lr {record['lr']:.2e}  "
        f"grad {record['grad_norm']:.3g}  {record['tokens_per_s']:.0f} tok/s  {left} left"
    )
