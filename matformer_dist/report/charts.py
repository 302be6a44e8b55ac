"""Geometry of a chart: axes, marks and labels, ready for the template to write as inline SVG.

Marks live in a square of 1000 x 1000 that the browser stretches over the plot, while strokes and
dots keep their size; text is HTML, placed by shares of the plot. So one drawing serves every
screen, in the font size of the page, and takes its colours from the theme's CSS variables.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import ceil, floor, isfinite, log10

from markupsafe import Markup

LABEL_GAP_PX = 17
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high`, with about `ticks` round numbers on it."""

    low: float
    high: float
    ticks: int = 5
    billion: str = "B"  # "G" for units of physics

    @classmethod
    def around(
        cls, values: Iterable[float], pad: float = 0.06, ticks: int = 5, billion: str = "B"
    ) -> Axis:
        """An axis that holds all finite values, with `pad` of its length free at both ends."""
        finite = [value for value in values if isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        room = pad * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - room, high + room, ticks, billion)

    @classmethod
    def from_zero(cls, values: Iterable[float], pad: float = 0.06, ticks: int = 4) -> Axis:
        high = max((value for value in values if isfinite(value)), default=0.0)
        return cls(0.0, high * (1 + pad) if high > 0 else 1.0, ticks)

    def share(self, value: float) -> float:
        """Where on the axis, 0 at low and 1 at high; a little beyond for what is not shown."""
        return min(4.0, max(-3.0, (value - self.low) / (self.high - self.low)))

    def labels(self) -> list[tuple[float, str]]:
        """(share, text) of the ticks."""
        power = 10.0 ** floor(log10((self.high - self.low) / self.ticks))
        step = min(
            (m * power for m in (1, 2, 2.5, 5, 10)),
            key=lambda step: abs((self.high - self.low) / step - self.ticks),
        )
        first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
        values = [i * step for i in range(first, last + 1)]
        return [
            (self.share(value), tick_text(value, step, values[-1], self.billion))
            for value in values
        ]


def tick_text(value: float, step: float, largest: float, billion: str = "B") -> str:
    """The value with as many digits as its step needs: 0.025, 2.5, 1,500, 20 k, 1.5 M."""
    if abs(value) < step / 2:
        return "0"
    for size, letter in ((1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "k")):
        if largest >= max(size, 1e4):
            return f"{value / size:.{_digits(step / size)}f} {letter}"
    if step < 1e-5:
        return f"{value:.1e}"
    return f"{value:,.{_digits(step)}f}".replace("-", "−")


def _digits(step: float) -> int:
    """Digits behind the point that tell multiples of a round step apart."""
    return next(digits for digits in range(20) if abs(round(step, digits) - step) < 1e-6 * step)


@dataclass(frozen=True)
class Mark:
    """One path; `style` names its look in page.css."""

    path: str
    style: str
    color: str  # a CSS colour, normally a variable


@dataclass(frozen=True)
class Label:
    """A word beside what it names. `left` and `top` are shares of the plot."""

    left: float
    top: float
    name: str
    value: str
    color: str


@dataclass(frozen=True)
class Key:
    """One entry of the line above the plot that tells kinds of marks apart."""

    style: str
    name: str
    color: str = "var(--muted)"


