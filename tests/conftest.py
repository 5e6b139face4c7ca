"""Eight CPU devices, quick compiles, and no silent broadcasting. This must come before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # the tests compile for longer than they run
    )
)

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")  # arrays of different rank do not broadcast by accident


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes longer than about 15 seconds")
