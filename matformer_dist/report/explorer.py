"""What the Mix'n'Match explorer of the page knows: the frontier of every kind of cost.

Only the best within some budget can ever be shown, so only frontiers go into the page; explorer.js
looks a budget up in them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

from matformer_dist.report import text
from matformer_dist.report.commands import extract_command
from matformer_dist.report.inputs import Run
from matformer_dist.report.points import Point, Points, cost_kinds, frontier
from matformer_dist.submodels.slices import Slice


def explorer_data(run: Run, points: Points) -> dict[str, Any] | None:
    """As JSON for explorer.js; None where no search has measured anything finite.

    `best` and `heuristic` of a kind are lists of [cost, loss, number in the page's list of
    submodels], costs rising, losses falling. `submodels` has by number what the page's list has
    not.
    """
    numbers = points.numbered()
    kinds = [found for kind in cost_kinds(run) if (found := _frontiers(points, *kind, numbers))]
    if not kinds:
        return None
    shown = {number for kind in kinds for key in ("best", "heuristic") for *_, number in kind[key]}
    return {
        "unit": run.unit,
        "names": run.nesting.names,
        "widths": run.nesting.widths,
        "kinds": kinds,
        "submodels": {
            number: _submodel(run, point) for point, number in numbers.items() if number in shown
        },
    }


def _frontiers(
    points: Points,
    kind: str,
    title: str,
    cost: Callable[[Point], float],
    numbers: dict[Point, int],
) -> dict[str, Any] | None:
    """None where this cost was measured of no submodel."""
    found = [p for p in points.searched if isfinite(p.loss) and isfinite(cost(p))]
    if not found:
        return None
    best = frontier(found, cost)
    heuristic = frontier([point for point in found if point.kind != "mix"], cost)
    return {
        "kind": kind,
        "title": title,
        "low": min(map(cost, found)),
        "high": max(map(cost, found)),
        "best": [(cost(point), point.loss, numbers[point]) for point in best],
        "heuristic": [(cost(point), point.loss, numbers[point]) for point in heuristic],
    }


def _submodel(run: Run, point: Point) -> dict[str, Any]:
    return {
        "kind": point.kind,
        "layers": point.granularities,
        "command": extract_command(run, point.submodel),
        "slices": [_slice(one) for one in _slices_of(run, point)],
    }


def _slices_of(run: Run, point: Point) -> list[Slice]:
    assert run.slices is not None
    layers = [run.nesting.widths[granularity] for granularity in point.granularities]
    return [one for one in run.slices.slices if one.widths == layers]


def _slice(one: Slice) -> list[str]:
    """Its kind and name, the heuristic it was compared with, and the interval of its gain."""
    return [one.kind, one.name, one.heuristic, text.interval(one.gain_interval)]