@dataclass
class Chart:
    """What the template needs for one figure; marks are added in the order they are drawn."""

    title: str
    unit: str  # of the y axis
    x: Axis
    y: Axis
    x_title: str = "step"
    height_px: int = 300
    summary: str = ""  # read aloud in place of the picture
    notes: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    hover: Hover | PointHover | None = None

    @property
    def left_ch(self) -> int:
        """Characters of room for the ticks of the y axis."""
        return max((len(text) for _, text in self.y.labels()), default=1)

    @property
    def right_ch(self) -> int:
        return max((len(f"{label.name} {label.value}") for label in self.labels), default=0)

    def place(self, point: Point) -> Point:
        """Shares of the plot, from its left and from its top."""
        return self.x.share(point[0]), 1 - self.y.share(point[1])

    def line(self, points: Sequence[Point], color: str, style: str = "line") -> None:
        """A line through the points, broken where a value is not finite."""
        runs = groupby(points, key=lambda point: isfinite(point[1]))
        self._add("".join(self._trace(list(run)) for finite, run in runs if finite), style, color)

    def dots(self, points: Iterable[Point], color: str, style: str = "dot") -> None:
        """Dots, rings or squares: strokes of no length, whose round or square caps are seen."""
        finite = (point for point in points if isfinite(point[1]))
        path = "".join(f"M{self._pair(point)}h0" for point in finite)
        self._add(path, style, color)
        if style.startswith("ring"):
            self._add(path, style.replace("ring", "hole"), "var(--card)")

    def band(self, low: Sequence[Point], high: Sequence[Point], color: str) -> None:
        if len(low) > 1:
            self._add(f"{self._trace([*low, *reversed(high)])}Z", "band", color)

    def label_ends(self, ends: Sequence[tuple[str, str, float, str]]) -> None:
        """Name lines at the right edge; ends are (name, value as text, y, color).

        Labels that would overlap move apart; where there is no room for all, some are left to
        the tooltip.
        """
        room = self.height_px // LABEL_GAP_PX
        ends = sorted((end for end in ends if isfinite(end[2])), key=lambda end: end[2])
        if len(ends) > room:
            ends = [ends[round(i * (len(ends) - 1) / (room - 1))] for i in range(room)]
        wanted = [self.height_px * (1 - self.y.share(value)) for _, _, value, _ in ends]
        tops = spread(wanted, LABEL_GAP_PX, self.height_px)
        for (name, value, _, color), top in zip(ends, tops, strict=True):
            self.labels.append(Label(1.0, top / self.height_px, _short(name), value, color))

    def label_points(self, points: Sequence[tuple[str, Point, str]], shift_px: int) -> None:
        """Name points on their right, `shift_px` lower (or higher); points are (name, at, color)"""
        points = [point for point in points if isfinite(point[1][1])]
        places = [self.place(at) for _, at, _ in points]
        wanted = [top * self.height_px + shift_px for _, top in places]
        tops = spread(wanted, LABEL_GAP_PX, self.height_px)
        for (name, _, color), (left, _), top in zip(points, places, tops, strict=True):
            self.labels.append(Label(left, top / self.height_px, _short(name), "", color))

    def _add(self, path: str, style: str, color: str) -> None:
        if path:
            self.marks.append(Mark(path, style, color))

    def _trace(self, points: Sequence[Point]) -> str:
        first, *rest = (self._pair(point) for point in points)
        return f"M{first}L{' '.join(rest)}" if rest else f"M{first}h0"

    def _pair(self, point: Point) -> str:
        left, top = self.place(point)
        return f"{1000 * left:.1f},{1000 * top:.1f}"


@dataclass
class Hover:
    """What the tooltip says, position by position; written into the page as JSON for page.js.

    A position is (left, top or None, title, rows): the nearest one to the pointer is shown, by
    its distance across where top is None.
    """

    head: list[str]
    colors: list[str] = field(default_factory=list)  # of rows; may be empty
    positions: list[tuple[float, float | None, str, list[list[str]]]] = field(default_factory=list)

    def add(self, left: float, top: float | None, title: str, rows: list[list[str]]) -> None:
        self.positions.append((round(left, 4), None if top is None else round(top, 4), title, rows))

    def json(self) -> Markup:
        return script_json({"head": self.head, "colors": self.colors, "at": self.positions})


@dataclass
class PointHover:
    """Where points lie, by their numbers in the page's list of submodels (`Points.page_list`)."""

    positions: list[tuple[float, float, int]] = field(default_factory=list)

    def add(self, left: float, top: float, number: int) -> None:
        self.positions.append((round(left, 4), round(top, 4), number))

    def json(self) -> Markup:
        return script_json({"points": self.positions})


def script_json(content: object) -> Markup:
    """JSON that cannot end the script element it stands in."""
    dumped = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(dumped.replace("<", "\\u003c"))


def _short(name: str) -> str:
    """A name that leaves room for the plot on a phone; the tooltip has the whole one."""
    return name if len(name) <= 12 else f"{name[:11]}…"


def spread(wanted: Sequence[float], gap: float, height: float) -> list[float]:
    """Positions nearest to the wanted ones (least squares) that are `gap` apart, inside height.

    With y_k the k-th smallest, y_k - k * gap must not fall: isotonic regression by pooling
    neighbours.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[tuple[float, int]] = []  # (mean, how many)
    for rank, i in enumerate(order):
        mean, count = wanted[i] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean = (mean * count + other * others) / (count + others)
            count += others
        pools.append((mean, count))
    highest = height - gap * (len(wanted) - 1)
    flat = [min(max(mean, 0.0), max(highest, 0.0)) for mean, count in pools for _ in range(count)]
    placed = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        placed[i] = flat[rank] + rank * gap
    return placed


def palette(count: int) -> list[tuple[str, str]]:
    """Colours of granularities, narrowest first, for the light and the dark theme.

    Lightness moves one way, so the order holds without seeing hue; the widest contrasts most
    with the page in both themes, the narrowest still 3 : 1.
    """
    colors = []
    for i in range(count):
        share = i / (count - 1) if count > 1 else 1.0
        hue = 185 + 105 * share
        light = f"oklch({0.66 - 0.3 * share:.3f} {0.11 + 0.08 * share:.3f} {hue:.0f})"
        dark = f"oklch({0.55 + 0.3 * share:.3f} {0.10 + 0.01 * share:.3f} {hue:.0f})"
        colors.append((light, dark))
    return colors
