"""Host memory while a checkpoint of about 1 GB is read onto eight devices: `python docs/measure_load.py`.

The checkpoint is made on the spot: a Gemma 3 of random bfloat16 weights in four files, which become float32 on the
devices. On a CPU what devices hold is host memory too. Reading happens in a process of its own, whose peak is compared
with the memory before it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax

from mintrain import hf, load_hf, save_hf, sharding, step
from mintrain.config import MLP, Attention, Config, Layer, Mesh, Model, Rope, stages

MIB = 1 << 20


def make(folder: Path) -> None:
    local = Attention(heads=8, kv_heads=4, head_dim=128, scale=128**-0.5, qk_norm=True, window=512)
    globe = Attention(heads=8, kv_heads=4, head_dim=128, scale=128**-0.5, qk_norm=True, rope=Rope(theta=1e6))
    layers = [Layer(local, MLP(6144))] * 5 + [Layer(globe, MLP(6144))]
    cfg = Config(Model(65_536, 1536, stages(tuple(layers * 2)), norm_offset=1.0), mesh=Mesh(fsdp=8))
    model = step.new_state(cfg, sharding.make_mesh(cfg.mesh)).model
    hf.SHARD = 256 * MIB
    save_hf(model, folder, "bfloat16")


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(folder: Path) -> None:
    jax.block_until_ready(jax.device_put(0, jax.devices()[-1]))
    before = status("VmRSS")
    model = load_hf(folder, mesh=Mesh(fsdp=8))
    jax.block_until_ready(model)
    peak = status("VmHWM") - before
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards)
    allowed = 1.3 * max(files) + held
    print(f"files {sum(files) / MIB:.0f} MiB in {len(files)}, the largest {max(files) / MIB:.0f} MiB")
    print(
        f"devices hold {held / MIB:.0f} MiB; host peak {peak / MIB:.0f} MiB, {(peak - held) / MIB:.0f} MiB beyond them"
    )
    print(f"allowed: devices + 1.3 x the largest file = {allowed / MIB:.0f} MiB")
    sys.exit(peak > allowed)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "checkpoint")
        sys.exit(subprocess.run([sys.executable, __file__, str(Path(folder) / "checkpoint")]).returncode)
