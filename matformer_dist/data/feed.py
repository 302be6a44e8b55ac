"""Micro-batches on their way to the device, ahead of whoever takes them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # tokens and targets, [b, s] each


class _Ready(NamedTuple):
    batch: Batch
    copied: Any  # the event of its copy to a GPU, or None


class _End(NamedTuple):
    """Of the source: its failure, or None."""

    failure: BaseException | None


class Feed(Iterator[Batch]):
    """The source's batches, in its order, on `device`; a thread goes on up to `ahead` of them.

    On a GPU the thread pins each batch and copies it on a stream of its own, so that neither
    reading nor copying keeps the device waiting. 0: no thread; a batch is read when it is asked
    for. What the source raises is raised where its batch would have come. To be entered, so that
    the thread ends with its reader, or closed.
    """

    def __init__(self, source: Iterator[Batch], device: torch.device, ahead: int) -> None:
        self.source, self.device = source, device
        self._left = threading.Event()
        self._thread: threading.Thread | None = None
        if ahead:
            self._queue: queue.Queue[_Ready | _End] = queue.Queue(ahead)
            self._thread = threading.Thread(target=self._read_ahead, name="feed", daemon=True)
            self._thread.start()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Read no further. A thread that is inside the source may come to the end of that first."""
        self._left.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def __next__(self) -> Batch:
        if self._left.is_set():
            raise StopIteration
        if self._thread is None:
            return self._moved(next(self.source))
        found = self._queue.get()
        if isinstance(found, _End):
            self._left.set()
            if found.failure is None:
                raise StopIteration
            raise found.failure
        if found.copied is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(found.copied)
            for tensor in found.batch:
                tensor.record_stream(here)  # memory of the other stream
        return found.batch

    def _moved(self, batch: Batch) -> Batch:
        tokens, targets = batch
        if self.device.type == "cuda":
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        return (
            tokens.to(self.device, non_blocking=True),
            targets.to(self.device, non_blocking=True),
        )

    def _read_ahead(self) -> None:
        stream = None
        try:
            if self.device.type == "cuda":
                stream = torch.cuda.Stream(self.device)
            for batch in self.source:
                with torch.cuda.stream(stream) if stream else nullcontext():
                    moved = self._moved(batch)
                if not self._put(_Ready(moved, stream.record_event() if stream else None)):
                    return
            self._put(_End(None))
        except BaseException as failure:
            self._put(_End(failure))

    def _put(self, one: _Ready | _End) -> bool:
        """Whether there was a place for it before the reader left."""
        while not self._left.is_set():
            try:
                self._queue.put(one, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
