"""benchmarks.quality.skipping: a step changes the neurons that it ran, and no others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.quality import skipping
from matformer_dist.parallel.topology import initialize
from matformer_dist.training.engine import Engine, build_model
from matformer_dist.training.objective import Objective
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import VOCAB, synthetic_batches, tiny_config


def moved_rows(is_skipping: bool) -> list[tuple[int, list[int]]]:
    """Of each step, its width, and how many rows of weights and moments changed."""
    config = tiny_config(
        objective={"kind": "sampled"},
        deepspeed={"zero_optimization": {"stage": 0}},
        training={"global_batch_size": 2, "steps": 12},
    )
    topology = initialize(1)
    engine = Engine(config, build_model(config, VOCAB, topology), topology)
    objective = Objective(config.objective, config.granularities, config.model.n_layers, 5)
    batches = synthetic_batches(config, topology)
    step: Callable[..., object] = skipping.train_step if is_skipping else Engine.train_step
    found = []
    for number in range(12):
        plans = [objective.plan(number, i, 2, 1) for i in range(2)]
        before = [tensor.clone() for tensor in _rows(engine)]
        step(engine, batches, iter(plans), 1e-2)
        after = _rows(engine)
        if len(before) == len(after):  # the first step makes the moments
            changed = [int((a != b).any(dim=1).sum()) for a, b in zip(before, after, strict=True)]
            found.append((max(plans[0].segments[0].submodel.widths), changed))
    return found


def _rows(engine: Engine) -> list[Tensor]:
    state = engine.deepspeed.optimizer.state
    weights = [
        w for layer in engine.deepspeed.module.layers for w in (layer.ffn.w_in, layer.ffn.w_out)
    ]
    moments = [state[w][name] for w in weights if w in state for name in ("exp_avg", "exp_avg_sq")]
    return [torch.as_tensor(tensor.data) for tensor in (*weights, *moments)]


def test_only_the_prefix_that_was_run_moves() -> None:
    steps = run_ranks(1, moved_rows, True)[0]
    assert len({width for width, _ in steps}) > 2
    for width, changed in steps:
        assert changed == [width] * len(changed)
    without = run_ranks(1, moved_rows, False)[0]
    assert any(max(changed) > width for width, changed in without)
