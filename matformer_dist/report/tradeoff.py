"""The charts over size: what each submodel of the universal model costs, and how good it is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, nan

from matformer_dist.report import text
from matformer_dist.report.charts import Axis, Chart, Key, PointHover
from matformer_dist.report.curves import NEUTRAL, color
from matformer_dist.report.inputs import Run
from matformer_dist.report.points import Point, Points, best_within, frontier

_BIG_RINGS = 60  # of more, they would hide what is near
Value = Callable[[Point], float]
_KEYS = {
    "uniform": Key("dot", "trained granularity"),
    "heuristic": Key("ring", "Mix'n'Match by the paper's heuristic", "var(--heuristic)"),
    "mix": Key("faint", "other mixes, measured"),
}


def loss_charts(run: Run, points: Points) -> list[Chart]:
    """Loss against parameters and against FLOPs, on one and the same axis of losses.

    Nothing where fewer than two submodels were measured: a point shows no trade-off.
    """
    if len(points.shown) < 2:
        return []
    charts = _against_costs(run, points, "Loss", f"nats per {run.unit}", _loss, -10)
    charts[0].notes = [
        note for note in (_against_line(points.shown), _against_search(points)) if note
    ]
    return charts


def accuracy_charts(run: Run, points: Points) -> list[Chart]:
    """The same of a vision encoder's top-1 accuracy, where it was measured."""
    measured = any(isfinite(point.accuracy) for point in points.shown)
    if not run.is_vision or not measured or len(points.shown) < 2:
        return []
    return _against_costs(run, points, "Accuracy", "% of images, top-1", _accuracy_percent, 10)


def _against_costs(
    run: Run, points: Points, name: str, unit: str, value: Value, label_shift_px: int
) -> list[Chart]:
    return [
        _scatter(run, points, _Look(title, unit, value, label_shift_px, x_title, cost, billion))
        for title, x_title, cost, billion in (
            (f"{name} against parameters", "parameters", _parameters, "B"),
            (f"{name} against FLOPs", f"FLOPs {run.one_unit}", _flops, "G"),
        )
    ]


def consistency_charts(run: Run, points: Points) -> list[Chart]:
    """Agreement with XL, and the KL from it, against parameters; nothing for one granularity."""
    if len(points.shown) < 2 or len(run.nesting) < 2:
        return []
    widest = run.nesting.names[-1]
    looks = [
        _Look(f"Agreement with {widest} against size", f"% of {run.units}", _agreement_percent, 10),
        _Look(f"KL from {widest} against size", f"nats per {run.unit}", _kl, -10),
    ]
    return [
        _scatter(run, points, look)
        for look in looks
        if any(isfinite(look.value(point)) for point in points.shown)
    ]


@dataclass(frozen=True)
class _Look:
    """What a scatter shows, and how."""

    title: str
    unit: str
    value: Value
    label_shift_px: int
    x_title: str = "parameters"
    cost: Value = lambda point: point.parameters
    billion: str = "B"


def _loss(point: Point) -> float:
    return point.loss


def _kl(point: Point) -> float:
    return point.kl


def _parameters(point: Point) -> float:
    return point.parameters


def _flops(point: Point) -> float:
    return point.flops


def _accuracy_percent(point: Point) -> float:
    return 100 * point.accuracy


def _agreement_percent(point: Point) -> float:
    return 100 * point.agreement


