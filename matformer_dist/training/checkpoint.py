"""Saving and loading checkpoints: DeepSpeed's files and a manifest, complete or not there at all.

`checkpoints/step-N/` is written as `step-N.incomplete/`, its manifest last, and then renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from matformer_dist.config import CheckpointConfig
from matformer_dist.errors import UserError
from matformer_dist.parallel.agreement import on_main
from matformer_dist.parallel.topology import Topology
from matformer_dist.run_directory import (
    MANIFEST,
    Checkpoint,
    Checkpoints,
    Layout,
    Manifest,
    SavedFile,
    find_checkpoint,
    read_checkpoints,
)
from matformer_dist.training.engine import Engine


class Start(NamedTuple):
    """Where a run begins: at a checkpoint, or, without one, afresh."""

    checkpoint: Checkpoint | None
    damaged: list[str]  # why newer checkpoints than that were passed over


class CheckpointStore:
    """Saves, prunes and loads the checkpoints of one run.

    Every rank calls `save` and `load`; `choose_start` is for the main rank.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, topology: Topology) -> None:
        self.directory = run_dir / "checkpoints"
        self.run_dir = run_dir
        self.config = config
        self.topology = topology

    def save(self, engine: Engine, manifest: Manifest, state: dict[str, Any]) -> None:
        """Write the checkpoint of `manifest.step`; `state` comes back from `load`."""
        incomplete = self.directory / f"step-{manifest.step}.incomplete"
        on_main(lambda: self._begin(incomplete))
        engine.save(str(self.directory), incomplete.name, state)
        dist.barrier()
        on_main(lambda: self._publish(incomplete, manifest))

    def _begin(self, incomplete: Path) -> None:
        for left_over in self.directory.glob("step-*.incomplete"):
            shutil.rmtree(left_over)
        incomplete.mkdir(parents=True)

    def _publish(self, incomplete: Path, manifest: Manifest) -> None:
        """Make what all ranks have written a checkpoint."""
        # DeepSpeed's own converters, which know nothing of tensor parallelism or rings.
        for script in self.directory.glob("zero_to_*.py"):
            script.unlink()
        _check_files(incomplete, manifest.layout)
        _write_manifest(incomplete, manifest)
        final = self.directory / f"step-{manifest.step}"
        shutil.rmtree(final, ignore_errors=True)
        incomplete.rename(final)
        _sync(self.directory)
        self._prune()

    def choose_start(self) -> Start:
        """What `checkpoint.resume` asks for; UserError where that would lose something."""
        found = read_checkpoints(self.run_dir)
        if self.config.resume == "auto":
            return self._newest(found)
        if self.config.resume == "never":
            if any(found):
                raise UserError(
                    f"checkpoint.resume is never, but {self.run_dir} holds checkpoints; choose "
                    "another run.dir, or delete that one"
                )
            return Start(None, [])
        chosen = find_checkpoint(self.config.resume)
        steps = [*(checkpoint.step for checkpoint in found.complete), *found.damaged]
        later = sorted(step for step in steps if step > chosen.step)
        if later:
            raise UserError(
                f"checkpoint.resume is {chosen.path}, but {self.directory} holds later steps "
                f"({', '.join(map(str, later))}), which going on from step {chosen.step} would "
                "write over; move these away, choose another run.dir, or resume=auto"
            )
        return Start(chosen, [])

    def _newest(self, found: Checkpoints) -> Start:
        if not found.complete:
            if found.damaged:
                raise UserError(
                    f"no checkpoint in {self.directory} is whole, and a run does not begin again "
                    f"unasked: {'; '.join(found.damaged.values())}; restore one, or choose another "
                    "run.dir"
                )
            return Start(None, [])
        newest = found.complete[-1]
        return Start(newest, [why for step, why in found.damaged.items() if step > newest.step])

    def load(self, engine: Engine, checkpoint: Checkpoint) -> dict[str, Any]:
        """Load weights and optimizer state into the engine; returns the saved `state`."""
        return engine.load(str(checkpoint.path.parent), checkpoint.path.name)

    def _prune(self) -> None:
        complete = read_checkpoints(self.run_dir).complete
        keep_every = self.config.keep_every
        for checkpoint in complete[: -self.config.keep_last]:
            if keep_every is None or checkpoint.step % keep_every:
                shutil.rmtree(checkpoint.path)


def _check_files(directory: Path, layout: Layout) -> None:
    """UserError unless the files of all ranks are there."""
    ranks = layout.tensor * layout.data
    models = ranks if layout.zero_stage == 3 else layout.tensor
    for kind, wanted in (("model", models), ("optim", ranks if layout.zero_stage else 0)):
        found = len(list(directory.glob(f"*_{kind}_states.pt")))
        if found != wanted:
            raise UserError(
                f"{directory} holds {found} files of {kind} states, of {ranks} ranks {wanted} were "
                "expected: run.dir must be a folder that the ranks of all nodes share"
            )


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    files = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
            os.fsync(stream.fileno())
        name = str(file.relative_to(directory))
        files[name] = SavedFile(bytes=file.stat().st_size, sha256=digest.hexdigest())
    with (directory / MANIFEST).open("w") as stream:
        stream.write(manifest.model_copy(update={"files": files}).model_dump_json(indent=1))
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
