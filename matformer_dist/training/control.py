"""What may end a run before its last step; all ranks decide alike.

A signal (see preemption.py), steps that changed nothing one after the other, data that a rank
cannot read, a rank that hangs.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import torch
import torch.distributed as dist

from matformer_dist.data.feed import Batch
from matformer_dist.errors import LocalError
from matformer_dist.parallel.topology import Topology
from matformer_dist.parallel.watchdog import Watchdog
from matformer_dist.training.preemption import Preemption


class Decision(NamedTuple):
    signal: str | None  # that some rank received
    written: bool  # whether the files of the checkpoint in the background are on disk, everywhere
    failed: bool  # whether some rank has a `failure`


class Control:
    """Entered around a run, from before its model is built."""

    def __init__(self, topology: Topology, hang_timeout: float) -> None:
        self.topology = topology
        self.preemption = Preemption()
        self.failure: LocalError | None = None  # of this rank's data
        self.watchdog = Watchdog(hang_timeout, topology.hosts)
        self._stack = ExitStack()

    def __enter__(self) -> Control:
        self._stack.enter_context(self.preemption)
        self._stack.enter_context(self.watchdog)
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def mark(self, at: str) -> None:
        """This rank goes on, with `at`."""
        self.watchdog.mark(at)

    def busy(self) -> None:
        """This rank goes on with the same."""
        self.watchdog.busy()

    def guarded(self, batches: Iterator[Batch], stand_in: Callable[[], Batch]) -> Iterator[Batch]:
        """`batches`; from one on that cannot be read, what `stand_in` makes: the other ranks, which
        wait in collectives, are told by the next `decide`.
        """
        try:
            yield from batches
        except LocalError as error:
            self.failure = error
        while self.failure is not None:
            yield stand_in()

    def decide(self, written: bool) -> Decision:
        """One small all-reduce; DeepSpeed has waited for the device in this step anyway."""
        number = self.preemption.requested or 0
        mine = [int(number), int(not written), int(self.failure is not None)]
        flags = torch.tensor(mine, device=self.topology.device)
        if self.topology.world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        number, waiting, failed = flags.tolist()
        return Decision(signal.Signals(number).name if number else None, not waiting, bool(failed))
