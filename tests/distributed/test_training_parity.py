"""The layout of ranks and the ZeRO stage must not change what is learnt."""

from __future__ import annotations

import pytest
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import tiny_config, train_each

OBJECTIVES = {
    "joint": {"kind": "joint", "distillation": 0.5, "z_loss": 1e-3, "temperature": 2.0},
    "per_sequence": {"kind": "per_sequence", "z_loss": 1e-3},
    "sampled": {"kind": "sampled"},
    "sandwich": {"kind": "sandwich", "distillation": 1.0},
}


def layouts(tensors: tuple[int, ...], stages: tuple[int, ...], **sections):
    return {
        f"{name} TP{tensor} ZeRO{stage}": tiny_config(
            objective=objective,
            parallel={"tensor": tensor},
            deepspeed={"zero_optimization": {"stage": stage}},
            **sections,
        )
        for name, objective in OBJECTIVES.items()
        for tensor in tensors
        for stage in stages
    }


@pytest.fixture(scope="module")
def alone() -> dict:
    """One process, ZeRO 0: what every layout must match."""
    return run_ranks(1, train_each, layouts((1,), (0,)))[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_losses_and_gradient_norms_match_one_process(world_size: int, alone: dict) -> None:
    tensors = tuple(t for t in (1, 2, 4) if t <= world_size)
    by_rank = run_ranks(world_size, train_each, layouts(tensors, (0, 1, 2, 3)), timeout_s=1500)
    for histories in by_rank:
        for name, history in histories.items():
            expected = alone[f"{name.split()[0]} TP1 ZeRO0"]
            assert len(history) == 20
            for step, (found, wanted) in enumerate(zip(history, expected, strict=True)):
                assert found == pytest.approx(wanted, rel=1e-5), (name, step)
