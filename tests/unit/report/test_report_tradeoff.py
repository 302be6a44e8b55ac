"""The charts over size: where the points lie, and what is said of the mixes."""

from __future__ import annotations

import json
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest

from matformer_dist.report.charts import Chart, PointHover
from matformer_dist.report.inputs import Run, read_run
from matformer_dist.report.points import Points, frontier, join_points
from matformer_dist.report.shapes import Evaluated, Evaluation
from matformer_dist.report.tradeoff import consistency_charts, loss_charts
from tests.unit.report.synthetic_search import best_within, write_search


def evaluated(name: str, kind: Any, parameters: int, loss: float, agreement: float) -> Evaluated:
    return Evaluated(
        submodel=name,
        kind=kind,
        parameters=parameters,
        non_embedding_parameters=parameters // 2,
        flops=2 * parameters,
        loss=loss,
        agreement=agreement,
    )


SUBMODELS = [
    evaluated("S", "uniform", 100, 3.0, 0.80),
    evaluated("S:3,M:1", "heuristic", 125, 2.84, 0.82),  # the line is at 2.9
    evaluated("S:1,M:3", "heuristic", 175, 2.71, 0.85),  # 2.7
    evaluated("M", "uniform", 200, 2.6, 0.90),
    evaluated("S:2,XL:2", "mix", 250, 2.53, 0.91),  # 2.55
    evaluated("L", "uniform", 300, 2.5, 0.95),
    evaluated("XL", "uniform", 500, 2.4, 1.0),
]


def run_with(directory: Path, submodels: list[Evaluated]) -> tuple[Run, Points]:
    run = read_run(directory)
    evaluation = Evaluation.model_validate({"step": 300, "tokens": 1, "submodels": submodels})
    run = replace(run, evaluation=evaluation)
    return run, join_points(run)


def positions(chart: Chart) -> list[tuple[float, float, int]]:
    assert isinstance(chart.hover, PointHover)
    return chart.hover.positions


def test_mixes_are_compared_with_the_line_between_their_neighbours(make_run: Any) -> None:
    loss, flops = loss_charts(*run_with(make_run(), SUBMODELS))
    assert " ".join(loss.notes) == (
        "2 of 3 submodels that were never trained lie below the line between granularities; on "
        "average such a submodel is 0.0233 nats below it."
    )
    assert flops.title == "Loss against FLOPs" and flops.notes == []


def test_charts_place_submodels_alike_by_parameters(make_run: Any) -> None:
    run, points = run_with(make_run(), SUBMODELS)
    across = [[left for left, _, _ in positions(chart)] for chart in
              (loss_charts(run, points)[0], *consistency_charts(run, points))]  # fmt: skip
    assert len(across) == 2  # no KL in this evaluation
    assert across[0] == across[1]
    first, last = across[0][0], across[0][-1]
    assert across[0][3] == pytest.approx(first + (last - first) * 100 / 400, abs=1e-3)


def test_tooltips_lie_on_their_dots(make_run: Any) -> None:
    run, points = run_with(make_run(), SUBMODELS)
    for chart in (*loss_charts(run, points), *consistency_charts(run, points)):
        left, top, number = positions(chart)[-1]
        assert points.shown[number].submodel == "XL"
        dot = next(mark for mark in reversed(chart.marks) if mark.style == "dot big")
        x, y = (float(part) for part in dot.path.removeprefix("M").removesuffix("h0").split(","))
        assert (x / 1000, y / 1000) == pytest.approx((left, top), abs=1e-3)


def test_agreement_is_drawn_in_percent(make_run: Any) -> None:
    (agreement,) = consistency_charts(*run_with(make_run(), SUBMODELS))
    assert [label for _, label in agreement.y.labels()] == ["80", "85", "90", "95", "100"]
    assert agreement.unit == "% of tokens"


