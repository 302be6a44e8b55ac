"""What the study runs, it runs as processes, each with a log: some at a time, and where one fails
the others go on.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from matformer_dist.parallel.topology import cpu_environment

T = TypeVar("T")


class FailedError(Exception):
    """What was said of each that failed; the others were gone on with."""


def each(
    do: Callable[[T], object], of: Sequence[T], jobs: int, name: Callable[[T], str] = str
) -> None:
    """`jobs` at a time. FailedError, at the end, of those that failed."""

    def attempt(one: T) -> str | None:
        begun = time.monotonic()
        try:
            do(one)
        except FailedError as error:
            return f"{name(one)}: {error}"
        print(f"{name(one)}: {time.monotonic() - begun:.0f} s", flush=True)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        failed = [told for told in pool.map(attempt, of) if told]
    if failed:
        raise FailedError("\n".join(failed))


def call(command: Sequence[str], log: Path, jobs: int, *, on_gpu: bool = False) -> None:
    """One of `jobs` on this machine. FailedError where it fails; what it says is in the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = None if on_gpu else cpu_environment(jobs)
    with log.open("ab") as file:
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if code:
        raise FailedError(f"{shlex.join(command)} ended with {code}: see {log}")
