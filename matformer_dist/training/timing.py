"""What a training step's time goes to, on this rank.

Every moment of a step belongs to exactly one part, so that the parts sum to the step:

    data           until the micro-batch is there (read, put in order, on its way to the device)
    forward        the forward pass up to the head
    loss           head and losses, whose gradients are made in the same pass (ops/loss_operator.py)
    backward       the backward pass, with activations that are computed again
    optimizer      gradient norm, clipping, the optimizer's step
    communication  within or waiting for a collective, whichever of the others issued it
    other          the rest: statistics of the step, its plan

On a CPU this is the time of the main thread. On a GPU it is that of the stream that computes, by
events recorded in it: what the host does while that stream is busy costs nothing and is not seen; a
collective counts as long as it runs on that stream or that stream waits for it, and one that is
overlapped does not. Nothing is waited for during a step or at its end: events are read when they
are past, and only a line of metrics waits for the last of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

PARTS = ("data", "forward", "loss", "backward", "optimizer", "communication", "other")


class Clock:
    """Adds up the parts of training steps; outside of `step` it counts nothing."""

    def __init__(self, device: torch.device) -> None:
        self.labels = False  # whether parts are to be named in a profiler's trace
        self._time = _StreamTime(device) if device.type == "cuda" else _HostTime()
        self._marks: list[tuple[Any, str]] = []  # when what began; "" between steps
        self._within: list[str] = []  # parts, the innermost last
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """A training step; what no part inside of it claims is `other`."""
        if self._marks and self._time.is_past(self._marks[-1][0]):
            self._read()
        self._enter("other")
        try:
            yield
        finally:
            self._leave()
            self._steps += 1

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self._within:
            yield
            return
        label: AbstractContextManager[Any] = record_function(name) if self.labels else nullcontext()
        with label:
            self._enter(name)
            try:
                yield
            finally:
                self._leave()

    def watch(self, module: nn.Module, name: str) -> None:
        """Count the forward pass of `module` as `name`."""
        inside: list[AbstractContextManager[None]] = []

        def enter(*_: object) -> None:
            inside.append(self.part(name))
            inside[-1].__enter__()

        def leave(*_: object) -> None:
            inside.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def begin_communication(self) -> bool:
        """Whether what begins now is to be counted, until `end_communication`.

        Backward passes on a GPU run in threads of autograd's, while the main thread waits.
        """
        # A wait of the stream during `data` is for a copy to the device.
        if not self._within or self._within[-1] in ("data", "communication"):
            return False
        if not self._time.is_ours():
            return False
        self._enter("communication")
        return True

    def end_communication(self) -> None:
        self._leave()

    def take(self) -> dict[str, float]:
        """Mean seconds of a step by part since the last call."""
        if self._marks:
            self._time.wait(self._marks[-1][0])
            self._read()
        means = {part: total / max(1, self._steps) for part, total in self._seconds.items()}
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._steps = 0
        return means

    def _enter(self, part: str) -> None:
        self._within.append(part)
        self._marks.append((self._time.mark(), part))

    def _leave(self) -> None:
        self._within.pop()
        self._marks.append((self._time.mark(), self._within[-1] if self._within else ""))

    def _read(self) -> None:
        for (begun, part), (ended, _) in zip(self._marks, self._marks[1:], strict=False):
            if part:
                self._seconds[part] += self._time.seconds(begun, ended)
        self._time.give_back([mark for mark, _ in self._marks])
        self._marks.clear()


class _HostTime:
    """Marks are readings of the clock."""

    def mark(self) -> float:
        return time.perf_counter()

    def is_ours(self) -> bool:
        return True

    def is_past(self, mark: float) -> bool:  # noqa: ARG002
        return True

    def wait(self, mark: float) -> None:
        pass

    def seconds(self, begun: float, ended: float) -> float:
        return ended - begun

    def give_back(self, marks: list[float]) -> None:
        pass


class _StreamTime:
    """Marks are events in the stream that computes; used again once they are read."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def is_ours(self) -> bool:
        """Whether what is issued now runs on the stream that computes, or is awaited by it."""
        return torch.cuda.current_stream(self._stream.device) == self._stream

    def is_past(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, begun: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        return begun.elapsed_time(ended) / 1e3

    def give_back(self, marks: list[torch.cuda.Event]) -> None:
        self._free += marks
