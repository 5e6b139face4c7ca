"""What docs/scale.md says of every config: `python docs/measure_plan.py [NAME ...]`, an hour and a half on two cores.

Each row is a plan (mintrain/plan.py), made in its own process. Rows that runs/plans.json has are not made again, so it
goes on where it was stopped. Prints the tables.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from mintrain import options, plan
from mintrain.config import Config, Stage

BF16 = ["--optim.moments", "bfloat16"]
GEMMA = {name: ["--mesh.fsdp", "32"] for name in ("gemma4_31b", "gemma3_27b", "gemma2_27b")}
GEMMA["gemma4_26b"] = ["--mesh.expert", "32"]
LARGE = [  # config, layers or 0 for all, slice, options
    *[(name, 0, "v6e-32", [*mesh, "--data.seq_len", "2048"]) for name, mesh in GEMMA.items()],
    ("gemma4_31b", 0, "v6e-32", [*GEMMA["gemma4_31b"], "--data.seq_len", "2048", "--gather_ahead", "90"]),
    *[(name, 0, "v6e-32", [*mesh, "--data.seq_len", "4096"]) for name, mesh in GEMMA.items()],
    ("deepseek2_236b", 0, "v6e-128", ["--mesh.fsdp", "4", "--mesh.expert", "32", *BF16]),
    ("deepseek32_671b", 8, "v6e-32", ["--mesh.expert", "32", *BF16]),
    ("deepseek32_671b", 0, "v5p-256", ["--mesh.expert", "128", *BF16]),
]
SMALLEST = [  # of each config; and the next smaller slice, if the state alone would fit it
    ("gemma3_1b", 0, "v6e-1", []),
    ("gemma2_2b", 0, "v6e-4", []),
    ("gemma2_2b", 0, "v6e-1", []),
    ("gemma3_4b", 0, "v6e-4", []),
    ("gemma4_e2b", 0, "v6e-4", []),
    ("gemma4_e4b", 0, "v6e-4", []),
    ("gemma2_9b", 0, "v6e-8", []),
    ("gemma2_9b", 0, "v6e-4", []),
    ("gemma3_12b", 0, "v6e-8", []),
    ("deepseek2_16b", 0, "v6e-8", ["--mesh.expert", "8"]),
    ("gemma2_27b", 0, "v6e-16", []),
    ("gemma3_27b", 0, "v6e-16", []),
    ("gemma4_26b", 0, "v6e-16", ["--mesh.expert", "16"]),
    ("gemma4_31b", 0, "v6e-16", ["--gather_ahead", "90"]),
    ("deepseek2_236b", 0, "v5p-64", ["--mesh.expert", "32", *BF16]),
    ("deepseek3_671b", 0, "v5p-256", ["--mesh.expert", "128", *BF16]),
    ("deepseek3_671b", 0, "v5p-128", ["--mesh.expert", "64", *BF16]),
]
COLUMNS = "config, slice, mesh, tokens a chip, parameters and state, peak (GiB), of, "
COLUMNS += "gathers beside products / alone, compiled in, predicted MFU"


def cut(cfg: Config, layers: int) -> Config:
    """The first `layers` layers, without the module that predicts further ahead."""
    stages, left = [], layers
    for stage in cfg.model.stages:
        repeats = min(stage.repeats, left // len(stage.pattern))
        stages += [Stage(stage.pattern, repeats)] if repeats else []
        left -= repeats * len(stage.pattern)
    return replace(cfg, run=f"{cfg.run}_{layers}", model=replace(cfg.model, stages=tuple(stages), mtp=()))


def make(name: str, layers: int, tpus: str, changes: list[str]) -> None:
    cfg, *_ = options.load([f"configs/{name}.py", *changes])
    cfg = plan.on_slice(cut(cfg, layers) if layers else cfg, tpus)
    print(json.dumps(plan.make(cfg, tpus)._asdict()))


def main(names: list[str]) -> None:
    file = Path("runs/plans.json")
    known = json.loads(file.read_text()) if file.is_file() else {}
    for row in LARGE + SMALLEST:
        key = json.dumps(row)
        if key not in known and (not names or row[0] in names):
            done = subprocess.run([sys.executable, __file__, "--row", key], capture_output=True, text=True)
            said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
            # The compiler's own aborts say first what is wrong, and then much else.
            last = next((line for line in said if "Check failed" in line), said[-1])
            known[key] = json.loads(last) if done.returncode == 0 else {"error": last}
            print(key, last[:300], flush=True)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(known, indent=1))
    for rows in (LARGE, SMALLEST):
        print("", f"| {COLUMNS.replace(', ', ' | ')} |", "|---" * (COLUMNS.count(",") + 1) + "|", sep="\n")
        print(*[line(row, known[json.dumps(row)]) for row in rows if json.dumps(row) in known], sep="\n")


def line(row: tuple[str, int, str, list[str]], found: dict) -> str:
    name, layers, tpus, changes = row
    what = f"`{name}`" + (f", {layers} layers" if layers else "") + (", bf16 moments" if BF16[0] in changes else "")
    what += ", gather_ahead 90" if "--gather_ahead" in changes else ""
    if "error" in found:
        return f"| {what} | {tpus} | {found['error']} |"
    cfg, *_ = options.load([f"configs/{name}.py", *changes])
    gib, gathers = found["memory_gib"], found["gathers"]
    peak = f"{gib['peak']:.2f}" + ("" if found["fits"] else ", too much")
    places = f"{gathers['overlapped']} / {gathers['alone']}" if gathers else ""
    said = found["predicted"]
    mfu = f"{said['mfu']:.0%}" + (", interconnect" if said["interconnect_s"] == said["step_s"] else "")
    return (
        f"| {what} | {found['topology']} | {found['mesh']} | {cfg.data.seq_len} | {gib['arguments']:.1f} | {peak} | "
        f"{found['available_gib']:.2f} | {places} | {found['compile_s']:.0f} s | {mfu} |"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        make(*json.loads(sys.argv[2]))
    else:
        main(sys.argv[1:])
