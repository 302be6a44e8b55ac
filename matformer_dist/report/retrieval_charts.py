"""The charts of adaptive retrieval: what a cheaper query costs, and spaces that are not shared."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, nan

from matformer_dist.report import text
from matformer_dist.report.charts import Axis, Chart, Hover, Key, Point
from matformer_dist.report.curves import NEUTRAL
from matformer_dist.report.retrieval import Retrieval, Row

_UNIT = "% of queries"
_X_TITLE = "FLOPs of a query"
_APART, _ACROSS = "var(--p3)", "var(--p5)"
_MIXES = {"mix": "var(--mix)", "heuristic": "var(--heuristic)"}
_NAMES = {"mix": "other mixes", "heuristic": "Mix'n'Match by the paper's heuristic"}


def retrieval_charts(found: Retrieval) -> list[Chart]:
    """1-NN accuracy against FLOPs of the query encoder; a second chart for encoders trained apart.

    Nothing where fewer than two query encoders were measured on XL's gallery.
    """
    if len(found.nested) < 2:
        return []
    return [_tradeoff(found), *([_spaces(found)] if found.across else [])]


def _tradeoff(found: Retrieval) -> Chart:
    shown = [*found.nested, *found.own, *found.apart]
    uniform = [row for row in found.nested if row.entry.kind == "uniform"]
    ends = [end for row in uniform for end in row.interval_percent]
    y = Axis.around([*(row.accuracy_percent for row in shown), *ends])
    chart = _chart("1-NN accuracy against compute", shown, y)
    chart.line(_places(uniform), NEUTRAL, "dashed")
    for row in uniform:
        low, high = row.interval_percent
        chart.line([(row.flops, low), (row.flops, high)], row.color, "thin")
    _draw_mixes(chart, found.nested)
    for row in found.own:
        chart.dots(_places([row]), row.color, "ring")
    chart.dots(_places(found.apart), _APART, "square")
    for row in uniform:
        chart.dots(_places([row]), row.color, "dot big")
    names = [(row.name, (float(row.flops), row.accuracy_percent), row.color) for row in uniform]
    chart.label_points(names, 10)
    largest = found.result.largest
    chart.keys = [Key("dot", f"granularity, {largest}'s gallery")]
    chart.keys += _keys_of_mixes(found.nested)
    chart.keys += [Key("ring", "granularity, its own gallery")] if found.own else []
    chart.keys += [Key("square", "trained apart, its own gallery", _APART)] if found.apart else []
    chart.keys.append(Key("thin", "95% of a granularity's"))
    chart.notes = [f"Chance is {text.fixed(100 * found.result.chance.accuracy, 1)} %."]
    return chart


def _spaces(found: Retrieval) -> Chart:
    """From zero on, so that chance is seen."""
    shown = [*found.nested, *found.apart, *found.across]
    chance = 100 * found.result.chance.accuracy
    y = Axis.from_zero([chance, *(row.accuracy_percent for row in shown)])
    chart = _chart("Queries of one encoder, gallery of another", shown, y)
    chart.line([(chart.x.low, chance), (chart.x.high, chance)], NEUTRAL, "dashed")
    _draw_mixes(chart, found.nested)
    for row in found.nested:
        if row.entry.kind == "uniform":
            chart.dots(_places([row]), row.color, "dot big")
    chart.dots(_places(found.apart), _APART, "square")
    chart.dots(_places(found.across), _ACROSS, "square")
    chart.keys = [
        Key("dot", f"submodels, {found.result.largest}'s gallery"),
        Key("square", "trained apart, its own gallery", _APART),
        Key("square", "trained apart, another's gallery", _ACROSS),
        Key("dashed", "chance"),
    ]
    return chart


def _chart(title: str, shown: Sequence[Row], y: Axis) -> Chart:
    x = Axis.around((row.flops for row in shown), pad=0.08, ticks=4, billion="G")
    chart = Chart(title, _UNIT, x, y, x_title=_X_TITLE, height_px=320)
    said = (
        f"{row.name} on {row.gallery} {text.fixed(row.accuracy_percent, 1)}"
        for row in shown
        if row.entry.kind == "uniform"
    )
    chart.summary = f"{title}, {_UNIT}: {len(shown)} query encoders; {', '.join(said)}"
    hover = Hover(head=["", ""])
    for row in shown:
        if isfinite(row.accuracy_percent):
            place = chart.place((row.flops, row.accuracy_percent))
            cells = [[name, cell] for name, cell in row.cells if cell != text.fixed(nan)]
            hover.add(*place, f"{row.name} · gallery: {row.gallery}", cells)
    chart.hover = hover
    return chart


def _places(rows: Sequence[Row]) -> list[Point]:
    return [(row.flops, row.accuracy_percent) for row in rows]


def _draw_mixes(chart: Chart, nested: Sequence[Row]) -> None:
    for kind, color in _MIXES.items():
        chart.dots(_places([row for row in nested if row.entry.kind == kind]), color)


def _keys_of_mixes(nested: Sequence[Row]) -> list[Key]:
    kinds = {row.entry.kind for row in nested}
    return [Key("dot", _NAMES[kind], color) for kind, color in _MIXES.items() if kind in kinds]
