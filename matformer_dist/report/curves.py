"""The charts over training steps: losses, and what separates granularities."""

from __future__ import annotations

from math import inf, isfinite, nan

from matformer_dist.report import series, text
from matformer_dist.report.charts import Axis, Chart, Hover, Key
from matformer_dist.report.inputs import Run
from matformer_dist.report.series import Series

DRAWN_POINTS = 400  # of a curve; more would not be seen
TOOLTIPS = 240
LEADING_PX = 360  # height of what the section begins with
NEUTRAL = "var(--muted)"


def color(run: Run, name: str) -> str:
    """The CSS colour of a granularity; submodels that are none of them share a neutral one."""
    names = run.nesting.names
    return f"var(--g{names.index(name)})" if name in names else NEUTRAL


def curves(run: Run, field: str) -> dict[str, Series]:
    """(step, value) per granularity name of one of the per-name fields, narrowest first."""
    found: dict[str, Series] = {name: [] for name in run.nesting.names}
    for line in run.metrics:
        for name, value in getattr(line, field).items():
            found.setdefault(name, []).append((line.step, value))
    return {name: values for name, values in found.items() if values}


def loss_chart(run: Run) -> Chart:
    """Training loss (light, smoothed) and validation loss (dotted) of every granularity."""
    trained, validated = curves(run, "train_loss"), curves(run, "val_loss")
    window = smoothing_window(len(run.metrics))
    smoothed = {name: series.smooth(values, window) for name, values in trained.items()}
    chart = Chart(
        title="Training and validation loss" if validated else "Training loss",
        unit=f"nats per {run.unit}",
        x=steps_axis(run),
        y=Axis.around(
            (
                value
                for values in (*smoothed.values(), *validated.values())
                for step, value in values
                if len(run.metrics) < 20 or step > run.last.step / 20
            ),
            ticks=7,
        ),
        height_px=LEADING_PX,
    )
    for name, values in smoothed.items():
        style = "thin" if validated else "line"
        chart.line(series.thin(values, DRAWN_POINTS), color(run, name), style)
    for name, values in validated.items():
        kept = series.thin(values, DRAWN_POINTS)
        chart.line(kept, color(run, name))
        if len(kept) <= 60:
            chart.dots(kept, color(run, name))
    if validated:
        chart.keys = [Key("thin", "training"), Key("line", "validation")]
    _label_last(run, chart, validated or smoothed)
    columns = {"training": smoothed} | ({"validation": validated} if validated else {})
    chart.hover = _hover(run, chart, columns)
    chart.notes = _loss_notes(chart, window, smoothed, validated)
    return chart


def smoothing_window(lines: int) -> int:
    """An odd number of neighbours, about a fiftieth of all lines."""
    return lines // 100 * 2 + 1


def _loss_notes(
    chart: Chart, window: int, smoothed: dict[str, Series], validated: dict[str, Series]
) -> list[str]:
    notes = []
    if window > 1:
        notes.append(f"Training loss: centred mean over {window:,} logged lines.")
    longest = max((len(values) for values in smoothed.values()), default=0)
    if longest > DRAWN_POINTS:
        notes.append(f"{DRAWN_POINTS} of {longest:,} points are drawn.")
    drawn = (*smoothed.values(), *validated.values())
    above = [step for points in drawn for step, loss in points if chart.y.high < loss < inf]
    if above:
        notes.append(f"The first steps, up to {max(above):,}, rise above the frame.")
    return notes


def broken_losses(run: Run) -> str:
    """One sentence where losses were not finite, else nothing."""
    steps = [
        line.step
        for line in run.metrics
        if not all(map(isfinite, (*line.train_loss.values(), *line.val_loss.values())))
    ]
    if not steps:
        return ""
    return (
        f"A loss was not a finite number in {len(steps):,} of {len(run.metrics):,} logged lines, "
        f"first at step {steps[0]:,}, last at step {steps[-1]:,}; the curves have gaps there."
    )


