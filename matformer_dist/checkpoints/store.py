"""The checkpoints of one run: saving, pruning, and choosing where a run begins.

`checkpoints/step-N/` is written as `step-N.incomplete/`, its manifest last, and then renamed;
`checkpoints/latest` names the newest, as DeepSpeed's tools expect. What is to go is renamed to
`step-N.deleted/` first. So a folder `step-N` is whole, or was damaged by somebody else.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch.distributed as dist

from matformer_dist.checkpoints.files import (
    hash_file,
    replace_file,
    sync_directory,
    sync_file,
)
from matformer_dist.checkpoints.verify import faults
from matformer_dist.checkpoints.writer import CheckpointWriter
from matformer_dist.config import CheckpointConfig
from matformer_dist.errors import UserError
from matformer_dist.parallel.agreement import agreement, gathered, on_main
from matformer_dist.run_directory import (
    MANIFEST,
    Checkpoint,
    Checkpoints,
    DamagedError,
    Layout,
    Manifest,
    SavedFile,
    find_checkpoint,
    read_checkpoints,
)


class Saves(Protocol):
    """What can be saved: DeepSpeed's engine, wrapped, which hands its files to the writer."""

    writer: CheckpointWriter

    def save(self, directory: str, tag: str) -> None: ...


class Start(NamedTuple):
    """Where a run begins: at a checkpoint, or, without one, afresh."""

    checkpoint: Checkpoint | None
    damaged: list[str]  # why newer checkpoints than that were passed over


