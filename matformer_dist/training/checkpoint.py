"""Saving and loading checkpoints: DeepSpeed's files and a manifest, complete or not there at all.

`checkpoints/step-N/` is written as `step-N.incomplete/`, its manifest last, and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from matformer_dist.config import CheckpointConfig
from matformer_dist.errors import UserError
from matformer_dist.parallel.topology import Topology
from matformer_dist.run_directory import (
    MANIFEST,
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
)
from matformer_dist.training.engine import Engine


class CheckpointStore:
    """Saves, prunes and loads the checkpoints of one run; every rank calls every method."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, topology: Topology) -> None:
        self.directory = run_dir / "checkpoints"
        self.run_dir = run_dir
        self.config = config
        self.topology = topology

    def save(self, engine: Engine, manifest: dict[str, Any], state: dict[str, Any]) -> None:
        """Write the checkpoint of `manifest["step"]`; `state` comes back from `load`."""
        tag = f"step-{manifest['step']}"
        incomplete = self.directory / f"{tag}.incomplete"
        if self.topology.is_main:
            for left_over in self.directory.glob("step-*.incomplete"):
                shutil.rmtree(left_over)
            incomplete.mkdir(parents=True)
        dist.barrier()
        engine.save(str(self.directory), incomplete.name, state)
        dist.barrier()
        if self.topology.is_main:
            # DeepSpeed's own converters, which know nothing of tensor parallelism or rings.
            for script in self.directory.glob("zero_to_*.py"):
                script.unlink()
            _write_manifest(incomplete, manifest)
            final = self.directory / tag
            shutil.rmtree(final, ignore_errors=True)
            incomplete.rename(final)
            _sync(self.directory)
            self._prune()
        dist.barrier()

    def to_resume(self) -> Checkpoint | None:
        """The checkpoint that `checkpoint.resume` asks for, or None for a fresh start."""
        if self.config.resume == "auto":
            found = list_checkpoints(self.run_dir)
            return found[-1] if found else None
        if self.config.resume == "never":
            if list_checkpoints(self.run_dir):
                raise UserError(
                    f"checkpoint.resume is never, but {self.run_dir} holds checkpoints; choose "
                    "another run.dir, or delete that one"
                )
            return None
        return find_checkpoint(self.config.resume)

    def load(self, engine: Engine, checkpoint: Checkpoint) -> dict[str, Any]:
        """Load weights and optimizer state into the engine; returns the saved `state`."""
        return engine.load(str(checkpoint.path.parent), checkpoint.path.name)

    def _prune(self) -> None:
        checkpoints = list_checkpoints(self.run_dir)
        keep_every = self.config.keep_every
        for checkpoint in checkpoints[: -self.config.keep_last]:
            if keep_every is None or checkpoint.step % keep_every:
                shutil.rmtree(checkpoint.path)


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    files = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
            os.fsync(stream.fileno())
        name = str(file.relative_to(directory))
        files[name] = {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
    with (directory / MANIFEST).open("w") as stream:
        json.dump({**manifest, "files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    _sync(directory)


def _sync(directory: Path) -> None:
    """Put a directory's entries on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
