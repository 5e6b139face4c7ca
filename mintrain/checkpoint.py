"""Checkpoints by orbax: asynchronous, atomic, the last few kept, restored onto any mesh.

Orbax reads a file with a flipped byte without a word, so each checkpoint gets a list of its files' checksums.
Orbax is slow to import (2.4 s), so it is imported when the first checkpoint is read or written.
"""

import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from mintrain import hosts, options
from mintrain.arrays import check
from mintrain.config import Config, ConfigError, Mesh
from mintrain.lora import merge
from mintrain.model import LM
from mintrain.sharding import make_mesh, validate
from mintrain.step import State, abstract_state

COMMITTED = "_CHECKPOINT_METADATA"  # orbax writes it last, then renames the folder into place
SUMS = "checksums.json"  # written after that; a checkpoint whose process was killed in between goes without


class Checkpoints:
    """The checkpoints of one run. Folders that a killed process left half-written are removed."""

    def __init__(self, folder: Path, keep: int):
        """Raises ConfigError if `folder` holds something that is not a checkpoint, and touches nothing then."""
        self.folder, self.keep, self.manager = folder.resolve(), keep, None
        entries = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        partial = [entry for entry in entries if ".orbax-checkpoint-tmp" in entry.name]
        whole = [entry for entry in entries if entry not in partial]
        for entry in whole:
            if not (entry.name.isdecimal() and (entry / COMMITTED).is_file() and (entry / "default").is_dir()):
                raise ConfigError(f"{entry} is not a checkpoint of this run; move it away")
        if jax.process_index() == 0:
            for entry in partial:
                shutil.rmtree(entry)
        self.steps = sorted(int(entry.name) for entry in whole)

    @property
    def latest(self) -> int | None:
        return self.steps[-1] if self.steps else None

    def restore(self, abstract: State) -> State:
        """The latest state, with the shapes, dtypes and layouts of `abstract`. Raises ConfigError if it differs."""
        import orbax.checkpoint as ocp

        state = self._read(ocp.args.StandardRestore(abstract))
        check(state.model)
        return state

    def restore_model(self, abstract: LM) -> LM:
        """The model of the latest state alone: nothing else is read. Raises ConfigError if it differs."""
        import orbax.checkpoint as ocp

        part = {"model": abstract}  # the name of State's field
        shardings = ocp.checkpoint_utils.construct_restore_args(part)
        model = self._read(ocp.args.PyTreeRestore(part, restore_args=shardings, partial_restore=True))["model"]
        check(model)
        return model

    def _read(self, args: Any) -> Any:
        try:
            with hosts.together():
                _verify(self.folder / str(self.latest))
            return self._manager().restore(self.latest, args=args)
        except Exception as error:  # orbax raises whatever its parts raise
            reason = str(error).strip().splitlines()[0][:300]
            raise ConfigError(
                f"{self.folder / str(self.latest)} cannot be restored: {reason}; remove it to go on from the one before"
            ) from error

    def save(self, step: int, state: State) -> None:
        """Start writing. The arrays are copied off the devices before this returns, so the state may be donated."""
        import orbax.checkpoint as ocp

        if step not in self.steps:
            self._manager().save(step, args=ocp.args.StandardSave(state))
            self.steps.append(step)

    def close(self) -> None:
        """Wait until everything is on disk."""
        if self.manager is not None:
            self.manager.close()

    def _manager(self):
        import orbax.checkpoint as ocp

        if self.manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.keep,
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
            )
            self.manager = ocp.CheckpointManager(self.folder, options=options)
        return self.manager

    def _seal(self) -> None:
        """Write down the checksums of what has just been committed, off the main thread."""
        if jax.process_index() == 0:
            for step in self.folder.iterdir():
                if (step / COMMITTED).is_file() and not (step / SUMS).is_file():
                    sums = {
                        str(file.relative_to(step)): _sum(file)
                        for file in (step / "default").rglob("*")
                        if file.is_file()
                    }
                    (step / f"{SUMS}.tmp").write_text(json.dumps(sums))
                    (step / f"{SUMS}.tmp").rename(step / SUMS)


def load_run(folder: Path, mesh: Mesh, dtype: str = "") -> tuple[Config, LM]:
    """A run's config and the model of its latest checkpoint, without adapters: their terms are added.

    dtype: in which it computes; empty: the run's. Raises ConfigError if there is no checkpoint.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; give the folder of a run, such as runs/shakespeare")
    cfg = options.read(folder / "config.json")
    cfg = replace(cfg, mesh=mesh, accumulate=1, per_device_batch_size=1.0, compute_dtype=dtype or cfg.compute_dtype)
    checkpoints = Checkpoints(folder / "checkpoints", cfg.keep_checkpoints)
    if checkpoints.latest is None:
        raise ConfigError(f"{folder} has no checkpoint; train it first")
    devices = make_mesh(mesh)
    abstract = abstract_state(cfg, devices).model
    validate(mesh, abstract)
    return cfg, merge(checkpoints.restore_model(abstract))


def _sum(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _verify(step: Path) -> None:
    """Each process checks its share of the files. Raises ConfigError for one that is missing or has changed."""
    sums = json.loads((step / SUMS).read_text()) if (step / SUMS).is_file() else {}
    for name in sorted(sums)[jax.process_index() :: jax.process_count()]:
        if not (step / name).is_file():
            raise ConfigError(f"{name} is missing")
        if _sum(step / name) != sums[name]:
            raise ConfigError(f"{name} has changed since it was written")
