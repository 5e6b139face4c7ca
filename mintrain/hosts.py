"""One run on many hosts: the same command on each, joined by `jax.distributed`, and what all of them must agree on.

Every function does nothing, or answers at once, where there is one process. All hosts see the same file system.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mintrain.config import ConfigError

BY_HAND = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}  # JAX reads the coordinator's address
PATIENCE = 24 * 3600 * 1000  # milliseconds that hosts wait for the first one to encode the text
meetings = count()


def join() -> None:
    """Join the other hosts, before any device is touched; from then on only the first one prints.

    JAX asks the TPU, Slurm, Open MPI or Kubernetes who they are, unless the environment says so.
    """
    # That service would take SIGTERM for itself, hears no Ctrl-C, and forgets what comes before the first step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        by_hand = {name: int(os.environ[var]) for name, var in BY_HAND.items() if var in os.environ}
        # A host that fails alone waits for the others to leave with it; then JAX ends them all.
        jax.distributed.initialize(**by_hand, shutdown_timeout_seconds=60)
    except Exception as error:  # JAX raises whatever its parts raise
        reason = (str(error) or repr(error)).splitlines()[0][:200]
        raise ConfigError(
            f"--distributed cannot find the other hosts: {reason}; start it on all of them "
            f"by TPU, GKE or Slurm, or set JAX_COORDINATOR_ADDRESS=HOST:PORT, {' and '.join(BY_HAND.values())}"
        ) from error
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


@contextmanager
def together() -> Iterator[None]:
    """All hosts get through the block, or all stop: those without an error leave with exit code 2, without a word."""
    error = None
    try:
        yield
    except ConfigError as caught:
        error = caught
    _agree(error)


@contextmanager
def in_turn() -> Iterator[None]:
    """The same, but the first host goes alone; the others then find the files that it has made."""
    first, error = jax.process_index() == 0, None
    if not first:
        _agree(None)
    try:
        yield
    except ConfigError as caught:
        error = caught
    if first:
        _agree(error)
    _agree(error)


def _agree(error: ConfigError | None) -> None:
    failed = error is not None
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        # Devices would not wait for long.
        multihost.get_barrier_sync_fn()(key=f"mintrain {next(meetings)}", timeout_ms=PATIENCE)
        failed = bool(np.any(multihost_utils.process_allgather(np.array(failed))))
    if error is not None:
        raise error
    if failed:
        sys.exit(2)


class Told:
    """Whether any host was told to stop. All ask at the same places and get the same answer; once yes, always yes."""

    def __init__(self):
        self.yes, self.asked = False, None

    def now(self, here: bool) -> bool:
        """Waits until all hosts are here."""
        self.yes = self.yes or bool(_any(here))
        return self.yes

    def late(self, here: bool) -> bool:
        """The answer to the last call, which the device has by now, so that nobody waits. One host needs no other."""
        if jax.process_count() == 1:
            return self.now(here)
        before, self.asked = self.asked, _any(here)
        self.yes = self.yes or (before is not None and bool(before))
        return self.yes


def _any(here: bool) -> jax.Array | bool:
    if jax.process_count() == 1:
        return here
    each, anyone = _anyone()
    return anyone(jax.make_array_from_callback((jax.device_count(),), each, lambda _: np.array([here])))


@cache
def _anyone():
    mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Explicit,))
    return NamedSharding(mesh, P("all")), jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