def _scatter(run: Run, points: Points, look: _Look) -> Chart:
    shown = sorted(points.shown, key=look.cost)
    x = Axis.around(map(look.cost, shown), pad=0.05, ticks=4, billion=look.billion)
    y = Axis.around(map(look.value, shown), pad=0.1)
    chart = Chart(look.title, look.unit, x, y, x_title=look.x_title, height_px=320)
    of_kind = {kind: [point for point in shown if point.kind == kind] for kind in _KEYS}

    def placed(some: Sequence[Point]) -> list[tuple[float, float]]:
        return [(look.cost(point), look.value(point)) for point in some]

    uniform = of_kind["uniform"]
    chart.dots(placed(of_kind["mix"]), NEUTRAL, "faint")
    chart.line(placed(uniform), NEUTRAL, "dashed")
    chart.keys = [key for kind, key in _KEYS.items() if of_kind[kind]]
    rings = of_kind["heuristic"]
    style = "ring" if len(rings) <= _BIG_RINGS else "ring small"
    chart.dots(placed(rings), "var(--heuristic)", style)
    if points.searched and look.value in (_loss, _accuracy_percent):
        best = frontier(shown, look.cost)
        chart.dots(placed([point for point in best if point.kind == "mix"]), "var(--mix)")
        if look.value is _loss:
            chart.line(placed(best), "var(--mix)", "line")
            chart.keys.append(Key("line", "frontier of all measured", "var(--mix)"))
        else:  # a search goes by loss, so the best of these would be the luckiest
            chart.keys.append(Key("dot", "mix on the frontier of losses", "var(--mix)"))
    for point in uniform:
        chart.dots(placed([point]), color(run, point.submodel), "dot big")
    chart.label_points(
        [(p.submodel, (look.cost(p), look.value(p)), color(run, p.submodel)) for p in uniform],
        look.label_shift_px,
    )
    if len(uniform) > 1:
        chart.keys.append(Key("dashed", "line between granularities"))
    said = ", ".join(f"{p.submodel} {text.fixed(look.value(p))}" for p in uniform)
    chart.summary = f"{look.title}, {look.unit}: {len(shown)} submodels; {said}"
    chart.hover = _hover(chart, points, shown, look)
    return chart


def _hover(chart: Chart, points: Points, shown: Sequence[Point], look: _Look) -> PointHover:
    numbers, hover = points.numbered(), PointHover()
    for point in shown:
        if isfinite(look.value(point)):
            hover.add(*chart.place((look.cost(point), look.value(point))), numbers[point])
    return hover


def _against_line(shown: Sequence[Point]) -> str:
    """How many submodels beat the straight line between the granularities around them."""
    uniform = [point for point in shown if point.kind == "uniform"]
    others = [point for point in shown if point.kind != "uniform"]
    gains = [_line_loss(uniform, point.parameters) - point.loss for point in others]
    gains = [gain for gain in gains if isfinite(gain)]
    if not gains:
        return ""
    below = sum(gain > 0 for gain in gains)
    mean = sum(gains) / len(gains)
    return (
        f"{below:,} of {len(gains):,} submodels that were never trained lie below the line between "
        f"granularities; on average such a submodel is {abs(mean):.4f} nats "
        f"{'below' if mean >= 0 else 'above'} it."
    )


def _line_loss(uniform: Sequence[Point], parameters: int) -> float:
    """The loss at this size on the line between uniform submodels (by size); NaN outside."""
    right = bisect_right(uniform, parameters, key=lambda point: point.parameters)
    if not 0 < right < len(uniform):
        return nan
    low, high = uniform[right - 1], uniform[right]
    share = (parameters - low.parameters) / (high.parameters - low.parameters)
    return low.loss + share * (high.loss - low.loss)


def _against_search(points: Points) -> str:
    """What the search found within the parameters of each submodel of the heuristic."""
    if not points.searched:
        return ""
    best = frontier(points.shown, _parameters)
    gains = []
    for point in points.shown:
        if point.kind == "heuristic" and isfinite(point.loss):
            within = best_within(best, _parameters, point.parameters)
            assert within is not None  # it is itself within
            gains.append(point.loss - within.loss)
    if not gains:
        return ""
    better = sum(gain > 0 for gain in gains)
    return (
        f"Within the parameters of each of the heuristic's {len(gains)} mixes, another measured "
        f"submodel is better for {better}, by up to {max(gains):.4f} nats."
    )
