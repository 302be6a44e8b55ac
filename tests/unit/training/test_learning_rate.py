from __future__ import annotations

import pytest

from matformer_dist.config import ScheduleConfig
from matformer_dist.training.engine import learning_rate


def rates(steps: int, **settings: object) -> list[float]:
    schedule = ScheduleConfig.model_validate(settings)
    return [learning_rate(schedule, 1.0, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    assert rates(5, kind="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_begins_at_the_peak_and_every_step_learns() -> None:
    found = rates(12, kind="cosine", warmup_steps=2)
    assert found[2] == 1.0 and found[7] == pytest.approx(0.5)
    assert found[2:] == sorted(found[2:], reverse=True) and found[-1] > 0
    assert rates(1000, kind="cosine", min_lr=0.1)[-1] == pytest.approx(0.1, abs=1e-4)


def test_wsd_stays_then_falls_linearly() -> None:
    found = rates(10, kind="wsd", decay_fraction=0.4, min_lr=0.2)
    assert found[:7] == [1.0] * 7
    assert found[7:] == pytest.approx([0.8, 0.6, 0.4])
