"""Eight CPU devices, quick compiles, and no silent broadcasting. This must come before JAX is imported."""

import os
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]  # compiling takes longest
if version("jaxlib").startswith("0.10."):  # three times quicker; later versions stop at a flag that they do not know
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *flags))

# The same program is compiled once for all tests and workers; the next run of the suite finds it there too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")  # arrays of different rank do not broadcast by accident


MAPS, MOST = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


@pytest.fixture(autouse=True)
def few_programs():
    """A process can map only so many compiled programs; beyond them XLA's compiler for CPUs crashes."""
    yield
    if MAPS.is_file() and MAPS.read_bytes().count(b"\n") > int(MOST.read_text()) // 3:
        jax.clear_caches()
