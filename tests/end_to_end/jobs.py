"""launch/train.py in processes that need not import torch and DeepSpeed again, to be killed."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from tests.end_to_end.conftest import ROOT
from tests.forked import FORKED, become_rank
from tests.ports import free_port


class Job:
    """The ranks of one run; what they print goes into a file."""

    def __init__(self, config: Path, *overrides: str, ranks: int = 1) -> None:
        self.log = config.with_suffix(".log")
        self.log.write_text("")
        port = free_port()
        self.ranks: list[Any] = [
            FORKED.Process(target=_train, args=(config, overrides, self.log, rank, ranks, port))
            for rank in range(ranks)
        ]
        for process in self.ranks:
            process.start()

    @property
    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def signal(self, number: int, rank: int | None = None) -> None:
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, timeout_s: float = 120) -> list[int]:
        """Exit codes by rank; ranks that take longer are killed, and the test fails."""
        for process in self.ranks:
            process.join(timeout_s)
        if self.is_alive:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"a rank did not end in {timeout_s} s:\n{self.printed()}")
        return [process.exitcode for process in self.ranks]

    def printed(self) -> str:
        return self.log.read_text(errors="replace")


def _train(
    config: Path, overrides: tuple[str, ...], log: Path, rank: int, ranks: int, port: int
) -> None:
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if ranks > 1:
        become_rank(rank, ranks, port)
    os.chdir(ROOT)
    sys.argv = ["launch/train.py", "--config", str(config), *overrides]
    runpy.run_path("launch/train.py", run_name="__main__")
