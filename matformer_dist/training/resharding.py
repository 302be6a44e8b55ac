"""Load a checkpoint into an engine of another layout: tensor-parallel degree, ranks, ZeRO stage.

Every rank reads, weight after weight, what it is to hold, straight out of the files of the other
layout (checkpoints/universal.py): nothing is converted on disk first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from matformer_dist.checkpoints.memory import FreshMemory, ReusedMemory
from matformer_dist.errors import UserError
from matformer_dist.parallel.topology import TensorParallel, Topology


class _Slot(NamedTuple):
    """Where the optimizer of this rank keeps a part of a weight in fp32."""

    name: str
    start: int  # of the part, in the tensor-parallel rank's share of the weight
    size: int
    master: Tensor  # the optimizer's parameter that holds it, among others
    offset: int  # in that


class Shares(Protocol):
    """Weights, and Adam's moments of them, as any layout of ranks stores them."""

    @property
    def moments(self) -> Sequence[str]:
        """Names of those that there are."""

    @property
    def optimizer_steps(self) -> int:
        """That the moments are of."""

    @property
    def fresh(self) -> Collection[str]:
        """Weights that stay as the engine has them."""

    def share(
        self, name: str, state: str, tensor: TensorParallel, *, memory: FreshMemory
    ) -> Tensor:
        """What a rank stores of a state of a weight."""


def load_other_layout(
    engine: Any,
    source: Shares,
    topology: Topology,
    advance: Callable[[str], None] = lambda _: None,
) -> None:
    """Put weights and, where the checkpoint has them, moments into DeepSpeed's fresh `engine`.

    `advance` is told the name of every weight that is done. UserError for an optimizer on NVMe.
    """
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if getattr(zero, "swap_optimizer", False):
        raise UserError(
            "weights of another layout or run cannot be loaded with "
            "deepspeed.zero_optimization.offload_optimizer.device nvme; use cpu"
        )
    if stage == 3:
        zero.checkpoint_event_prologue()
    optimizer = zero if stage == 0 else zero.optimizer
    moments: dict[Tensor, dict[str, Tensor]] = {}
    memory = ReusedMemory()
    with torch.no_grad():
        for slot in _SLOTS[stage](engine, topology):
            if slot.name in source.fresh:
                continue
            part = slice(slot.offset, slot.offset + slot.size)

            def copy_to(target: Tensor, state: str, slot: _Slot = slot, part: slice = part) -> None:
                share = source.share(slot.name, state, topology.tensor, memory=memory).flatten()
                target.view(-1)[part].copy_(share[slot.start : slot.start + slot.size])

            copy_to(slot.master, "fp32")
            for key in source.moments:
                states = moments.setdefault(slot.master, {})
                if key not in states:
                    states[key] = torch.zeros_like(slot.master)
                copy_to(states[key], key)
            advance(slot.name)
    for master, states in moments.items():
        optimizer.state[master] = {"step": _step(optimizer, source, master), **states}
    _update_weights(stage, zero)


def _step(optimizer: Any, source: Shares, master: Tensor) -> Tensor | int:
    """The optimizer's steps, as it keeps them."""
    if isinstance(optimizer, torch.optim.AdamW):
        return torch.tensor(float(source.optimizer_steps), device=master.device)
    return source.optimizer_steps  # DeepSpeedCPUAdam


def _whole_weights(engine: Any, _: Topology) -> Iterator[_Slot]:
    for name, parameter in engine.module.named_parameters():
        yield _Slot(name, 0, parameter.numel(), parameter, 0)


def _ranges(engine: Any, _: Topology) -> Iterator[_Slot]:
    """Flat groups of which each data-parallel rank holds a range of elements."""
    groups = engine.optimizer.optimizer.param_groups
    for name, parameter in engine.module.named_parameters():
        mapping = parameter._hp_mapping
        if mapping is not None:  # else all of it lies on other ranks
            (master,) = groups[mapping.param_group_index]["params"]
            ours, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield _Slot(name, ours.start, ours.numel, master, flat.start)


def _parts(engine: Any, topology: Topology) -> Iterator[_Slot]:
    """Flat sub-groups of equal parts of each weight, the last part padded."""
    zero = engine.optimizer
    names = {parameter.ds_id: name for name, parameter in engine.module.named_parameters()}
    for group, master in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            start = min(topology.data_rank * size, parameter.ds_numel)
            held = min(size, parameter.ds_numel - start)
            yield _Slot(names[parameter.ds_id], start, held, master, offset)
            offset += size


_SLOTS = {0: _whole_weights, 1: _ranges, 2: _ranges, 3: _parts}


def _update_weights(stage: int, zero: Any) -> None:
    """Make the weights that the model computes with those of the optimizer."""
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()
