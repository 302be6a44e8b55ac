"""A joint step issues the collectives of one ordinary step: bigger, not more.

Sequence parallelism makes an all-gather and a reduce-scatter of every all-reduce.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

from matformer_dist.config import Config
from matformer_dist.parallel.topology import initialize
from matformer_dist.training.engine import Engine, build_model
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import (
    SEQ_LEN,
    VOCAB,
    passes,
    synthetic_batches,
    tiny_config,
)


def count_collectives(configs: list[Config]) -> list[dict[str, int]]:
    """Collectives, by name, of the second optimizer step of each run."""
    return [
        dict(Counter(event.name for event in events if event.name.startswith("c10d::")))
        for events in profiled_steps(configs)
    ]


def exchanges(configs: list[Config]) -> list[dict[tuple[str, int], int]]:
    """How many collectives of a name took so many elements, likewise; of sequence parallelism."""
    prefix = "_c10d_functional::"
    return [
        dict(
            Counter(
                (event.name.removeprefix(prefix), math.prod(event.input_shapes[0]))
                for event in events
                if event.name.startswith(prefix) and not event.name.endswith("wait_tensor")
            )
        )
        for events in profiled_steps(configs)
    ]


def profiled_steps(configs: list[Config]) -> list[Any]:
    """The profiler's events of the second optimizer step of each run."""
    topology = initialize(configs[0].parallel.tensor)
    found = []
    for config in configs:
        engine = Engine(config, build_model(config, VOCAB, topology), topology)
        batches = synthetic_batches(config, topology)
        engine.train_step(batches, passes(config, engine, topology, 0), 1e-3)
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, record_shapes=True) as profile:
            engine.train_step(batches, passes(config, engine, topology, 1), 1e-3)
        found.append(profile.events())
    return found


def test_joint_step_issues_as_many_collectives_as_xl_alone() -> None:
    parallel = {"tensor": 2}
    joint = tiny_config(parallel=parallel, objective={"kind": "joint", "distillation": 0.5})
    xl = tiny_config(parallel=parallel, nesting={"widths": [64]})
    for ranks in (2, 4):  # without and with data parallelism
        for of_joint, of_xl in run_ranks(ranks, count_collectives, [joint, xl]):
            assert of_joint == of_xl
            # Two a layer and the embedding's, forward; two a layer and the head's, backward.
            micro_batches = 4 // (ranks // 2)
            assert of_xl["c10d::allreduce_"] >= 10 * micro_batches
            assert of_xl["c10d::_allgather_base_"] >= micro_batches  # the loss' one a chunk


def test_sequence_parallelism_exchanges_what_was_all_reduced() -> None:
    """Each all-reduce of R rows becomes a reduce-scatter of R and an all-gather of R/T; rows are
    gathered again for the weights' gradients, and norms' weights, whole on all ranks, are reduced.
    """
    T, D, L = 2, 32, 2  # ranks, d_model, layers
    batch = {"global_batch_size": 1}
    cut: dict[str, Any] = {"parallel": {"tensor": T, "sequence": True}, "training": batch}
    xl = tiny_config(**cut, nesting={"widths": [64]})
    joint = tiny_config(**cut, nesting={"widths": [16, 32, 48, 64]})
    of_xl, of_joint = run_ranks(T, exchanges, [xl, joint])[0]
    R = SEQ_LEN
    sublayers = 2 * L  # attentions and FFNs
    ends = 2  # embedding and head
    assert of_xl == {
        ("reduce_scatter_tensor", R * D): 2 * sublayers + ends,
        ("all_gather_into_tensor", R // T * D): 2 * sublayers + ends + sublayers,
        ("all_reduce", D): sublayers + 1,
    }
    # Rows of four granularities; embedding and the first attention run before they are repeated,
    # and the repetition deals them anew.
    early_sums, early_gathers = 1 + 2, 1 + 3
    assert of_joint == {
        ("reduce_scatter_tensor", 4 * R * D): 2 * sublayers + ends - early_sums,
        ("reduce_scatter_tensor", R * D): early_sums + 1,
        ("all_gather_into_tensor", 4 * R // T * D): 3 * sublayers + ends - early_gathers,
        ("all_gather_into_tensor", R // T * D): early_gathers + 1,
        ("all_reduce", D): sublayers + 1,
    }
