"""The text of `matformer plan`: size, memory, traffic, time and cost of a run; layouts for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from matformer_dist.config import Config
from matformer_dist.config_file import UNREAD_DATA
from matformer_dist.counting import check_outputs, count_parameters, flops_per_unit
from matformer_dist.errors import UserError
from matformer_dist.planning.communication import traffic
from matformer_dist.planning.layout import PlannedRun
from matformer_dist.planning.machines import Machine
from matformer_dist.planning.memory import memory_by_moment
from matformer_dist.planning.proposal import (
    Candidate,
    candidates,
    changed,
    evaluate,
    least_need,
    reasons,
    stages,
)
from matformer_dist.planning.timing import collective_seconds
from matformer_dist.units import one_of, short_bytes, short_count, short_number, short_time

IF_OPEN: dict[str, dict[str, Any]] = {  # what a plan does not depend on
    "language": {**UNREAD_DATA["language"], "data.tokenizer": "unset"},
    "vision": {
        **UNREAD_DATA["vision"], "data.validation": "unset", "checkpoint.initial": "unset",
    },
}  # fmt: skip
SWEEP = tuple(8 * 2**i for i in range(10))  # 8 to 4096


@dataclass(frozen=True)
class Order:
    """What is asked for: a run on `devices` devices of a machine, for `units`, which are tokens or
    images.
    """

    config: Config
    outputs: int  # tokens of the vocabulary, or classes
    devices: int
    machine: Machine
    units: int
    price_per_hour: float | None = None  # of a device

    @property
    def length(self) -> str:
        """In words."""
        return f"{short_count(self.units)} {self.config.unit}"


def show_plan(order: Order) -> Iterator[RenderableType]:
    """The configuration as it is, then layouts that fit."""
    config = order.config
    check_outputs(order.outputs, config.parallel.tensor)
    yield granularities_table(config, order.outputs)
    own = changed(config, order.devices)
    if own is None:
        yield f"as configured it cannot run on {order.devices} devices: {_why_not(order)}"
    else:
        run = PlannedRun(own, order.outputs, order.devices // own.parallel.tensor)
        yield from _as_configured(evaluate(run, order.machine), order)
    yield from _proposed(order)


def _why_not(order: Order) -> str:
    training, tensor = order.config.training, order.config.parallel.tensor
    data_size, rest = divmod(order.devices, tensor)
    if rest or not data_size:
        return f"they are no multiple of parallel.tensor {tensor}; use another number of either"
    unit = training.micro_batch_size * data_size
    below = training.global_batch_size // unit * unit
    near = " or ".join(str(batch) for batch in (below, below + unit) if batch)
    return (
        f"training.global_batch_size {training.global_batch_size} must be a multiple of "
        f"training.micro_batch_size {training.micro_batch_size} x {data_size} data-parallel "
        f"ranks; use {near}, or a micro-batch or number of devices that divides it"
    )


def show_sweep(order: Order, scales_batch: bool = False) -> Iterator[RenderableType]:
    """The proposed layout from 8 to 4096 devices, of the same batch or one that grows along."""
    table = Table(
        "devices", *_layout(order.config), "scaling", "MFU", order.length, "cost",
        caption=_LAYOUT_MEANS,
    )  # fmt: skip
    for column in table.columns:
        column.justify = "right"
    rate_of_one = 0.0
    for devices in SWEEP:
        config = _with_batch_for(devices, order.config) if scales_batch else order.config
        asked = replace(order, config=config, devices=devices)
        found = candidates(config, order.outputs, devices, order.machine)
        if not found:
            table.add_row(str(devices), _why_nothing_fits(asked))
            continue
        best = found[0]
        rate = _units_per_second(best) / devices
        rate_of_one = rate_of_one or rate
        table.add_row(
            str(devices),
            *_layout_cells(best),
            f"{rate / rate_of_one:.0%}",
            f"{_mfu(best, order.machine):.1%}",
            short_time(_seconds(best, order)),
            _cost(best, order),
        )
    yield table


def _with_batch_for(devices: int, config: Config) -> Config:
    """The configuration's batch is that of the sweep's first number of devices."""
    batch = config.training.global_batch_size * devices // SWEEP[0]
    training = config.training.model_copy(update={"global_batch_size": batch})
    return config.model_copy(update={"training": training})


def _layout(config: Config) -> tuple[str, ...]:
    """Columns of a layout."""
    return "TP x DP", "ZeRO", "micro", "recompute", "memory", "step", f"{config.unit}/s"


_LAYOUT_MEANS = (
    "TP x DP: ranks that share a model x ranks that share a batch; SP: rows too are cut over the "
    "former (parallel.sequence). micro: samples of a micro-batch x micro-batches of a step. "
    "recompute: training.activation_checkpointing"
)


def _layout_cells(candidate: Candidate) -> Iterator[str]:
    """Of the columns `_layout`."""
    run, training = candidate.run, candidate.run.config.training
    yield f"{run.tensor}{' SP' if run.config.parallel.sequence else ''} x {run.data_size}"
    yield str(run.config.zero_stage)
    yield f"{training.micro_batch_size} x {run.micro_batches}"
    yield training.activation_checkpointing
    yield short_bytes(candidate.memory.total_bytes)
    yield f"{candidate.time.total:.3g} s"
    yield short_number(_units_per_second(candidate))


def granularities_table(config: Config, outputs: int) -> Table:
    """Parameters and FLOPs of each, also what a run shows when it begins."""
    flops = f"forward FLOPs/{config.unit.removesuffix('s')}"
    table = Table("granularity", "FFN width", "parameters", "non-embedding", flops)
    for column in table.columns[1:]:
        column.justify = "right"
    for submodel in config.granularities.uniforms(config.model.n_layers):
        count = count_parameters(config.model, outputs, submodel)
        table.add_row(
            str(submodel),
            f"{submodel.widths[0]:,}",
            short_count(count.total),
            short_count(count.non_embedding),
            short_number(flops_per_unit(config.model, outputs, submodel, config.sample)),
        )
    return table


def _as_configured(candidate: Candidate, order: Order) -> Iterator[RenderableType]:
    run, machine = candidate.run, order.machine
    config = run.config
    training = config.training
    yield (
        f"as configured: {run.world_size} {machine.name} = tensor {run.tensor} x data "
        f"{run.data_size}, ZeRO {config.zero_stage}, {training.precision}; "
        f"{training.global_batch_size} {config.samples_in_words} = "
        f"{training.micro_batch_size} x {run.data_size} ranks x {run.micro_batches} micro-batches"
    )
    yield from _memory(candidate, machine)
    if traffic(run):
        yield _traffic_table(run, machine)
    yield _time_table(candidate, order)
    if training.compile:
        yield (
            "training.compile: what a compiler keeps, and gathers again, is its own choice; the "
            "time that it saves is not in the plan"
        )
    if run.config.offloads("optimizer") or run.config.offloads("param"):
        yield "the time that offloading takes, to the host and there, is not in the plan"


def _memory(candidate: Candidate, machine: Machine) -> Iterator[RenderableType]:
    moments = memory_by_moment(candidate.run)
    table = Table("memory of a rank", *moments[0].parts(), "together")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in moments:
        sizes = [*one.parts().values(), one.total_bytes]
        table.add_row(one.moment, *(short_bytes(size) for size in sizes))
    yield table
    memory = candidate.memory
    share = memory.total_bytes / machine.memory_bytes
    verdict = "fits" if memory.total_bytes <= machine.usable_bytes else "does not fit"
    yield (
        f"most is needed {memory.moment}: {short_bytes(memory.total_bytes)} of "
        f"{short_bytes(machine.memory_bytes)}, {share:.0%}: {verdict}"
    )
    if candidate.run.data_size > 1:
        yield _by_stage(candidate.run)
    if memory.offloaded_bytes:
        yield f"on the host, for each rank: {short_bytes(memory.offloaded_bytes)}"
    yield f"a checkpoint, of all ranks: {short_bytes(checkpoint_bytes(candidate.run))}"


def _by_stage(run: PlannedRun) -> Table:
    """What each ZeRO stage would leave on a rank, the largest of each part over a step."""
    table = Table("at ZeRO", "weights", "gradients", "optimizer", "most together")
    for column in table.columns:
        column.justify = "right"
    for stage in stages(run.config, run.data_size):
        other = changed(run.config, run.world_size, stage=stage)
        if other is None:
            continue
        moments = memory_by_moment(PlannedRun(other, run.outputs, run.data_size))
        parts = [max(one.parts()[part] for one in moments) for part in _OF_ZERO]
        most = max(one.total_bytes for one in moments)
        table.add_row(str(stage), *(short_bytes(size) for size in [*parts, most]))
    return table


_OF_ZERO = ("weights", "gradients", "optimizer")


def checkpoint_bytes(run: PlannedRun) -> int:
    """Of weights and optimizer states, over all ranks; what else its files hold is little."""
    stage, e = run.config.zero_stage, run.element_bytes
    states = 8 if stage == 0 else 12
    # ZeRO 3 writes the parts of the fp32 masters alone.
    weights = 0 if stage == 3 else e
    return run.tensor * run.parameters * (states + weights)


def _traffic_table(run: PlannedRun, machine: Machine) -> Table:
    table = Table("collectives of a step", "what", "over", "count", "bytes", "time")
    for column in table.columns[3:]:
        column.justify = "right"
    for one in traffic(run):
        table.add_row(
            one.operation.replace("_", "-"),
            one.what,
            f"{run.tensor if one.group == 'tensor' else run.data_size} {one.group} ranks",
            f"{one.count:,}",
            short_bytes(one.bytes),
            f"{1e3 * collective_seconds(one, run, machine):.3g} ms",
        )
    return table


def _time_table(candidate: Candidate, order: Order) -> Table:
    run, time, machine = candidate.run, candidate.time, order.machine
    flops = 3 * run.forward_flops_per_step.total
    table = Table("time", "")
    table.columns[1].justify = "right"
    unit = run.config.unit
    rows = {
        "FLOPs of a step (activated)": short_number(flops),
        f"of {one_of(unit)} trained": short_number(flops / run.units_per_step),
        f"arithmetic, at {machine.assumed_mfu:.0%} of {machine.peak_tflops:g} TFLOP/s": (
            f"{time.compute:.3g} s"
        ),
        "recomputation": f"{time.recompute:.3g} s" if time.recompute else "",
        "tensor-parallel collectives": f"{time.tensor_collectives:.3g} s",
        "data-parallel collectives": f"{time.data_collectives:.3g} s",
        "a step, nothing overlapped": f"{time.total:.3g} s",
        f"{unit}/s": short_number(_units_per_second(candidate)),
        "MFU": f"{_mfu(candidate, machine):.1%}",
        order.length: short_time(_seconds(candidate, order)),
        "cost": _cost(candidate, order),
    }
    for what, value in rows.items():
        if value:
            table.add_row(what, value)
    return table


def _proposed(order: Order) -> Iterator[RenderableType]:
    found = candidates(order.config, order.outputs, order.devices, order.machine)
    if not found:
        yield f"no layout fits: {_why_nothing_fits(order)}"
        return
    table = Table(
        *_layout(order.config), "MFU",
        title="layouts that fit, fastest first (to 2%)", title_justify="left",
        caption=_LAYOUT_MEANS,
    )  # fmt: skip
    for column in table.columns:
        column.justify = "right"
    for candidate in found:
        table.add_row(*_layout_cells(candidate), f"{_mfu(candidate, order.machine):.1%}")
    yield table
    yield f"proposal: {found[0].overrides}"
    for reason in reasons(found[0], order.machine):
        yield f"  {reason}"


def _why_nothing_fits(order: Order) -> str:
    least = least_need(order.config, order.outputs, order.devices, order.machine)
    if least is None:
        return (
            f"training.global_batch_size {order.config.training.global_batch_size} cannot be dealt "
            f"to {order.devices} devices; use another batch or number of devices"
        )
    return (
        f"{short_bytes(least.memory.total_bytes)} a rank at the least ({least.overrides}), of "
        f"{short_bytes(order.machine.usable_bytes)}; use more devices, or larger ones"
    )


def _units_per_second(candidate: Candidate) -> float:
    return candidate.run.units_per_step / candidate.time.total


def _mfu(candidate: Candidate, machine: Machine) -> float:
    """By activated FLOPs, collectives and recomputation counted as time lost."""
    return machine.assumed_mfu * candidate.time.compute / candidate.time.total


def _seconds(candidate: Candidate, order: Order) -> float:
    return order.units / _units_per_second(candidate)


def _cost(candidate: Candidate, order: Order) -> str:
    if order.price_per_hour is None:
        return ""
    hours = _seconds(candidate, order) / 3600 * candidate.run.world_size
    return short_number(hours * order.price_per_hour)


def check_order(devices: int | None, machine: Machine) -> None:
    """UserError where the devices of a plan, or of a sweep (None), make no whole nodes."""
    size = machine.devices_per_node
    if devices is None:
        if any(n > size and n % size for n in SWEEP):
            raise UserError(
                f"--gpus-per-node {size}: the sweep's {SWEEP[0]} to {SWEEP[-1]} devices are no "
                "whole nodes; use a power of two"
            )
    elif devices > size and devices % size:
        raise UserError(
            f"--gpus {devices} is no whole number of nodes of {size}; use a multiple of {size}, "
            "or set --gpus-per-node"
        )
