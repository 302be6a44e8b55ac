"""Losses over steps, and metrics.jsonl; what else stands in its lines is in measurements.py."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from matformer_dist.checkpoints.files import json_text
from matformer_dist.config import Config
from matformer_dist.errors import UserError
from matformer_dist.models.forward_pass import Pass
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.topology import Topology


class LossSums:
    """Sums of the training losses since the last line, per granularity, over all ranks.

    Reduced after every step and saved with a checkpoint, so that a resumed run writes the same
    lines bit for bit.
    """

    def __init__(self, nesting: Nesting, topology: Topology) -> None:
        self.nesting = nesting
        self.topology = topology
        self._sums = torch.zeros(len(nesting), 2, dtype=torch.float64, device=topology.device)

    def add(self, results: list[tuple[Pass, Tensor]]) -> None:
        """Take in one step's statistics; one small all-reduce over data-parallel ranks."""
        step = torch.zeros_like(self._sums)
        for plan, statistics in results:
            granularities = [
                segment.submodel.granularities[0]
                for segment in plan.segments
                for _ in range(segment.sequences)
            ]
            index = torch.tensor(granularities, device=step.device)
            step.index_add_(0, index, statistics[:, [0, 3]].to(step.dtype))
        if self.topology.data_size > 1:
            dist.all_reduce(step, group=self.topology.data_group)
        self._sums += step

    def take(self) -> dict[str, float]:
        """Mean loss in nats per token of every granularity that ran; starts anew."""
        sums = self._sums.tolist()
        self._sums.zero_()
        pairs = zip(self.nesting.names, sums, strict=True)
        return {name: total / count for name, (total, count) in pairs if count}

    def state(self) -> list[list[float]]:
        return self._sums.tolist()

    def load(self, state: list[list[float]]) -> None:
        self._sums.copy_(torch.tensor(state, dtype=torch.float64))


class MetricsLog:
    """metrics.jsonl: one JSON object a line, flushed before the next step begins.

    Numbers that are not finite are null: JSON has no others. UserError where the file of a run
    that goes on cannot be read.
    """

    def __init__(self, config: Config, resumed_step: int) -> None:
        self.path = config.run.dir / "metrics.jsonl"
        self._last_step = 0
        if resumed_step == 0:
            self._set_aside()
        else:
            self._forget_after(resumed_step)
        self._file = self.path.open("a")

    def _set_aside(self) -> None:
        """Keep the lines of a run that left no checkpoint, under another name."""
        if self.path.exists() and self.path.stat().st_size:
            numbers = (n for n in itertools.count(1) if not self._earlier(n).exists())
            self.path.rename(self._earlier(next(numbers)))

    def _earlier(self, number: int) -> Path:
        return self.path.with_name(f"metrics.{number}.jsonl")

    def _forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run does again, and a line cut short by a kill."""
        if not self.path.exists():
            return
        whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        kept = []
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                if (at := json.loads(line)["step"]) <= step:
                    kept.append(line + b"\n")
                    self._last_step = at
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.path}, line {number} is not a line of metrics: {line[:40]!r}; mend or "
                    "delete that line, or move the file away"
                ) from None
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(self.path)

    def reaches(self, step: int) -> bool:
        """Whether the line of that step was there already when this was opened."""
        return self._last_step == step

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json_text(line) + "\n")
        self._file.flush()

    @staticmethod
    def events(line: Mapping[str, Any]) -> list[tuple[str, float, int]]:
        """A line as (name, value, step) events for TensorBoard and W&B."""
        events = []
        for key, value in line.items():
            if isinstance(value, Mapping):
                numbers = ((name, v) for name, v in value.items() if not isinstance(v, str))
                events += [(f"{key}/{name}", float(v), line["step"]) for name, v in numbers]
            elif isinstance(value, int | float) and key != "step":
                events.append((f"training/{key}", float(value), line["step"]))
        return events

    def close(self) -> None:
        self._file.close()
