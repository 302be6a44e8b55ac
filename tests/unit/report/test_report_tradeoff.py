"""The charts over size: where the points lie, and what is said of the mixes."""

from __future__ import annotations

from typing import Any

import pytest

from matformer_dist.report.inputs import Evaluated, Evaluation, read_run
from matformer_dist.report.tradeoff import tradeoff_charts


def evaluated(name: str, kind: Any, parameters: int, loss: float, agreement: float) -> Evaluated:
    return Evaluated(
        submodel=name,
        kind=kind,
        parameters=parameters,
        non_embedding_parameters=parameters // 2,
        flops_per_token=2 * parameters,
        loss=loss,
        agreement=agreement,
    )


@pytest.fixture
def evaluation() -> Evaluation:
    submodels = [
        evaluated("S", "uniform", 100, 3.0, 0.80),
        evaluated("S:3,M:1", "heuristic", 125, 2.84, 0.82),  # the line is at 2.9
        evaluated("S:1,M:3", "heuristic", 175, 2.71, 0.85),  # 2.7
        evaluated("M", "uniform", 200, 2.6, 0.90),
        evaluated("S:2,XL:2", "mix", 250, 2.53, 0.91),  # 2.55
        evaluated("L", "uniform", 300, 2.5, 0.95),
        evaluated("XL", "uniform", 500, 2.4, 1.0),
    ]
    return Evaluation(step=300, tokens=1, submodels=submodels)


def test_mixes_are_compared_with_the_line_between_their_neighbours(
    make_run: Any, evaluation: Evaluation
) -> None:
    loss, _ = tradeoff_charts(read_run(make_run()), evaluation)
    assert " ".join(loss.notes) == (
        "2 of 3 submodels that were never trained lie below the line between granularities; on "
        "average such a submodel is 0.0233 nats below it."
    )


def test_both_charts_place_submodels_alike_by_parameters(
    make_run: Any, evaluation: Evaluation
) -> None:
    loss, agreement = tradeoff_charts(read_run(make_run()), evaluation)
    assert loss.hover and agreement.hover
    across = [left for left, _, _, _ in loss.hover.positions]
    assert across == [left for left, _, _, _ in agreement.hover.positions]
    first, last = across[0], across[-1]
    assert across[3] == pytest.approx(first + (last - first) * 100 / 400, abs=1e-3)


def test_tooltips_lie_on_their_dots(make_run: Any, evaluation: Evaluation) -> None:
    for chart in tradeoff_charts(read_run(make_run()), evaluation):
        assert chart.hover
        left, top, name, _ = chart.hover.positions[-1]
        assert name == "XL" and top is not None
        dot = next(mark for mark in reversed(chart.marks) if mark.style == "dot big")
        x, y = (float(part) for part in dot.path.removeprefix("M").removesuffix("h0").split(","))
        assert (x / 1000, y / 1000) == pytest.approx((left, top), abs=1e-3)


def test_agreement_is_drawn_in_percent(make_run: Any, evaluation: Evaluation) -> None:
    _, agreement = tradeoff_charts(read_run(make_run()), evaluation)
    assert [label for _, label in agreement.y.labels()] == ["80", "85", "90", "95", "100"]
    assert agreement.unit == "% of tokens"


def test_losses_that_are_not_numbers_are_not_drawn(make_run: Any) -> None:
    submodels = [
        evaluated("S", "uniform", 100, float("nan"), 0.8),
        evaluated("S:3,M:1", "heuristic", 125, 2.84, 0.82),
        evaluated("M", "uniform", 200, 2.6, 0.9),
    ]
    found = Evaluation(step=300, tokens=1, submodels=submodels)
    loss, agreement = tradeoff_charts(read_run(make_run()), found)
    assert loss.hover and agreement.hover
    assert [name for _, _, name, _ in loss.hover.positions] == ["S:3,M:1", "M"]
    assert [label.name for label in loss.labels] == ["M"]
    assert len(agreement.hover.positions) == 3
    assert loss.notes == []
