"""Vision encoders learn the same whatever the layout of ranks and the ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest

from matformer_dist.config import Config
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import tiny_vision_config, train_each

_SOFT = {"label_smoothing": 0.1, "mixup": 0.4, "cutmix": 1.0}
CASES: dict[str, dict[str, Any]] = {
    "joint": {"objective": {"kind": "joint", "distillation": 0.5, "z_loss": 1e-3, **_SOFT}},
    "per_sequence": {"objective": {"kind": "per_sequence", **_SOFT}},
    "mean, fixed positions": {
        "model": {"pooling": "mean", "positions": "sincos", "image_size": 8},
        "objective": {"kind": "sandwich"},
    },
}
TRAINING = {"steps": 12, "micro_batch_size": 2, "precision": "fp32"}


def layouts(
    tensor: int, stages: tuple[int, ...], *, sequence: bool = False, **training: Any
) -> dict[str, Config]:
    """Every case, "name TP ZeRO"."""
    found: dict[str, Config] = {}
    for name, sections in CASES.items():
        if sequence and tensor == 4 and name != "mean, fixed positions":
            continue  # ten rows of an image
        base = tiny_vision_config()
        for stage in stages:
            found[f"{name}|TP{tensor} ZeRO{stage}"] = tiny_vision_config(
                **{
                    **sections,
                    "model": {**base.model.model_dump(), **sections.get("model", {})},
                    "parallel": {"tensor": tensor, "sequence": sequence},
                    "training": {**TRAINING, **training},
                    "deepspeed": {"zero_optimization": {"stage": stage}},
                }
            )
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, list[dict[str, float]]]:
    """One process, ZeRO 0, operators in plain torch."""
    configs = layouts(1, (0,), operators="reference")
    history: dict[str, list[dict[str, float]]] = run_ranks(1, train_each, configs)[0]
    return history


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ranks", "configs"),
    [
        (1, layouts(1, (0, 1, 3), activation_checkpointing="selective")),
        (2, {**layouts(1, (2,)), **layouts(2, (3,), sequence=True)}),
        (
            4,
            {
                **layouts(2, (0, 1), activation_checkpointing="full"),
                **layouts(4, (3,)),
                **layouts(4, (0,), sequence=True),
            },
        ),
    ],
    ids=["1", "2", "4"],
)
def test_losses_and_gradient_norms_match_one_process(
    ranks: int, configs: dict[str, Config], alone: dict[str, list[dict[str, float]]]
) -> None:
    """TP 1, 2 and 4, ZeRO 0 to 3, cut rows, recomputation, data-parallel ranks, soft targets."""
    for histories in run_ranks(ranks, train_each, configs, timeout_s=900):
        for name, history in histories.items():
            expected = alone[f"{name.split('|')[0]}|TP1 ZeRO0"]
            assert len(history) == 12
            for step, (found, wanted) in enumerate(zip(history, expected, strict=True)):
                assert found == pytest.approx(wanted, rel=1e-5), (name, step)