def gap_chart(run: Run) -> Chart | None:
    """Validation loss above the widest granularity's, over steps."""
    validated = curves(run, "val_loss")
    widest = run.nesting.names[-1]
    if widest not in validated or len(validated) < 2:
        return None
    reference = dict(validated.pop(widest))
    gaps = {
        name: [(step, value - reference.get(step, nan)) for step, value in values]
        for name, values in validated.items()
    }
    return _evaluated_chart(run, gaps, f"Validation loss above {widest}", f"nats per {run.unit}", 3)


def accuracy_chart(run: Run) -> Chart | None:
    """Share of validation images that each granularity classifies rightly, over steps."""
    accuracies = curves(run, "val_accuracy")
    if not run.is_vision or not accuracies:
        return None
    shares = _percent(accuracies)
    return _evaluated_chart(run, shares, "Validation accuracy", "% of images, top-1", 1, LEADING_PX)


def agreement_chart(run: Run) -> Chart | None:
    """Share of predictions where a granularity's first choice is the widest's, over steps."""
    shares = _percent(curves(run, "val_agreement"))
    widest = run.nesting.names[-1]
    shares.pop(widest, None)
    if not shares:
        return None
    return _evaluated_chart(run, shares, f"Agreement with {widest}", f"% of {run.units}", 1)


def _percent(shares: dict[str, Series]) -> dict[str, Series]:
    return {name: [(step, 100 * share) for step, share in of] for name, of in shares.items()}


def _evaluated_chart(
    run: Run, lines: dict[str, Series], title: str, unit: str, digits: int, height_px: int = 220
) -> Chart:
    values = [value for points in lines.values() for _, value in points]
    ticks = 4 if height_px < LEADING_PX else 7
    chart = Chart(
        title, unit, steps_axis(run), Axis.around(values, ticks=ticks), height_px=height_px
    )
    for name, points in lines.items():
        kept = series.thin(points, DRAWN_POINTS)
        chart.line(kept, color(run, name))
        if len(kept) <= 40:
            chart.dots(kept, color(run, name))
    _label_last(run, chart, lines, digits)
    chart.hover = _hover(run, chart, {"": lines}, digits)
    return chart


def steps_axis(run: Run) -> Axis:
    return Axis(0.0, float(max(run.last.step, 1)), ticks=4)


def _label_last(run: Run, chart: Chart, lines: dict[str, Series], digits: int = 3) -> None:
    """Name every line at its last finite value, and say those values in the summary."""
    ends = []
    for name, points in lines.items():
        value = next((value for _, value in reversed(points) if isfinite(value)), nan)
        ends.append((name, text.fixed(value, digits), value, color(run, name)))
    chart.label_ends(ends)
    said = ", ".join(f"{name} {value}" for name, value, _, _ in ends)
    chart.summary = f"{chart.title} over steps, {chart.unit}; last values: {said}"


def _hover(run: Run, chart: Chart, columns: dict[str, dict[str, Series]], digits: int = 3) -> Hover:
    """Rows are names, columns kinds of values; each shows what was known at that step."""
    names = list(dict.fromkeys(name for lines in columns.values() for name in lines))
    seen = {step for lines in columns.values() for points in lines.values() for step, _ in points}
    units = {line.step: line.units for line in run.metrics}
    evaluated = [(line.step, float(line.step)) for line in run.metrics if line.val_loss]
    hover = Hover(head=["", *columns], colors=[color(run, name) for name in names])
    for step, _ in series.thin([(step, 0.0) for step in sorted(seen)], TOOLTIPS):
        title = f"step {step:,} · {text.compact(units[step])} {run.units}"
        validation = series.latest(evaluated, step)
        if "validation" in columns and isfinite(validation) and validation != step:
            title += f" · validation of step {validation:,.0f}"
        rows = [
            [name, *(text.fixed(series.latest(lines.get(name, []), step), digits)
                     for lines in columns.values())]
            for name in names
        ]  # fmt: skip
        hover.add(chart.x.share(step), None, title, rows)
    return hover
