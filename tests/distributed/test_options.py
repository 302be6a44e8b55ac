"""Options that change where and how a step is computed must not change what is learnt."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import pytest

from matformer_dist.parallel.topology import initialize
from matformer_dist.training.engine import Engine, build_model
from matformer_dist.training.objective import Objective
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import (
    VOCAB,
    synthetic_batches,
    tiny_config,
    train_each,
)

History = list[dict[str, float]]


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": {"stage": stage, **settings}}}


TENSOR_PARALLEL: dict[str, dict[str, Any]] = {
    "plain": zero(1),
    "bf16, ZeRO 1": {**zero(1), "training": {"precision": "bf16"}},
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
DATA_PARALLEL: dict[str, dict[str, Any]] = {
    "plain": zero(1),
    "offload, ZeRO 1": zero(1, **OFFLOAD),
    "offload, ZeRO 2": zero(2, **OFFLOAD),
    "offload, ZeRO 3": zero(3, **OFFLOAD, offload_param={"device": "cpu"}),
    "checkpointing, ZeRO 3": {**zero(3), "training": {"activation_checkpointing": "full"}},
    "bf16, ZeRO 1": {**zero(1), "training": {"precision": "bf16"}},
    "bf16, ZeRO 2": {**zero(2), "training": {"precision": "bf16"}},
    "bf16, ZeRO 3": {**zero(3), "training": {"precision": "bf16"}},
}


def histories(cases: dict[str, dict[str, Any]], tensor: int) -> dict[str, History]:
    """Of two ranks; sections of a case are merged over the tiny configuration."""
    configs = {
        name: tiny_config(
            parallel={"tensor": tensor}, **{k: _merged(k, v) for k, v in sections.items()}
        )
        for name, sections in cases.items()
    }
    found: dict[str, History] = run_ranks(2, train_each, configs)[0]
    return found


def _merged(name: str, values: dict[str, Any]) -> dict[str, Any]:
    if name != "training":
        return values
    return {**tiny_config().training.model_dump(exclude_none=True), **values}


def _assert_close(found: History, wanted: History, relative: float) -> None:
    assert len(found) == len(wanted) == 20
    for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one == pytest.approx(other, rel=relative), step


def test_options_match_plain_training_over_tensor_parallel_ranks() -> None:
    found = histories(TENSOR_PARALLEL, tensor=2)
    _assert_close(found["bf16, ZeRO 1"], found["plain"], 0.05)


def test_bf16_gradients_are_summed_in_fp32() -> None:
    """512 equal micro-batches: a sum in bf16 would no longer grow after 256 of them."""
    norms = {count: run_ranks(1, norm_of_equal_micro_batches, count)[0] for count in (1, 512)}
    assert norms[512] == pytest.approx(norms[1], rel=0.01)


def norm_of_equal_micro_batches(count: int) -> float:
    training = {"precision": "bf16", "global_batch_size": count}
    config = tiny_config(**zero(1), training=_merged("training", training))
    topology = initialize(1)
    engine = Engine(config, build_model(config, VOCAB, topology), topology)
    tokens, targets = next(synthetic_batches(config, topology))
    plan = Objective(config.objective, config.granularities, config.model.n_layers, 5).plan(
        0, 0, 1, 1
    )
    engine.train_step(repeat((tokens, targets)), repeat(plan), 1e-3)
    return engine.grad_norm


def test_options_match_plain_training_over_data_parallel_ranks() -> None:
    found = histories(DATA_PARALLEL, tensor=1)
    for name, history in found.items():
        if name.startswith("offload"):
            _assert_close(history, found["plain"], 1e-4)  # DeepSpeed's own Adam
        elif name.startswith("checkpointing"):
            _assert_close(history, found["plain"], 1e-6)
        elif name.startswith("bf16"):
            _assert_close(history, found["plain"], 0.05)
            _assert_close(history, found["bf16, ZeRO 1"], 2e-3)  # sums are ordered differently
