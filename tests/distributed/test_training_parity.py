"""The layout of ranks and the ZeRO stage must not change what is learnt."""

from __future__ import annotations

from typing import Any

import pytest

from matformer_dist.config import Config
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import tiny_config, train_each

OBJECTIVES: dict[str, dict[str, Any]] = {
    "joint": {"kind": "joint", "distillation": 0.5, "z_loss": 1e-3, "temperature": 2.0},
    "per_sequence": {"kind": "per_sequence", "z_loss": 1e-3},
    "sampled": {"kind": "sampled"},
    "sandwich": {"kind": "sandwich", "distillation": 1.0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-query, tied": {
        "n_kv_heads": 4,
        "n_heads": 8,
        "kv_channels": 6,
        "tied_embeddings": True,
    },
    "paper": {"ffn": "gelu", "norm": "layernorm", "tied_embeddings": True},
}


def layouts(
    steps: int,
    tensors: tuple[int, ...],
    stages: tuple[int, ...],
    operators: str = "auto",
    cover: bool = False,
) -> dict[str, Config]:
    """Every objective and model variant, "name TP ZeRO".

    cover: of the objectives, joint at every stage, each of the others at two of them, all pairs of
    stage and TP and of objective and stage among them.
    """
    training = tiny_config().training.model_dump(exclude_none=True)
    cases = {name: {"objective": objective} for name, objective in OBJECTIVES.items()}
    for name, model in VARIANTS.items():
        cases[name] = {"model": {**tiny_config().model.model_dump(), **model}}
    return {
        f"{name}|TP{tensor} ZeRO{stage}": tiny_config(
            parallel={"tensor": tensor},
            deepspeed={"zero_optimization": {"stage": stage}},
            training={**training, "operators": operators, "steps": steps},
            **sections,
        )
        for name, sections in cases.items()
        for tensor in tensors
        for stage in stages
        if _is_run(name, tensor, stage, cover)
    }


def _is_run(name: str, tensor: int, stage: int, cover: bool) -> bool:
    if name in VARIANTS:
        return stage in (0, 3)
    place = list(OBJECTIVES).index(name)
    return not cover or place == 0 or (place + stage + tensor // 2) % 2 == 0


@pytest.fixture(scope="module")
def steps(pytestconfig: pytest.Config) -> int:
    return 20 if pytestconfig.getoption("--long") else 8


@pytest.fixture(scope="module")
def alone(steps: int) -> dict[str, list[dict[str, float]]]:
    """One process, ZeRO 0, operators in plain torch: what every layout must match, compiled."""
    configs = layouts(steps, (1,), (0,), operators="reference")
    history: dict[str, list[dict[str, float]]] = run_ranks(1, train_each, configs)[0]
    return history


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("ranks", "tensors"), [(1, (1,)), (2, (1,)), (4, (2, 4))])
def test_losses_and_gradient_norms_match_one_process(
    ranks: int,
    tensors: tuple[int, ...],
    steps: int,
    alone: dict[str, list[dict[str, float]]],
    pytestconfig: pytest.Config,
) -> None:
    """TP 1, 2, 4 x ZeRO 0 to 3 x every objective, over data-parallel ranks where there are more.

    On four ranks, which take minutes, only a cover of these; all with --long, for more steps.
    """
    cover = ranks == 4 and not pytestconfig.getoption("--long")
    configs = layouts(steps, tensors, (0, 1, 2, 3), cover=cover)
    by_rank = run_ranks(ranks, train_each, configs, timeout_s=1500)
    for histories in by_rank:
        for name, history in histories.items():
            expected = alone[f"{name.split('|')[0]}|TP1 ZeRO0"]
            assert len(history) == steps
            for step, (found, wanted) in enumerate(zip(history, expected, strict=True)):
                assert found == pytest.approx(wanted, rel=1e-5), (name, step)