class CheckpointStore:
    """Saves, prunes and chooses the checkpoints of one run; every rank calls every method.

    busy: called now and then while files are written or read.
    """

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, busy: Callable[[], object] = lambda: None
    ) -> None:
        self._busy = busy
        self.run_dir = run_dir
        self.directory = run_dir / "checkpoints"
        self.config = config
        self._pending: tuple[Manifest, CheckpointWriter] | None = None
        self._prunes = True
        self._seconds = 0.0
        self.warnings: list[str] = []  # what went wrong behind a checkpoint that is good

    # Saving

    def save(self, engine: Saves, manifest: Manifest, *, prunes: bool = True) -> None:
        """Write the checkpoint of `manifest.step`, and delete what need not be kept any more.

        With `checkpoint.async_save` the training may go on when this returns; `poll` or `finish`
        completes the checkpoint. UserError where a file cannot be written: what was there before
        is untouched.
        """
        self.finish()
        begun = time.perf_counter()
        incomplete = self._incomplete(manifest)
        on_main(lambda: self._begin(incomplete))
        engine.writer.busy = self._busy
        engine.save(str(self.directory), incomplete.name)
        engine.writer.start()
        self._pending = manifest, engine.writer
        self._prunes = prunes
        self._seconds += time.perf_counter() - begun
        if not engine.writer.in_background:
            self.finish()

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of a checkpoint waits for nothing but `finish`."""
        return self._pending is not None and not self._pending[1].is_busy

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and make it one."""
        if self._pending is None:
            return
        begun = time.perf_counter()
        (manifest, writer), self._pending = self._pending, None
        incomplete = self._incomplete(manifest)
        try:
            with agreement():
                mine = writer.take()
            everyone = gathered({str(p.relative_to(incomplete)): f for p, f in mine.items()})
            self.warnings += on_main(lambda: self._publish(manifest, everyone))
        except UserError as error:
            on_main(lambda: shutil.rmtree(incomplete, ignore_errors=True))
            raise UserError(
                f"the checkpoint of step {manifest.step} could not be written: {error}; "
                f"{self._left()}"
            ) from None
        self._seconds += time.perf_counter() - begun

    def take_seconds(self) -> float:
        """How long the training stood still for checkpoints since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _incomplete(self, manifest: Manifest) -> Path:
        return self.directory / f"step-{manifest.step}.incomplete"

    def _left(self) -> str:
        complete = self._complete()
        if not complete:
            return "the run has no checkpoint yet"
        return f"the last one, {complete[-1].path}, is untouched"

    def _complete(self) -> list[Checkpoint]:
        try:
            return read_checkpoints(self.run_dir).complete
        except UserError:  # one of another version among them is no reason to fail here
            return []

    def _begin(self, incomplete: Path) -> None:
        for pattern in ("step-*.incomplete", "step-*.deleted"):
            for left_over in self.directory.glob(pattern):
                shutil.rmtree(left_over)
        incomplete.mkdir(parents=True)

    def _publish(self, manifest: Manifest, ranks: Sequence[dict[str, SavedFile]]) -> list[str]:
        """Make what all ranks have written a checkpoint; returns what then went wrong."""
        incomplete = self._incomplete(manifest)
        _check_files(incomplete, manifest.layout)
        files = {name: file for rank in ranks for name, file in rank.items()}
        for path in incomplete.rglob("*"):  # such as DeepSpeed's copies of states on NVMe
            name = str(path.relative_to(incomplete))
            if path.is_file() and name not in files:
                sync_file(path)
                files[name] = hash_file(path)
        complete = manifest.model_copy(update={"files": dict(sorted(files.items()))})
        replace_file(incomplete / MANIFEST, complete.sealed().encode())
        final = self.directory / f"step-{manifest.step}"
        if final.exists():
            self._delete(final)
        incomplete.rename(final)
        sync_directory(self.directory)
        try:
            replace_file(self.directory / "latest", final.name.encode())
            if self._prunes:
                self._prune(manifest.step)
        except OSError as error:
            return [f"the checkpoint of step {manifest.step} is good, but: {error}"]
        return []

    def _prune(self, newest: int) -> None:
        """Delete what need not be kept; never the one just written, nor one that is damaged."""
        older = [checkpoint for checkpoint in self._complete() if checkpoint.step < newest]
        keep_every = self.config.keep_every
        for checkpoint in older[: len(older) + 1 - self.config.keep_last]:
            if keep_every is None or checkpoint.step % keep_every:
                self._delete(checkpoint.path)

    def _delete(self, path: Path) -> None:
        going = path.with_name(f"{path.name}.deleted")
        path.rename(going)
        shutil.rmtree(going)

    # Choosing where to begin

    def choose_start(self) -> Start:
        """What `checkpoint.resume` asks for; UserError where that would lose something.

        Every file of the chosen checkpoint is read and compared with its SHA-256, each rank taking
        a part of them.
        """
        found = on_main(lambda: read_checkpoints(self.run_dir))
        if self.config.resume == "auto":
            return self._newest(found)
        if self.config.resume == "never":
            if any(found):
                raise UserError(
                    f"checkpoint.resume is never, but {self.run_dir} holds checkpoints; choose "
                    "another run.dir, or delete that one"
                )
            return Start(None, [])
        chosen = on_main(lambda: find_checkpoint(self.config.resume))
        if found.complete and found.complete[-1].manifest.began_from == str(chosen.path.resolve()):
            return self._newest(found)  # the same command, called again
        steps = [*(checkpoint.step for checkpoint in found.complete), *found.damaged]
        later = sorted(step for step in steps if step > chosen.step)
        if later:
            raise UserError(
                f"checkpoint.resume is {chosen.path}, but {self.directory} holds later steps "
                f"({', '.join(map(str, later))}), which going on from step {chosen.step} would "
                "write over; move these away, choose another run.dir, or resume=auto"
            )
        if wrong := self._damage(chosen):
            raise UserError(f"{wrong}; choose another checkpoint.resume")
        return Start(chosen, [])

    def _newest(self, found: Checkpoints) -> Start:
        damaged = dict(found.damaged)
        for checkpoint in reversed(found.complete):
            wrong = self._damage(checkpoint)
            if not wrong:
                newer = [why for step, why in sorted(damaged.items()) if step > checkpoint.step]
                return Start(checkpoint, newer)
            damaged[checkpoint.step] = wrong
        if damaged:
            raise UserError(
                f"no checkpoint in {self.directory} is whole, and a run does not begin again "
                f"unasked: {'; '.join(damaged.values())}; restore one, or choose another run.dir"
            )
        return Start(None, [])

    def _damage(self, checkpoint: Checkpoint) -> str:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        mine = faults(checkpoint, part=rank, parts=ranks, advance=lambda _: self._busy())
        everyone = gathered(mine)
        found = [fault for of_rank in everyone for fault in of_rank]
        return str(DamagedError(checkpoint.path, *found)) if found else ""


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