def test_kl_is_drawn_where_it_was_measured(make_run: Any) -> None:
    found = [item.model_copy(update={"kl": 1 - item.agreement}) for item in SUBMODELS]
    _, kl = consistency_charts(*run_with(make_run(), found))
    assert kl.title == "KL from XL against size"
    assert len(positions(kl)) == len(found)


def test_losses_that_are_not_numbers_are_not_drawn(make_run: Any) -> None:
    submodels = [
        evaluated("S", "uniform", 100, nan, 0.8),
        evaluated("S:3,M:1", "heuristic", 125, 2.84, 0.82),
        evaluated("M", "uniform", 200, 2.6, 0.9),
    ]
    run, points = run_with(make_run(), submodels)
    loss, _ = loss_charts(run, points)
    (agreement,) = consistency_charts(run, points)
    assert [points.shown[number].submodel for *_, number in positions(loss)] == ["S:3,M:1", "M"]
    assert [label.name for label in loss.labels] == ["M"]
    assert len(positions(agreement)) == 3
    assert loss.notes == []


def test_points_of_both_files_are_joined_where_they_are_of_the_same_tokens(make_run: Any) -> None:
    directory = make_run()
    written = write_search(directory)
    evaluation = json.loads((directory / "evaluation.json").read_text())
    searched = {one["submodel"]: one["loss"] for one in written["measured"]}
    alone = {one["submodel"]: one["loss"] for one in evaluation["submodels"]} | searched
    points = join_points(read_run(directory))
    assert {point.submodel: point.loss for point in points.shown} == alone
    assert points.notes == []
    heuristic = {one["submodel"] for one in evaluation["submodels"] if one["kind"] == "heuristic"}
    assert {point.submodel for point in points.shown if point.kind == "heuristic"} == heuristic
    sizes = [point.parameters for point in points.shown]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("search", "shown", "note"),
    [
        ({"step": 200}, "evaluation", "slices.json is of step 200, older than"),
        ({"step": 400}, "slices", "evaluation.json is of step 300, older than"),
        ({"units": 77}, "slices", "on the 77 validation tokens of the search"),
    ],
)
def test_files_that_are_not_comparable_are_not_mixed(
    make_run: Any, search: dict[str, Any], shown: str, note: str
) -> None:
    directory = make_run()
    written = write_search(directory, **search)
    evaluation = json.loads((directory / "evaluation.json").read_text())
    losses = {
        "slices": [one["loss"] for one in written["measured"]],
        "evaluation": [one["loss"] for one in evaluation["submodels"]],
    }
    points = join_points(read_run(directory))
    assert sorted(point.loss for point in points.shown) == sorted(losses[shown])
    assert len(points.notes) == 1 and note in points.notes[0]
    assert len(points.searched) == len(written["measured"])


def test_frontier_matches_a_look_at_everything(make_run: Any) -> None:
    directory = make_run()
    written = write_search(directory, mixes=200)["measured"]
    points = join_points(read_run(directory)).searched
    found = frontier(points, lambda point: point.latency_ms)
    budgets = sorted(one["latency_ms"] for one in written)
    best = dict.fromkeys(best_within(written, "latency_ms", b)["submodel"] for b in budgets)
    assert [point.submodel for point in found] == list(best)


def test_search_is_compared_with_every_mix_of_the_heuristic(make_run: Any) -> None:
    directory = make_run()
    written = write_search(directory, mixes=200)["measured"]
    run = read_run(directory)
    points = join_points(run)
    heuristic = [point for point in points.searched if point.kind == "heuristic"]
    gains = [
        point.loss - best_within(written, "parameters", point.parameters)["loss"]
        for point in heuristic
    ]
    assert sum(gain > 0 for gain in gains) not in (0, len(gains))
    assert loss_charts(run, points)[0].notes[-1] == (
        f"Within the parameters of each of the heuristic's {len(gains)} mixes, another measured "
        f"submodel is better for {sum(gain > 0 for gain in gains)}, by up to {max(gains):.4f} nats."
    )
