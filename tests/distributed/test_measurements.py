"""What ranks measure of their steps, and which of them is named as the slowest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from matformer_dist.config import Config
from matformer_dist.parallel.collectives import around_collectives
from matformer_dist.parallel.topology import initialize
from matformer_dist.training.engine import Engine, build_model
from matformer_dist.training.measurements import Measurements, Stragglers
from matformer_dist.training.timing import PARTS
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import VOCAB, passes, synthetic_batches, tiny_config

STEPS, LINES = 2, 5
DELAY_S = 0.2  # much more than a micro-batch takes, also beside other programs


def late(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        time.sleep(DELAY_S)
        yield batch


def measure(config: Config, slow: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of metrics, and the warnings of stragglers; rank `slow` gets its data late."""
    topology = initialize(config.parallel.tensor)
    measurements, stragglers = Measurements(config, topology), Stragglers()
    clock = measurements.clock
    engine = Engine(config, build_model(config, VOCAB, topology), topology, clock)
    batches = synthetic_batches(config, topology)
    if dist.get_rank() == slow:
        batches = late(batches)
    lines, warnings = [], []
    seconds = 0.0
    method = dist.ProcessGroup.allreduce
    with around_collectives(clock.begin_communication, clock.end_communication):
        assert dist.ProcessGroup.allreduce is not method
        for step in range(STEPS * LINES):
            planned = passes(config, engine, topology, step)
            begun = time.perf_counter()
            with measurements.step(flops=10**9):
                engine.train_step(batches, planned, 1e-3)
            seconds += time.perf_counter() - begun
            time.sleep(0.5)  # between steps: of no step
            if step % STEPS == STEPS - 1:
                lines.append({**measurements.take(), "wall_ms": seconds / STEPS * 1e3})
                seconds = 0.0
                warnings.append(stragglers.look_at(lines[-1]))
    assert dist.ProcessGroup.allreduce is method
    dist.barrier()  # collectives are as they were
    engine.train_step(batches, passes(config, engine, topology, 0), 1e-3)
    return lines, [warning for warning in warnings if warning]


@pytest.mark.parametrize(
    ("tensor", "stage", "sequence"), [(2, 1, False), (2, 1, True), (1, 3, False)]
)
def test_the_rank_that_gets_its_data_late_is_the_slowest(
    tensor: int, stage: int, sequence: bool
) -> None:
    """Others wait for it within collectives, tensor- or data-parallel ones."""
    config = tiny_config(
        parallel={"tensor": tensor, "sequence": sequence},
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    slow = 1
    (lines, warnings), (same, _) = run_ranks(2, measure, config, slow)
    micro_batches = 4 // (2 // tensor)
    for line, other in zip(lines, same, strict=True):
        for key in ("time_ms", "slowest_rank", "memory"):
            assert line[key] == other[key]
        assert line["slowest_rank"]["rank"] == slow and line["slowest_rank"]["ratio"] > 1.15
        times = line["time_ms"]
        assert set(times) == set(PARTS) and all(value >= 0 for value in times.values())
        assert sum(times.values()) == pytest.approx(line["step_ms"])
        assert line["step_ms"] == pytest.approx(line["wall_ms"], rel=0.1)
        # A mean over ranks: one waits for its data, the other meanwhile for that one.
        waited_ms = DELAY_S * 1e3 * micro_batches / 2
        assert times["data"] > waited_ms and times["communication"] > 0.6 * waited_ms
        assert line["model_tflops_per_second"] == pytest.approx(1 / line["step_ms"])
    assert len(warnings) == 1 and warnings[0].startswith(f"rank {slow} on ")
