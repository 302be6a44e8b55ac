"""`draw`: all tables into one file, and two pictures for README."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.machine import RESULTS
from benchmarks.quality import results
from benchmarks.quality.scaling import APART, PAPER, Fit, Point, fit, points
from benchmarks.quality.study import BEST, LONG, SMALL, TOKENS, tokens_alone
from benchmarks.quality.tables import table, tables

TABLES = RESULTS / "quality" / "tables.md"
PICTURE = Path("docs/quality.png")
_COLOURS = {"alone": "tab:red", "nested": "tab:blue"}


def draw() -> None:
    results.check_data()
    found = {kind: points(kind) for kind in _COLOURS}
    fits = {
        (kind, form.text): fit(of, form)
        for kind, of in found.items()
        for form in (PAPER, APART)
        if len({point.size for point in of}) >= 3
    }
    parts = enumerate([*tables(), *_fits(fits, found)], 1)
    text = "\n\n".join(f"### Table {i}. {part}" for i, part in parts)
    TABLES.write_text(text + "\n")
    print(text)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_sizes(left, found["alone"])
    papers = {kind: of for (kind, form), of in fits.items() if form == PAPER.text}
    _draw_scaling(right, found, papers)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    print(f"\nwritten to {TABLES} and {PICTURE}")


def _fits(fits: dict[tuple[str, str], Fit], found: dict[str, list[Point]]) -> Iterator[str]:
    rows = [
        [
            kind,
            f"{len({point.run for point in found[kind]})}, {len(found[kind])}",
            form,
            ", ".join(
                f"{name} {value:.3g} ({low:.3g} to {high:.3g})"
                for name, (value, low, high) in zip(of.form.names, of.intervals(), strict=True)
            ),
            f"{of.rms_error:.3f}",
            f"{of.largest_error:.3f}",
        ]
        for (kind, form), of in fits.items()
    ]
    head = ["", "runs, points", "loss", "values, 95% intervals", "rms error", "largest error"]
    yield from table("Loss against parameters N and tokens D, c from 0 up", head, rows)


def _draw_sizes(axes: Axes, alone: list[Point]) -> None:
    """SMALL: every submodel of the universal model against models trained alone."""
    nested = results.by_seed(SMALL, BEST).values()
    if nested:
        submodels = [of["evaluation"]["submodels"] for of in nested]
        sizes = [one["non_embedding_parameters"] for one in submodels[0]]
        means = [np.mean([of[i]["loss"] for of in submodels]) for i in range(len(sizes))]
        axes.plot(sizes, means, "o-", ms=3, color=_COLOURS["nested"], label="one universal model")
        for one, loss in zip(submodels[0], means, strict=True):
            if one["kind"] == "uniform":
                place = (one["non_embedding_parameters"], loss)
                axes.annotate(one["submodel"], place, xytext=(4, 6), textcoords="offset points")
    x = tokens_alone(SMALL)
    more = TOKENS[LONG] * x
    for tokens, marker, label in (
        (x, "x", f"each alone on {x / 1e6:g} M tokens"),
        (more, "+", f"each alone on {more / 1e6:g} M tokens, as the universal model"),
    ):
        places = [
            (point.parameters, point.loss)
            for point in alone
            if point.size == SMALL and abs(point.tokens / tokens - 1) < 0.01
        ]
        if places:
            axes.plot(*zip(*places, strict=True), marker, color="tab:red", label=label)
    axes.set_xlabel("parameters without the embedding")
    axes.set_ylabel("validation loss, nats a token")
    axes.legend()
    axes.grid(alpha=0.2)


def _draw_scaling(axes: Axes, found: dict[str, list[Point]], fits: dict[str, Fit]) -> None:
    for kind, of in found.items():
        nd = np.array([float(point.parameters * point.tokens) for point in of])
        axes.plot(nd, [point.loss for point in of], "x", ms=4, color=_COLOURS[kind])
        if kind in fits:
            line = np.geomspace(nd.min(), nd.max(), 100)
            a, b, c = fits[kind].form.shown(fits[kind].values)
            label = f"{kind}: {a:.3g} (ND)^{b:.3f} + {c:.2f}"
            axes.plot(line, fits[kind].loss(line), color=_COLOURS[kind], lw=1, label=label)
            axes.fill_between(line, *fits[kind].band(line), color=_COLOURS[kind], alpha=0.15)
    axes.set_xscale("log")
    axes.set_xlabel("parameters without the embedding x tokens of the training run")
    axes.set_ylabel("validation loss, nats a token")
    if fits:
        axes.legend()
    axes.grid(alpha=0.2)
