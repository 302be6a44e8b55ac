"""Layouts that fit: TP x DP x ZeRO x micro-batch for a number of devices and their memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from matformer_dist.config import Config
from matformer_dist.counting import holds_outputs
from matformer_dist.errors import UserError
from matformer_dist.planning.layout import PlannedRun
from matformer_dist.planning.machines import Machine
from matformer_dist.planning.memory import MemoryEstimate, estimate_memory
from matformer_dist.planning.timing import StepTime, step_time
from matformer_dist.units import short_bytes

_CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout, what a rank needs in it, and how long a step takes."""

    run: PlannedRun
    memory: MemoryEstimate
    time: StepTime

    @property
    def overrides(self) -> str:
        """What makes the configuration this layout."""
        training = self.run.config.training
        return (
            f"parallel.tensor={self.run.tensor} "
            f"parallel.sequence={str(self.run.config.parallel.sequence).lower()} "
            f"training.micro_batch_size={training.micro_batch_size} "
            f"training.activation_checkpointing={training.activation_checkpointing} "
            f"deepspeed.zero_optimization.stage={self.run.config.zero_stage}"
        )


def evaluate(run: PlannedRun, machine: Machine) -> Candidate:
    return Candidate(run, estimate_memory(run), step_time(run, machine))


def candidates(config: Config, outputs: int, devices: int, machine: Machine) -> list[Candidate]:
    """The best of each TP degree and ZeRO stage that fits, fastest first.

    Of layouts whose steps take as long, to 2%, the simplest comes first: the lower ZeRO stage and
    TP degree, with less recomputation, whole rows, the larger micro-batch.
    """
    found = []
    for tensor in _tensor_sizes(devices, machine):
        for stage in stages(config, devices // tensor):
            every = _layouts(config, outputs, devices, machine, tensor, stage)
            if best := _best(every, machine):
                found.append(best)
    return sorted(found, key=_preference)


def least_need(config: Config, outputs: int, devices: int, machine: Machine) -> Candidate | None:
    """Of all layouts the one that needs least memory; None where there is no layout at all."""
    every = [
        candidate
        for tensor in _tensor_sizes(devices, machine)
        for stage in stages(config, devices // tensor)
        for candidate in _layouts(config, outputs, devices, machine, tensor, stage)
    ]
    return min(every, key=lambda candidate: candidate.memory.total_bytes, default=None)


def reasons(chosen: Candidate, machine: Machine) -> Iterator[str]:
    """Why not the simpler neighbours of a layout."""
    run = chosen.run
    tensor, stage = run.tensor, run.config.zero_stage
    micro, again = run.config.training.micro_batch_size, _checkpointing(run)
    smaller = [n for n in _tensor_sizes(run.world_size, machine) if n < tensor][-1:]
    for what, other_tensor, other_stage in (
        *((f"parallel.tensor {n}", n, stage) for n in smaller),
        (f"ZeRO {stage - 1}", tensor, stage - 1),
    ):
        if other_stage in stages(run.config, run.world_size // other_tensor):
            yield _against(chosen, machine, what, list(_layouts(
                run.config, run.outputs, run.world_size, machine, other_tensor, other_stage
            )))  # fmt: skip
    changes: list[tuple[str, dict[str, Any]]] = [
        (f"activation checkpointing {less}", {"checkpointing": less})
        for less in _CHECKPOINTING[: _CHECKPOINTING.index(again)]
    ]
    if run.config.parallel.sequence:
        changes.append(("parallel.sequence false", {"sequence": False}))
    changes.append((f"micro-batch {2 * micro}", {"micro": 2 * micro}))
    for what, change in changes:
        other = changed(run.config, run.world_size, **change)
        same = [PlannedRun(other, run.outputs, run.data_size)] if other else []
        yield _against(chosen, machine, what, [evaluate(one, machine) for one in same])


def _against(chosen: Candidate, machine: Machine, what: str, others: list[Candidate]) -> str:
    if not others:
        return f"{what}: the batch or the model does not divide so"
    best = _best(others, machine)
    if best is None:
        least = min(other.memory.total_bytes for other in others)
        return (
            f"{what}: {short_bytes(least)} a rank, more than the "
            f"{short_bytes(machine.usable_bytes)} to plan with"
        )
    ratio = best.time.total / chosen.time.total
    if len(others) > 1:
        what = f"{what}, at best with {best.overrides}"
    return f"{what}: fits, but a step takes {ratio:.2f} of the time"


def changed(
    config: Config,
    devices: int,
    tensor: int | None = None,
    sequence: bool | None = None,
    stage: int | None = None,
    micro: int | None = None,
    checkpointing: str | None = None,
) -> Config | None:
    """The configuration in another layout; None where it cannot be laid out so."""
    tree = config.model_dump(mode="json")
    training = tree["training"]
    tree["parallel"]["tensor"] = tensor or config.parallel.tensor
    if sequence is not None:
        tree["parallel"]["sequence"] = sequence
    training["micro_batch_size"] = micro or training["micro_batch_size"]
    training["activation_checkpointing"] = checkpointing or training["activation_checkpointing"]
    if stage is not None:
        zero = tree["deepspeed"].get("zero_optimization") or {}
        tree["deepspeed"] = {**tree["deepspeed"], "zero_optimization": {**zero, "stage": stage}}
    data, rest = divmod(devices, tree["parallel"]["tensor"])
    if rest or data == 0 or training["global_batch_size"] % (training["micro_batch_size"] * data):
        return None
    try:
        return type(config).model_validate(tree)
    except (ValidationError, UserError):
        return None


def _layouts(
    config: Config, outputs: int, devices: int, machine: Machine, tensor: int, stage: int
) -> Iterator[Candidate]:
    """All of a TP degree and a ZeRO stage, those that do not fit included."""
    for sequence in (False, True)[:tensor]:
        for checkpointing in _CHECKPOINTING:
            yield from _of_micro_batches(
                config, outputs, devices, machine,
                tensor=tensor, sequence=sequence, stage=stage, checkpointing=checkpointing,
            )  # fmt: skip


def _best(layouts: Iterable[Candidate], machine: Machine) -> Candidate | None:
    """Of those that fit."""
    fitting = [one for one in layouts if one.memory.total_bytes <= machine.usable_bytes]
    return min(fitting, key=_preference, default=None)


def _of_micro_batches(
    config: Config, outputs: int, devices: int, machine: Machine, tensor: int, **layout: Any
) -> Iterator[Candidate]:
    """From the smallest micro-batch on, to the first that does not fit, included."""
    micro = 1
    while micro * (devices // tensor) <= config.training.global_batch_size:
        other = changed(config, devices, tensor=tensor, micro=micro, **layout)
        if other is not None and holds_outputs(outputs, tensor):
            run = PlannedRun(other, outputs, devices // tensor)
            candidate = evaluate(run, machine)
            yield candidate
            if candidate.memory.total_bytes > machine.usable_bytes:
                return
        micro *= 2


def _tensor_sizes(devices: int, machine: Machine) -> list[int]:
    """Those with which every copy of the model lies inside a node."""
    node = min(devices, machine.devices_per_node)
    return [n for n in range(1, node + 1) if devices % n == 0 and node % n == 0]


def stages(config: Config, data_size: int) -> tuple[int, ...]:
    """Those that cut something, of those that a run may have (see deepspeed_section.py)."""
    if config.offloads("param"):
        return (3,)
    lowest = 1 if config.training.precision == "bf16" or config.offloads("optimizer") else 0
    return tuple(range(lowest, 4)) if data_size > 1 else (lowest,)


def _checkpointing(run: PlannedRun) -> str:
    return run.config.training.activation_checkpointing


def _preference(candidate: Candidate) -> tuple[Any, ...]:
    run = candidate.run
    return (
        round(math.log(candidate.time.total) / math.log(1.02)),
        run.config.zero_stage,
        run.tensor,
        _CHECKPOINTING.index(_checkpointing(run)),
        run.config.parallel.sequence,
        -run.config.training.micro_batch_size,
    )
