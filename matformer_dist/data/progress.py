"""How far a preparation is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 10.0


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


class Progress:
    """Bytes of the inputs done out of `total_bytes`, tokens, text per second, time left."""

    def __init__(self, console: Console, total_bytes: int) -> None:
        self._console = console
        self._total_bytes = max(1, total_bytes)
        self._done_bytes = self._text_bytes = self._tokens = 0
        self._started = self._last_line = time.monotonic()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("encoding", total=self._total_bytes, speed="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, disk_bytes: int, text_bytes: int, tokens: int) -> None:
        self._done_bytes += disk_bytes
        self._text_bytes += text_bytes
        self._tokens += tokens
        now = time.monotonic()
        bytes_per_second = self._text_bytes / max(1e-9, now - self._started)
        done = f"{megabytes(self._done_bytes)} of {megabytes(self._total_bytes)}"
        speed = f"{self._tokens / 1e6:,.1f} M tokens, {megabytes(bytes_per_second)}/s"
        self._bar.update(self._task, completed=self._done_bytes, speed=f"{done}, {speed}")
        if not self._console.is_terminal:
            self._line(now, f"{done}, {speed}")

    def _line(self, now: float, text: str) -> None:
        if now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = (now - self._started) * (self._total_bytes / max(1, self._done_bytes) - 1)
        self._console.print(f"encoding: {text}, {left:.0f} s left")
