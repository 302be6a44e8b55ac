"""What training asked of the machine: speed, where a step's time goes, memory, the slowest rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import isfinite, nan
from typing import Any

from matformer_dist.report import series, text
from matformer_dist.report.charts import Axis, Chart, Hover, Key
from matformer_dist.report.curves import steps_axis
from matformer_dist.report.inputs import Run
from matformer_dist.report.series import Series
from matformer_dist.report.shapes import MetricsLine

BUCKETS = 160
PARTS = ("data", "forward", "loss", "backward", "optimizer", "communication", "other")
_MEMORY = {  # key of a line: its name here, colour
    "allocated_bytes": ("allocated on the GPU", "var(--accent)"),
    "reserved_bytes": ("reserved on the GPU", "var(--mix)"),
    "resident_bytes": ("resident in the process", "var(--muted)"),
}


def stretches(run: Run) -> Iterator[tuple[int, MetricsLine]]:
    """Every line with the number of steps since the one before it, which it speaks of."""
    starts = [0, *(line.step for line in run.metrics)]
    for (before, step), line in zip(pairwise(starts), run.metrics, strict=True):
        yield step - before, line


def training_seconds(run: Run) -> float:
    """Time spent in steps: every stretch between two lines at the speed logged at its end."""
    total = sum(n * line.step_ms / 1000 for n, line in stretches(run) if isfinite(line.step_ms))
    return total or nan


def time_parts(run: Run) -> list[dict[str, Any]]:
    """The parts of a mean step: name, ms, share of the whole; empty where they were not logged."""
    sums: dict[str, float] = {}
    steps = 0
    for count, line in stretches(run):
        if line.time_ms and all(map(isfinite, line.time_ms.values())):
            steps += count
            for part, time_ms in line.time_ms.items():
                sums[part] = sums.get(part, 0.0) + count * max(0.0, time_ms)
    whole = sum(sums.values())
    if not whole:
        return []
    names = [*PARTS, *(part for part in sums if part not in PARTS)]
    return [
        {
            "name": name,
            "ms": sums[name] / steps,
            "share": sums[name] / whole,
            "color": f"var(--p{min(i, len(PARTS) - 1)})",
        }
        for i, name in enumerate(names)
        if name in sums
    ]


def slowest_rank(run: Run) -> str:
    """Which rank was slowest how often, and by how much at most; nothing for a single rank."""
    said = [line.slowest_rank for line in run.metrics if line.slowest_rank]
    ratios = [one.ratio for one in said if isfinite(one.ratio)]
    if not ratios or max(ratios) <= 1:
        return ""
    (rank, host), times = Counter((one.rank, one.host) for one in said).most_common(1)[0]
    return (
        f"Most often the slowest was rank {rank} on {host}, in {times:,} of {len(said):,} lines; "
        f"the slowest rank's own work took at most {max(ratios):.2f} times the median rank's."
    )


def machine_charts(run: Run) -> list[Chart]:
    """Throughput, step time, memory, gradient norm and learning rate, where they were logged."""
    wanted: list[tuple[str, str, Callable[[MetricsLine], float]]] = [
        ("Throughput", f"{run.units} per second", lambda line: line.units_per_second),
        ("Step time", "ms", lambda line: line.step_ms),
        ("Gradient norm", "before clipping", lambda line: line.grad_norm),
        ("Learning rate", f"{run.config.schedule.kind} schedule", lambda line: line.learning_rate),
    ]
    charts = []
    for title, unit, value_of in wanted:
        values = [(line.step, value_of(line)) for line in run.metrics]
        if any(isfinite(value) for _, value in values):
            charts.append(_banded_chart(run, title, unit, values))
    memory = _memory_chart(run)
    return [*charts[:2], memory, *charts[2:]] if memory else charts


def _banded_chart(run: Run, title: str, unit: str, values: Series) -> Chart:
    found = series.buckets(values, BUCKETS)
    y = Axis.from_zero(bucket.high for bucket in found)
    chart = Chart(title, unit, steps_axis(run), y, height_px=160)
    lows = [(float(bucket.step), bucket.low) for bucket in found]
    highs = [(float(bucket.step), bucket.high) for bucket in found]
    if len(found) < len(values):
        chart.band(lows, highs, "var(--accent)")
        chart.notes = [f"Means of about {-(-len(values) // BUCKETS)} lines; band: lowest, highest."]
    chart.line([(bucket.step, bucket.mean) for bucket in found], "var(--accent)")
    last = text.compact(found[-1].mean)
    chart.summary = (
        f"{title} over steps: lowest {text.compact(min(low for _, low in lows))}, highest "
        f"{text.compact(max(high for _, high in highs))}, last {last} {unit}"
    )
    chart.hover = Hover(head=[])
    for bucket in found:
        rows = [["mean" if bucket.low < bucket.high else "value", text.compact(bucket.mean)]]
        if bucket.low < bucket.high:
            rows += [["lowest", text.compact(bucket.low)], ["highest", text.compact(bucket.high)]]
        chart.hover.add(chart.x.share(bucket.step), None, f"step {bucket.step:,}", rows)
    return chart


def _memory_chart(run: Run) -> Chart | None:
    """Largest peaks of any rank since the run began, of each kind that was logged."""
    kinds = {
        key: (name, color, values)
        for key, (name, color) in _MEMORY.items()
        if (values := [(line.step, line.memory.get(key, nan)) for line in run.metrics])
        and any(isfinite(value) for _, value in values)
    }
    if not kinds:  # as lines were before they told the kinds apart
        old = [(line.step, line.peak_memory_bytes) for line in run.metrics]
        kinds = {"": ("largest of any rank", "var(--accent)", old)}
    highest = max((v for *_, values in kinds.values() for _, v in values if isfinite(v)), default=0)
    if not highest:
        return None
    unit, size = ("GB", 1e9) if highest >= 1e9 else ("MB", 1e6)
    chart = Chart(
        "Peak memory", unit, steps_axis(run), Axis.from_zero([highest / size]), height_px=160
    )
    drawn = {
        name: (color, [(b.step, b.high / size) for b in series.buckets(values, BUCKETS)])
        for name, color, values in kinds.values()
    }
    chart.hover = Hover(head=[], colors=[color for color, _ in drawn.values()])
    for color, points in drawn.values():
        chart.line(points, color)
    chart.keys = [Key("line", name, color) for name, (color, _) in drawn.items()]
    for step in sorted({step for _, points in drawn.values() for step, _ in points}):
        rows = [
            [name, text.file_size(size * series.latest(points, step))]
            for name, (_, points) in drawn.items()
        ]
        chart.hover.add(chart.x.share(step), None, f"step {step:,}", rows)
    said = ", ".join(f"{name} {row}" for name, row in chart.hover.positions[-1][3])
    chart.summary = f"Peak memory over steps, largest of any rank; last: {said}"
    return chart
