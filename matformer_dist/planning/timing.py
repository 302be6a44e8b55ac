"""Seconds of a step on a given kind of machine: arithmetic at an assumed MFU, and collectives.

A ring collective over n ranks moves (n - 1) / n of the tensor over each link, an all-reduce twice
that (Thakur et al. 2005). Its latency is taken as log2 n rounds: where latency matters, libraries
change to trees. A group inside one node uses the node's links; one that spans nodes is as slow as
the network, of which each device has a share of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from matformer_dist.counting import ffn_matrices
from matformer_dist.planning.communication import Collective, traffic
from matformer_dist.planning.layout import PlannedRun
from matformer_dist.planning.machines import Machine

_ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what is waited for; nothing of it overlaps."""

    compute: float
    recompute: float
    tensor_collectives: float
    data_collectives: float

    @property
    def total(self) -> float:
        return self.compute + self.recompute + self.tensor_collectives + self.data_collectives


def step_time(run: PlannedRun, machine: Machine) -> StepTime:
    forward = run.forward_flops_per_step
    rate = machine.peak_tflops * 1e12 * machine.assumed_mfu * run.world_size
    # A block runs again up to the last values that its backward pass needs: without its last GEMM.
    inputs = ffn_matrices(run.config.model) - 1
    again = forward.attention + forward.ffn * inputs / (inputs + 1)
    if run.config.training.activation_checkpointing != "full":
        again = 0
    waits = {"tensor": 0.0, "data": 0.0}
    for collective in traffic(run):
        waits[collective.group] += collective_seconds(collective, run, machine)
    return StepTime(
        compute=3 * forward.total / rate,
        recompute=again / rate,
        tensor_collectives=waits["tensor"],
        data_collectives=waits["data"],
    )


def collective_seconds(collective: Collective, run: PlannedRun, machine: Machine) -> float:
    """Of all `collective.count` of them."""
    size = run.tensor if collective.group == "tensor" else run.data_size
    # Tensor-parallel ranks are neighbours; data-parallel ones lie `tensor` apart.
    span = run.tensor if collective.group == "tensor" else run.world_size
    node = machine.devices_per_node
    inside = run.world_size <= node or (span <= node and node % span == 0)
    speed = machine.link_gb_per_second if inside else machine.network_gb_per_second
    latency_us = machine.link_latency_us if inside else machine.network_latency_us
    rounds = _ROUNDS[collective.operation]
    moved = rounds * (size - 1) / size * collective.bytes / (speed * 1e9)
    return moved + collective.count * rounds * math.ceil(math.log2(size)) * latency_us / 1e6
