"""A joint step issues the collectives of one ordinary step: bigger, not more."""

from __future__ import annotations

from collections import Counter

import torch

from matformer_dist.config import Config
from matformer_dist.parallel.topology import initialize
from matformer_dist.training.engine import Engine, build_model
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import VOCAB, passes, synthetic_batches, tiny_config


def count_collectives(configs: list[Config]) -> list[dict[str, int]]:
    """Collectives, by name, of the second optimizer step of each run."""
    topology = initialize(configs[0].parallel.tensor)
    found = []
    for config in configs:
        engine = Engine(config, build_model(config, VOCAB, topology), topology)
        batches = synthetic_batches(config, topology)
        engine.train_step(batches, passes(config, engine, topology, 0), 1e-3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.train_step(batches, passes(config, engine, topology, 1), 1e-3)
        names = [event.name for event in profile.events()]
        found.append(dict(Counter(name for name in names if name.startswith("c10d::"))))
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
