"""Long series made short enough to draw: smoothing, thinning and buckets. No drawing here.

A series is a list of (step, value) with steps increasing; NaN marks a value that was not finite.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import isfinite, nan
from typing import NamedTuple, TypeAlias

Series: TypeAlias = list[tuple[int, float]]


class Bucket(NamedTuple):
    step: int  # the last of the bucket
    mean: float
    low: float
    high: float


def smooth(series: Series, window: int) -> Series:
    """Centred mean over `window` (odd) neighbours; NaN stays NaN and is left out of the means.

    Near the start the window shrinks evenly on both sides, so that the steep fall of a young run
    is not bent; near the end it only loses what is not there, so that the curve stays calm.
    """
    finite = [isfinite(value) for _, value in series]
    sums = [0.0, *accumulate(v if ok else 0.0 for (_, v), ok in zip(series, finite, strict=True))]
    counts = [0, *accumulate(finite)]
    smoothed: Series = []
    for i, (step, _) in enumerate(series):
        reach = min(window // 2, i)
        low, high = i - reach, min(i + reach + 1, len(series))
        mean = (sums[high] - sums[low]) / (counts[high] - counts[low]) if finite[i] else nan
        smoothed.append((step, mean))
    return smoothed


def thin(series: Series, limit: int) -> Series:
    """At most `limit` evenly chosen points, the first and the last among them."""
    if len(series) <= limit:
        return series
    last = len(series) - 1
    return [series[round(i * last / (limit - 1))] for i in range(limit)]


def buckets(series: Series, limit: int) -> list[Bucket]:
    """At most `limit` runs of neighbours with their mean, lowest and highest finite value."""
    series = [(step, value) for step, value in series if isfinite(value)]
    size = max(1, -(-len(series) // limit))
    found = []
    for start in range(0, len(series), size):
        chunk = series[start : start + size]
        values = [value for _, value in chunk]
        found.append(Bucket(chunk[-1][0], sum(values) / len(values), min(values), max(values)))
    return found


def latest(series: Sequence[tuple[int, float]], step: int) -> float:
    """The value at `step`, or the last one before it; NaN where there is none."""
    position = bisect_right(series, step, key=lambda point: point[0])
    return series[position - 1][1] if position else nan
