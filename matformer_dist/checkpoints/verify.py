"""Whether a checkpoint's files hold, bit for bit, what was written into them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import NamedTuple

from matformer_dist.checkpoints.files import hash_file
from matformer_dist.errors import UserError
from matformer_dist.run_directory import (
    MANIFEST,
    Checkpoint,
    DamagedError,
    checkpoint_paths,
    read_checkpoint,
)

THREADS = min(4, os.cpu_count() or 1)  # of a process that reads alone


class Verdict(NamedTuple):
    """What was found out about one checkpoint folder."""

    path: Path
    checkpoint: Checkpoint | None  # None where its manifest cannot be trusted
    faults: list[str]

    def __str__(self) -> str:
        if self.faults:
            return f"damaged: {'; '.join(self.faults)}"
        assert self.checkpoint is not None
        manifest = self.checkpoint.manifest
        size = sum(file.bytes for file in manifest.files.values())
        return f"good: {len(manifest.files)} files, {size:,} bytes, {manifest.layout}"


def verify(run: str, advance: Callable[[int, int], None] = lambda _, __: None) -> list[Verdict]:
    """Read all of RUN's checkpoints, or the one that RUN@STEP or its own path names.

    `advance` is told of bytes read, and of all there are to read. UserError where there is none.
    """
    verdicts = []
    opened = []
    for path in checkpoint_paths(run):
        try:
            opened.append(read_checkpoint(path))
        except DamagedError as error:
            verdicts.append(Verdict(path, None, error.faults))
        except UserError as error:
            verdicts.append(Verdict(path, None, [str(error)]))
    total = sum(file.bytes for one in opened for file in one.manifest.files.values())
    for checkpoint in opened:
        found = faults(checkpoint, threads=THREADS, advance=lambda count: advance(count, total))
        verdicts.append(Verdict(checkpoint.path, checkpoint, found))
    return verdicts


def faults(
    checkpoint: Checkpoint,
    *,
    part: int = 0,
    parts: int = 1,
    threads: int = 1,
    advance: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """What is wrong with the files, each by its name; reads them all, or the `part` of `parts`.

    `advance` is told of every block read, in bytes, by any of the `threads`.
    """
    names = sorted(
        checkpoint.manifest.files, key=lambda name: checkpoint.manifest.files[name].bytes
    )
    with ThreadPoolExecutor(threads) as pool:
        largest_first = reversed(names[part::parts])
        found = list(pool.map(lambda name: _fault(checkpoint, name, advance), largest_first))
    if part == 0:
        found += [f"{name} is not in {MANIFEST}" for name in _strangers(checkpoint)]
    return [fault for fault in found if fault]


def check_whole(checkpoint: Checkpoint) -> None:
    """DamagedError where a file is not as it was written; reads them all."""
    if found := faults(checkpoint, threads=THREADS):
        raise DamagedError(checkpoint.path, *found)


class _StoppedError(Exception):
    pass


class BackgroundCheck:
    """Reads all of a checkpoint in a thread while the `with` block runs.

    At its end, DamagedError where something is wrong: instead of an error of the block too, which
    the damage may have led to.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stop = Event()

    def __enter__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._found = self._thread.submit(
            faults, self._checkpoint, threads=THREADS, advance=self._go_on
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, UserError):
            self._stop.set()
        self._thread.shutdown()
        if not self._stop.is_set() and (wrong := self._found.result()):
            raise DamagedError(self._checkpoint.path, *wrong) from None

    def _go_on(self, _: int) -> None:
        if self._stop.is_set():
            raise _StoppedError


def _fault(checkpoint: Checkpoint, name: str, advance: Callable[[int], object]) -> str:
    entry = checkpoint.manifest.files[name]
    try:
        found = hash_file(checkpoint.path / name, advance)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if found.bytes != entry.bytes:
        return f"{name} has {found.bytes} bytes, {MANIFEST} says {entry.bytes}"
    if found.sha256 != entry.sha256:
        return f"{name} is not as it was written (its SHA-256 differs)"
    return ""


def _strangers(checkpoint: Checkpoint) -> list[str]:
    """Files that DeepSpeed might take for a rank's: it counts them."""
    files = {str(path.relative_to(checkpoint.path)) for path in checkpoint.path.rglob("*.pt")}
    return sorted(files - set(checkpoint.manifest.files))
