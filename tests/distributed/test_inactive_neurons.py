"""benchmarks.quality.inactive: what moves of neurons that a step does not run, and what stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import inactive
from matformer_dist.config_language import LanguageConfig
from matformer_dist.models.forward_pass import Pass
from matformer_dist.parallel.topology import initialize
from matformer_dist.training.engine import Engine, build_model
from matformer_dist.training.objective import Objective
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import VOCAB, synthetic_batches, tiny_config

STEPS = 12


def sampled(**sections: Any) -> LanguageConfig:
    return tiny_config(
        objective={"kind": "sampled"},
        deepspeed={"zero_optimization": {"stage": 0}},
        training={"global_batch_size": 2, "steps": STEPS},
        **sections,
    )


def train(
    config: LanguageConfig, step: Callable[..., object]
) -> Iterator[tuple[Engine, list[Pass], Callable[[], object]]]:
    """The engine, and of each step its passes and what takes it."""
    topology = initialize(1)
    engine = Engine(config, build_model(config, VOCAB, topology), topology)
    objective = Objective(config.objective, config.granularities, config.model.n_layers, 5)
    batches = synthetic_batches(config, topology)
    for number in range(STEPS):
        plans = [objective.plan(number, i, 2, 1) for i in range(2)]
        yield engine, plans, partial(step, engine, batches, iter(plans), 1e-2)


def moved_rows(is_skipping: bool) -> list[tuple[int, list[int]]]:
    """Of each step, its width, and how many rows of weights and moments changed."""
    step = inactive.step_within(inactive.skip) if is_skipping else Engine.train_step
    found = []
    for engine, plans, take in train(sampled(), step):
        before = [tensor.clone() for tensor in _rows(engine)]
        take()
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


def moved_far(optimizer: dict[str, object]) -> inactive.Moved:
    """How far XL's own neurons move in steps that run them, and in steps that do not."""
    moved: inactive.Moved = {True: [], False: []}
    step = inactive.step_within(inactive.drift(moved))
    for _, _, take in train(sampled(optimizer=optimizer), step):
        take()
    return moved


def test_neurons_that_are_not_run_drift_by_momentum_and_decay_alone() -> None:
    moved = run_ranks(1, moved_far, {"lr": 1e-2})[0]
    assert len(moved[True]) + len(moved[False]) == STEPS
    assert min(moved[True]) > 0 and max(moved[False]) > 0
    still = run_ranks(1, moved_far, {"lr": 1e-2, "betas": [0.0, 0.95], "weight_decay": 0.0})[0]
    assert min(still[True]) > 0 and max(still[False]) == 0
