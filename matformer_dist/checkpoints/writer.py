"""Writes the checkpoint files that DeepSpeed hands over, at once or beside the training.

DeepSpeed's own decoupled writer needs its asynchronous-I/O extension, and tells nobody what it
wrote. This one takes its place behind the same interface.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matformer_dist.checkpoints.files import HashingStream, write_file
from matformer_dist.run_directory import SavedFile


class CheckpointWriter:
    """One rank's files of one checkpoint at a time.

    Nothing is raised while DeepSpeed saves, where the other ranks would wait for this one:
    `take` tells what was written, or what went wrong.

    in_background: `save` takes a copy of the values in host memory, and a thread writes them. The
    memory is kept for the next checkpoint.
    classes: what `load` may make out of a file, beside tensors and Python's own types.
    busy: called, also by that thread, for every block that is written.
    """

    busy: Callable[[], object]

    def __init__(self, in_background: bool = False, classes: Sequence[type] = ()) -> None:
        self.in_background = in_background
        self.busy = lambda: None
        self._classes: list[Any] = list(classes)
        self._thread: threading.Thread | None = None
        self._waiting: list[tuple[Any, Path]] = []
        self._written: dict[Path, SavedFile] = {}
        self._failure: Exception | None = None
        self._copies: list[Tensor] = []  # in host memory, by the order in which they are made
        self._made = 0

    def start(self) -> None:
        """All has been handed over: the background may begin. (It must not run beside the copying,
        which it would slow.)
        """
        if self.in_background:
            self._thread = threading.Thread(target=self._write, name="checkpoint writer")
            self._thread.start()

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def take(self) -> dict[Path, SavedFile]:
        """Wait for the files, and return them; raises what kept one from being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        written, failure = self._written, self._failure
        self._written, self._failure, self._made = {}, None, 0
        if failure is not None:
            raise failure
        return written

    def _write(self) -> None:
        try:
            while self._waiting:
                state, path = self._waiting.pop(0)
                self._written[path] = self._write_state(state, path)
        except Exception as failure:
            self._failure = failure
            self._waiting.clear()

    def _in_host_memory(self, state: Any) -> Any:
        """The same dictionaries, lists and tuples around copies of all tensors.

        A tensor that is there twice is copied once.
        """
        copies: dict[int, Tensor] = {}

        def copied(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:
                copies[id(tensor)] = self._next_copy(tensor).copy_(tensor.detach())
            return copies[id(tensor)]

        return _copied(state, copied)

    def _next_copy(self, tensor: Tensor) -> Tensor:
        """Memory for a tensor: that of the last checkpoint, where it fits."""
        place, self._made = self._made, self._made + 1
        if place == len(self._copies):
            self._copies.append(torch.empty(0))
        kept = self._copies[place]
        if (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            # Pinned: a GPU copies there several times faster.
            self._copies[place] = kept = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            )
        return kept

    def _write_state(self, state: Any, path: Path) -> SavedFile:
        def save(stream: HashingStream) -> None:
            torch.save(state, stream)  # type: ignore[arg-type]

        return write_file(path, save, lambda _: self.busy())

    # What DeepSpeed's CheckpointEngine must have.

    def create(self, info: object) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        if self._failure is not None:
            return
        try:
            if self.in_background:
                self._waiting.append((self._in_host_memory(state_dict), Path(path)))
                return
            self._written[Path(path)] = self._write_state(state_dict, Path(path))
        except Exception as failure:
            self._failure = failure

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(self._classes):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, _: object) -> bool:
        return True

    def is_data_parallel_writer(self, data_rank: int) -> bool:
        return data_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True

    def cleanup(self) -> None:
        pass


def _copied(value: Any, copied: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return copied(value)
    if isinstance(value, dict):
        result = copy.copy(value)  # keeps an OrderedDict's attributes
        for key, item in value.items():
            result[key] = _copied(item, copied)
        return result
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(item, copied) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_copied(item, copied) for item in value)
    return value
