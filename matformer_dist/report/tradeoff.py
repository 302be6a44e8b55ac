"""The charts over size: what each submodel of the universal model costs, and how good it is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import isfinite, nan

from matformer_dist.report import text
from matformer_dist.report.charts import Axis, Chart, Hover, Key
from matformer_dist.report.curves import NEUTRAL, color
from matformer_dist.report.inputs import Evaluated, Evaluation, Run

_STYLES = {"uniform": "dot", "heuristic": "ring", "mix": "square"}
_NAMES = {"uniform": "trained granularity", "heuristic": "Mix'n'Match", "mix": "other mix"}


def tradeoff_charts(run: Run, evaluation: Evaluation) -> list[Chart]:
    """Loss and agreement against parameters, on one and the same parameter axis.

    Nothing where fewer than two submodels were evaluated: a point shows no trade-off.
    """
    found = sorted(evaluation.submodels, key=lambda item: item.parameters)
    if len(found) < 2:
        return []
    x = Axis.around((item.parameters for item in found), pad=0.05, ticks=4)
    widest = run.nesting.names[-1]
    charts = [_scatter(run, found, x, "Loss against size", "nats per token", lambda s: s.loss, -10)]
    if len(run.nesting) > 1:
        title = f"Agreement with {widest} against size"
        charts.append(_scatter(run, found, x, title, "% of tokens", _agreement_percent, 10))
    note = _against_line(found)
    charts[0].notes = [note] if note else []
    return charts


def _agreement_percent(item: Evaluated) -> float:
    return 100 * item.agreement


def _scatter(
    run: Run,
    found: Sequence[Evaluated],
    x: Axis,
    title: str,
    unit: str,
    value_of: Callable[[Evaluated], float],
    label_shift_px: int,
) -> Chart:
    y = Axis.around((value_of(item) for item in found), pad=0.1)
    chart = Chart(title, unit, x, y, x_title="parameters", height_px=320)
    uniform = [item for item in found if item.kind == "uniform"]
    chart.line([(item.parameters, value_of(item)) for item in uniform], NEUTRAL, "dashed")
    for kind in ("mix", "heuristic"):
        points = [(item.parameters, value_of(item)) for item in found if item.kind == kind]
        chart.dots(points, "var(--mix)", _STYLES[kind])
    for item in uniform:
        chart.dots([(item.parameters, value_of(item))], color(run, item.submodel), "dot big")
    chart.label_points(
        [(i.submodel, (i.parameters, value_of(i)), color(run, i.submodel)) for i in uniform],
        label_shift_px,
    )
    kinds = {item.kind for item in found}
    chart.keys = [Key(_STYLES[kind], _NAMES[kind]) for kind in _NAMES if kind in kinds]
    if len(uniform) > 1:
        chart.keys.append(Key("dashed", "line between granularities"))
    said = ", ".join(f"{i.submodel} {text.fixed(value_of(i))}" for i in uniform)
    chart.summary = f"{title}, {unit}: {len(found)} submodels; {said}"
    chart.hover = _hover(chart, found, value_of)
    return chart


def _hover(
    chart: Chart, found: Sequence[Evaluated], value_of: Callable[[Evaluated], float]
) -> Hover:
    hover = Hover(head=[])
    for item in found:
        if isfinite(value_of(item)):
            rows = [
                ["parameters", text.compact(item.parameters)],
                ["loss", text.fixed(item.loss)],
                ["agreement", text.percent(item.agreement)],
            ]
            hover.add(*chart.place((item.parameters, value_of(item))), item.submodel, rows)
    return hover


def _against_line(found: Sequence[Evaluated]) -> str:
    """How many submodels beat the straight line between the granularities around them."""
    uniform = [item for item in found if item.kind == "uniform"]
    others = [item for item in found if item.kind != "uniform"]
    gains = [_line_loss(uniform, item.parameters) - item.loss for item in others]
    gains = [gain for gain in gains if isfinite(gain)]
    if not gains:
        return ""
    below = sum(gain > 0 for gain in gains)
    mean = sum(gains) / len(gains)
    return (
        f"{below} of {len(gains)} submodels that were never trained lie below the line between "
        f"granularities; on average such a submodel is {abs(mean):.4f} nats "
        f"{'below' if mean >= 0 else 'above'} it."
    )


def _line_loss(uniform: Sequence[Evaluated], parameters: int) -> float:
    """The loss at this size on the line between uniform submodels (by size); NaN outside."""
    right = bisect_right(uniform, parameters, key=lambda item: item.parameters)
    if not 0 < right < len(uniform):
        return nan
    low, high = uniform[right - 1], uniform[right]
    share = (parameters - low.parameters) / (high.parameters - low.parameters)
    return low.loss + share * (high.loss - low.loss)
