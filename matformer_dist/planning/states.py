"""What DeepSpeed (0.19) holds of the weights on one rank: weights, gradients, optimizer states.

Legend: P parameters of the rank before ZeRO cuts them, D data-parallel ranks, B elements of the
buffer that gradients are sent from, e bytes of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from matformer_dist.planning.gathering import gathering_of
from matformer_dist.planning.layout import PlannedRun

_SUMMED = 500_000_000  # fp32 gradients that DeepSpeed's bf16 optimizer sends in one piece


@dataclass(frozen=True)
class States:
    """Bytes on the device; `gradients` always, the others beside them at their time."""

    weights: int
    optimizer: int
    gradients: int = 0
    gathered: int = 0  # weights, while a pass runs
    carried: int = 0  # gradients from micro-batch to micro-batch
    bucket: int = 0  # what the backward pass allocates when it begins
    gradient_bytes: int = 0  # of an element, from when its gradient comes to when it is reduced
    reduced: int = 0  # gradients and buffers when the last ones are reduced
    stepped: int = 0  # the same in the optimizer's step
    offloaded: int = 0


def states_of(run: PlannedRun) -> States:
    """Of a step behind the first."""
    stage = run.config.zero_stage
    if stage == 0:
        states = _without_zero(run)
    elif stage == 3:
        states = _stage_3(run)
    elif run.sums_in_fp32:
        states = _bf16_stage_1(run)
    else:
        states = _stage_1_and_2(run)
    return _to_host(states, run)


def _without_zero(run: PlannedRun) -> States:
    whole = 4 * run.parameters
    carried = whole if run.micro_batches > 1 else 0
    # All gradients are flattened into one more copy to be reduced, even on a single rank.
    return States(
        whole, 2 * whole, carried=carried, gradient_bytes=4, reduced=2 * whole, stepped=whole
    )


def _bf16_stage_1(run: PlannedRun) -> States:
    """Gradients go into an fp32 sum as they come; it is rounded to be sent."""
    whole, D = run.parameters, run.data_size
    joined = 4 * whole if whole <= _SUMMED else 0  # several tensors are copied into one
    return States(
        weights=2 * whole,
        optimizer=12 * whole // D,
        gradients=4 * whole,
        reduced=joined + 2 * whole,
        stepped=2 * whole if D > 1 else 0,
    )


def _stage_1_and_2(run: PlannedRun) -> States:
    e, whole, D = run.element_bytes, run.parameters, run.data_size
    bucket = e * run.bucket_elements
    cuts = run.config.zero_stage == 2 or e == 2
    accumulates = run.micro_batches > 1
    part = 4 * whole // D  # of the gradients' fp32 sum
    carried = 0
    if accumulates:
        carried = part if cuts else e * whole + bucket
    came = e * whole + bucket
    if cuts:
        # A bf16 gradient's piece in a rank's part is made fp32 before it is added to the sum.
        largest = min(run.matrices["ffn"] // run.config.model.n_layers, whole // D) * (e == 2)
        came += (part if accumulates or e == 2 else 0) + 4 * largest
    return States(
        weights=e * whole,
        optimizer=12 * whole // D,
        carried=carried,
        bucket=bucket if cuts or not accumulates else 0,
        gradient_bytes=e,
        reduced=came,
        stepped=e * whole + part if e == 2 or D == 1 else 4 * whole,
    )


def _stage_3(run: PlannedRun) -> States:
    e, whole, D = run.element_bytes, run.parameters, run.data_size
    return States(
        weights=e * whole // D,
        optimizer=12 * whole // D,
        gradients=4 * whole // D + e * run.bucket_elements,
        gathered=e * gathering_of(run).live,
        stepped=4 * whole // D,
    )


def _to_host(states: States, run: PlannedRun) -> States:
    moved = 0
    if run.config.offloads("optimizer"):
        moved += states.optimizer
        states = replace(states, optimizer=0)
    if run.config.offloads("param"):
        moved += states.weights
        states = replace(states, weights=0)
    return replace(states, offloaded=moved)
