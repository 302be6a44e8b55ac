"""Activation checkpointing and torch.compile, over whole and cut rows, do not change the losses."""

from __future__ import annotations

from typing import Any

import pytest

from matformer_dist.config import Config
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import tiny_config, train_each

STEPS = 4
SELECTIVE = {"activation_checkpointing": "selective"}
FULL = {"activation_checkpointing": "full"}
COMPILED = {"compile": True}
# name: training's settings, whether rows are cut, ZeRO's settings
Case = tuple[dict[str, Any], bool, dict[str, Any]]
PLAIN: Case = ({}, False, {"stage": 1})
CHECKPOINTED: dict[str, Case] = {
    "selective": (SELECTIVE, False, {"stage": 1}),
    "full": (FULL, False, {"stage": 0}),
    "selective, cut": (SELECTIVE, True, {"stage": 0}),
    "full, cut": (FULL, True, {"stage": 1}),
    # Norms' weights too are taken apart, and come together when the norms are made again.
    "selective, cut, ZeRO 3": (
        SELECTIVE, True, {"stage": 3, "stage3_param_persistence_threshold": 0},
    ),
    "full, cut, ZeRO 3": (FULL, True, {"stage": 3, "stage3_param_persistence_threshold": 0}),
}  # fmt: skip
COMPILING: dict[str, Case] = {
    "compiled": (COMPILED, False, {"stage": 1}),
    "compiled, selective": ({**COMPILED, **SELECTIVE}, False, {"stage": 1}),
    "compiled, full": ({**COMPILED, **FULL}, False, {"stage": 1}),
    "compiled, cut": (COMPILED, True, {"stage": 1}),
    "compiled, cut, selective": ({**COMPILED, **SELECTIVE}, True, {"stage": 1}),
    "compiled, cut, full": ({**COMPILED, **FULL}, True, {"stage": 1}),
}


def configured(case: Case, tensor: int, objective: str) -> Config:
    training, sequence, zero = case
    return tiny_config(
        objective={"kind": objective},
        parallel={"tensor": tensor, "sequence": sequence},
        training={"steps": STEPS, "global_batch_size": 2, **training},
        deepspeed={"zero_optimization": zero},
    )


def check(ranks: int, tensor: int, cases: dict[str, Case], objective: str) -> None:
    configs = {
        name: configured(case, tensor, objective)
        for name, case in {"plain": PLAIN, **cases}.items()
    }
    histories = run_ranks(ranks, train_each, configs, timeout_s=1500)[0]
    expected = histories.pop("plain")
    for name, history in histories.items():
        assert len(history) == len(expected) == STEPS
        for step, (found, wanted) in enumerate(zip(history, expected, strict=True)):
            assert found == pytest.approx(wanted, rel=1e-5), (name, step)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("ranks", "tensor", "objective"), [(4, 2, "joint"), (4, 4, "joint"), (2, 2, "per_sequence")]
)
def test_checkpointing_matches_keeping_everything(ranks: int, tensor: int, objective: str) -> None:
    check(ranks, tensor, CHECKPOINTED, objective)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("tensor", "names"),
    [(2, tuple(COMPILING)), (4, ("compiled, selective", "compiled, cut, full"))],
)
def test_compiled_layers_match_plain_ones(tensor: int, names: tuple[str, ...]) -> None:
    check(tensor, tensor, {name: COMPILING[name] for name in names}, "joint")
