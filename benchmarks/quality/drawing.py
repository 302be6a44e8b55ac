"""`draw`: all tables into one file, and two pictures for README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.machine import RESULTS
from benchmarks.quality import results
from benchmarks.quality.scaling import Fit, Point, fit, points
from benchmarks.quality.study import BEST, SEEDS, SMALL, tokens_alone
from benchmarks.quality.tables import table, tables

TABLES = RESULTS / "quality" / "tables.md"
PICTURE = Path("docs/quality.png")
_ENOUGH = 6  # points for a fit of three numbers
_COLOURS = {"alone": "tab:gray", "nested": "tab:blue"}


def draw() -> None:
    found = {kind: points(kind) for kind in ("alone", "nested")}
    fits = {kind: fit(of) for kind, of in found.items() if len(of) >= _ENOUGH}
    text = "\n\n".join([*tables(), *_fits(fits, found)])
    TABLES.write_text(text + "\n")
    print(text)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_sizes(left)
    _draw_scaling(right, found, fits)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    print(f"\nwritten to {TABLES} and {PICTURE}")


def _fits(fits: dict[str, Fit], found: dict[str, list[Point]]) -> Sequence[str]:
    rows = [
        [
            kind,
            str(len(found[kind])),
            *(
                f"{value:.3g} ({low:.3g} to {high:.3g})"
                for value, (low, high) in zip(of.values, of.intervals, strict=True)
            ),
            f"{of.largest_error:.3f}",
        ]
        for kind, of in fits.items()
    ]
    head = ["", "points", "a", "b", "c", "largest error"]
    return list(table("loss = a (N D)^b + c, with 95% intervals", head, rows))


def _draw_sizes(axes: Axes) -> None:
    """SMALL: every submodel of the universal model against models trained alone."""
    nested = [of for seed in SEEDS if (of := results.result(SMALL, BEST, seed))]
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
    for tokens, marker, label in (
        (x, "x", f"each alone on {x / 1e6:g} M tokens"),
        (4 * x, "+", f"each alone on {4 * x / 1e6:g} M tokens, as the universal model"),
    ):
        places = [
            (point.parameters, loss)
            for point in points("alone")
            if (point.size, point.tokens) == (SMALL, tokens)
            for loss in point.losses
        ]
        if places:
            axes.plot(*zip(*places, strict=True), marker, color="tab:red", label=label)
    axes.set_xlabel("parameters without the embedding")
    axes.set_ylabel("validation loss, nats a token")
    axes.legend()
    axes.grid(alpha=0.2)


def _draw_scaling(axes: Axes, found: dict[str, list[Point]], fits: dict[str, Fit]) -> None:
    for kind, of in found.items():
        nd = [point.parameters * point.tokens for point in of]
        losses = [float(np.mean(point.losses)) for point in of]
        axes.plot(nd, losses, "o" if kind == "nested" else "x", ms=4, color=_COLOURS[kind])
        if kind in fits:
            line = np.geomspace(min(nd), max(nd), 100)
            label = "{}: {:.3g} (ND)^{:.3f} + {:.2f}".format(kind, *fits[kind].values)
            axes.plot(line, fits[kind].loss(line), color=_COLOURS[kind], lw=1, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("N D, parameters without the embedding x tokens of a model alone")
    axes.set_ylabel("validation loss, nats a token")
    if fits:
        axes.legend()
    axes.grid(alpha=0.2)
