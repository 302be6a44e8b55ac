"""Speed, time and memory of the steps since the last line of metrics, over all ranks."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median_low
from typing import Any

import torch
import torch.distributed as dist

from matformer_dist.config import Config
from matformer_dist.parallel.topology import Topology
from matformer_dist.planning.machines import device_called
from matformer_dist.training.timing import PARTS, Clock

_STRAGGLES_FROM = 1.15  # of the median rank's own time
_STRAGGLES_FOR = 5  # lines in a row


class Measurements:
    """Time and FLOPs of training steps; evaluation and checkpoints between them are left out."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self.clock = Clock(topology.device)
        self._config = config
        self._topology = topology
        self._peak_tflops = _peak_tflops(config, topology.device)
        self._flops = 0
        self._steps = 0

    @contextmanager
    def step(self, flops: int) -> Iterator[None]:
        """One step of `flops` over all ranks."""
        with self.clock.step():
            yield
        self._flops += flops
        self._steps += 1

    def take(self) -> dict[str, Any]:
        """What a line of metrics says of the steps since the last; all ranks call it together.

        One small all-gather. Times are means of a step and over ranks, by part (see timing.py);
        memory is the largest peak of any rank since the run began.
        """
        flops, ranks = self._flops / max(1, self._steps), self._topology.world_size
        self._flops = self._steps = 0
        training, peak = self._config.training, self._peak_tflops
        table = self._gather([*self.clock.take().values(), *memory_peaks(self._topology.device)])
        parts = {part: fmean(row[i] for row in table) for i, part in enumerate(PARTS)}
        seconds = max(sum(parts.values()), 1e-9)
        rate = self._config.units(training.global_batch_size) / seconds
        tflops_per_second = flops / seconds / 1e12
        memory = _largest_memory([row[len(PARTS) :] for row in table])
        return {
            f"{self._config.unit}_per_second": rate,
            f"{self._config.unit}_per_second_per_device": rate / ranks,
            "model_tflops_per_second": tflops_per_second,
            "mfu": tflops_per_second / (peak * ranks) if peak else None,
            "step_ms": seconds * 1e3,
            "time_ms": {part: value * 1e3 for part, value in parts.items()},
            "slowest_rank": slowest_rank(
                [row[: len(PARTS)] for row in table], self._topology.hosts
            ),
            "peak_memory_bytes": memory.get("allocated_bytes", memory["resident_bytes"]),
            "memory": memory,
        }

    def _gather(self, row: Sequence[float]) -> list[list[float]]:
        """Every rank's row, by rank."""
        mine = torch.tensor(row, dtype=torch.float64, device=self._topology.device)
        if self._topology.world_size == 1:
            return [mine.tolist()]
        whole = mine.new_empty(self._topology.world_size * len(row))
        dist.all_gather_into_tensor(whole, mine)
        return whole.view(-1, len(row)).tolist()


def _peak_tflops(config: Config, device: torch.device) -> float | None:
    """Of one device, for MFU: as configured, or of a GPU that is known."""
    if config.logging.peak_tflops or device.type != "cuda":
        return config.logging.peak_tflops
    known = device_called(torch.cuda.get_device_name(device))
    return known.peak_tflops(config.training.precision) if known else None


def slowest_rank(seconds: Sequence[Sequence[float]], hosts: Sequence[str]) -> dict[str, Any]:
    """The rank whose own work takes longest, and how many times the median rank's that is.

    seconds [ranks, PARTS]. Own work is all but communication: a rank that is done early waits for
    the others in a collective, so that whole steps take equally long everywhere.
    """
    waits = PARTS.index("communication")
    own = [sum(row) - row[waits] for row in seconds]
    rank = own.index(max(own))
    # With two ranks, the slower one against the faster one.
    return {
        "rank": rank,
        "host": hosts[rank],
        "ratio": own[rank] / max(median_low(own), 1e-9),
    }


def memory_peaks(device: torch.device) -> tuple[float, float, float]:
    """Most bytes this rank has held: allocated and reserved on its GPU, resident on the host."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    if device.type != "cuda":
        return 0.0, 0.0, resident
    allocated = torch.cuda.max_memory_allocated(device)
    return float(allocated), float(torch.cuda.max_memory_reserved(device)), resident


def _largest_memory(peaks: Sequence[Sequence[float]]) -> dict[str, int]:
    """The largest of each kind, and the rank that holds most on its device."""
    allocated, reserved, resident = zip(*peaks, strict=True)
    decides = allocated if max(allocated) else resident
    on_device = {"allocated_bytes": int(max(allocated)), "reserved_bytes": int(max(reserved))}
    return {
        **(on_device if max(allocated) else {}),
        "resident_bytes": int(max(resident)),
        "rank": decides.index(max(decides)),
    }


class Stragglers:
    """Says once of every rank that it keeps the others waiting, line after line."""

    def __init__(self) -> None:
        self._rank: int | None = None
        self._lines = 0
        self._named: set[int] = set()

    def look_at(self, line: Mapping[str, Any]) -> str | None:
        """The warning that is due behind this line of metrics."""
        slowest = line["slowest_rank"]
        rank = slowest["rank"] if slowest["ratio"] > _STRAGGLES_FROM else None
        self._lines = self._lines + 1 if rank == self._rank else 1
        self._rank = rank
        if rank is None or rank in self._named or self._lines < _STRAGGLES_FOR:
            return None
        self._named.add(rank)
        return (
            f"rank {rank} on {slowest['host']} holds the others up: its own work takes "
            f"{slowest['ratio']:.2f} times the median rank's, the slowest of all for "
            f"{self._lines} lines of metrics; look at that machine's clocks, temperature and "
            "other programs, and at where it reads the data from"
        )
