"""The signals by which a cluster takes its machines back: SIGTERM, and Slurm's SIGUSR1.

The first asks for an end after the current step; whoever trains asks `requested` there. The
second ends the process at once, even where it waits for other ranks inside a library. It must come
some time after the first: a cluster signals all processes of a job, DeepSpeed's launcher among
them, which passes it on to ranks that have it already.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_SECONDS = 2.0  # signals within this time are one


class Preemption:
    """Counts the signals while it is entered. Of the main thread."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Preemption:
        # Python runs its handlers between the main thread's instructions, which may be long in
        # coming: C code writes into this socket when the signal arrives.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _noted) for number in SIGNALS}
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._before_fd)
        with contextlib.suppress(OSError):
            self._reader.shutdown(socket.SHUT_RDWR)  # ends the thread
        self._writer.close()

    def _watch(self) -> None:
        with self._reader:
            while numbers := self._reader.recv(64):
                for number in numbers:
                    if number in SIGNALS:  # others, such as SIGINT, are Python's to handle
                        self._take(signal.Signals(number))

    def _take(self, received: signal.Signals) -> None:
        if self.requested is None:
            self.requested, self._since = received, time.monotonic()
        elif time.monotonic() - self._since > SAME_SECONDS:
            os._exit(128 + received)


def _noted(number: int, frame: FrameType | None) -> None:
    """A handler must be set, or the signal would end the process."""
