"""`draw`: all tables into one file, and two pictures for README."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.machine import RESULTS
from benchmarks.quality import results
from benchmarks.quality.scaling import APART, PAPER, Fit, Point, fit, points, seeds_apart
from benchmarks.quality.study import BEST, BETWEEN, LONG, SMALL, TOKENS, read, tokens_alone
from benchmarks.quality.tables import table, tables

TABLES = RESULTS / "quality" / "tables.md"
PICTURE = Path("docs/quality.png")
_COLOURS = {"alone": "tab:red", "nested": "tab:blue"}


def draw(resamples: int = 500) -> None:
    results.check()
    found = {kind: points(kind) for kind in _COLOURS}
    luck = seeds_apart(SMALL)
    fits = {
        (kind, form.text): fit(of, form, luck, resamples)
        for kind, of in found.items()
        for form in (PAPER, APART)
        if len({point.size for point in of}) >= 3
        and len({(point.parameters, point.tokens) for point in of}) > len(form.names)
    }
    parts = enumerate([*tables(), *_fits(fits, found)], 1)
    text = "\n\n".join(f"### Table {i}. {part}" for i, part in parts)
    TABLES.write_text(text + "\n")
    print(text)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_sizes(left)
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
                f"{name} {value:.3g}{'*' if is_at_end else ''} ({low:.3g} to {high:.3g})"
                for name, is_at_end, (value, low, high) in zip(
                    of.form.names, of.form.at_an_end(of.values), of.intervals(), strict=True
                )
            ),
            *(f"{error:.3f}" for error in (of.luck, of.rms_error, of.largest_error)),
        ]
        for (kind, form), of in fits.items()
    ]
    head = [
        "",
        "runs, points",
        "loss",
        "values, 95% intervals",
        "luck",
        "rms error",
        "largest error",
    ]
    title = "Loss against parameters N and tokens D; *: at the end of its range, not determined"
    yield from table(title, head, rows)


def _draw_sizes(axes: Axes) -> None:
    """SMALL: every submodel of a universal model, and models trained alone with its FLOPs."""
    for suffix, is_faint in ((LONG, False), ("", True)):
        x = TOKENS.get(suffix, 1) * tokens_alone(SMALL) / 1e6
        alpha = 0.4 if is_faint else 1.0
        nested = results.by_seed(SMALL, BEST + suffix)
        if nested:
            label = f"one universal model (seeds: {len(nested)}), X = {x:g} M tokens"
            _draw_nested(axes, suffix, alpha, label)
        places = list(_alone(suffix))
        if places:
            sizes, losses, around = zip(*places, strict=True)
            axes.errorbar(
                sizes, losses, around, fmt="x", capsize=2, lw=1, color=_COLOURS["alone"],
                alpha=alpha, label=f"each alone, X = {x:g} M tokens",
            )  # fmt: skip
    axes.set_xlabel("parameters without the embedding")
    axes.set_ylabel("validation loss, nats a token")
    axes.legend()
    axes.grid(alpha=0.2)


def _draw_nested(axes: Axes, suffix: str, alpha: float, label: str) -> None:
    """A line through all submodels, and intervals of those that have them: the uniform ones."""
    seeds = results.losses(SMALL, BEST + suffix)
    submodels = next(iter(results.by_seed(SMALL, BEST + suffix).values()))["evaluation"][
        "submodels"
    ]
    found = [
        (one["non_embedding_parameters"], of, one)
        for one in sorted(submodels, key=itemgetter("non_embedding_parameters"))
        if (of := results.mean(SMALL, seeds, one["submodel"]))
    ]
    style: dict[str, Any] = {"color": _COLOURS["nested"], "alpha": alpha}
    axes.plot([size for size, *_ in found], [of.value for _, of, _ in found], ".-", ms=4, **style)
    uniform = [(size, of, one["submodel"]) for size, of, one in found if one["kind"] == "uniform"]
    sizes, estimates, names = zip(*uniform, strict=True)
    losses = [of.value for of in estimates]
    around = [of.half_width or 0.0 for of in estimates]
    axes.errorbar(sizes, losses, around, fmt="o", ms=5, capsize=2, lw=1, label=label, **style)
    if alpha == 1:
        for size, loss, name in zip(sizes, losses, names, strict=True):
            axes.annotate(name, (size, loss), xytext=(5, -13), textcoords="offset points")


def _alone(suffix: str) -> Iterator[tuple[int, float, float]]:
    """Parameters, loss and half the width of its interval, of SMALL's models trained alone."""
    names = read(SMALL).granularities.names
    for name in (*names, *(f"W{neurons}" for neurons in BETWEEN)):
        of_seeds = results.losses(SMALL, f"alone-{name}{suffix}")
        found = results.mean(SMALL, of_seeds, name)
        if found:
            of = results.by_seed(SMALL, f"alone-{name}{suffix}")
            one, *_ = (next(iter(seed["evaluation"]["submodels"])) for seed in of.values())
            yield one["non_embedding_parameters"], found.value, found.half_width or 0.0


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
