"""RUN/frontier.png: loss against cost, of all that was measured and of what was chosen."""

from __future__ import annotations

from math import nan
from pathlib import Path

from matformer_dist.config import Unit
from matformer_dist.errors import UserError
from matformer_dist.nesting import Nesting, mix_n_match
from matformer_dist.submodels.slices import Cost, MeasuredSubmodel, Slices
from matformer_dist.units import one_of


def _axis(kind: Cost, unit: Unit) -> str:
    is_text = unit == "tokens"
    return {
        "params": "parameters",
        "flops": f"FLOPs {one_of(unit)}, forward",
        "memory": f"bytes of weights{' and cache' if is_text else ''}",
        "latency": "ms a token" if is_text else "ms a pass",
    }[kind]


def draw_frontier(slices: Slices, kind: Cost, nesting: Nesting, path: Path) -> None:
    """Every measured submodel, the heuristic's, the granularities and the slices of one kind.

    UserError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "the picture needs matplotlib; install it by `pip install matformer-dist[eval]`"
        ) from None
    layers = len(slices.measured[0].widths)
    ladder = {str(one) for one in mix_n_match(nesting, layers)}
    uniform = {name: i for i, name in enumerate(nesting.names)}
    chosen = [one for one in slices.slices if one.kind == kind]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()

    def points(found: list[MeasuredSubmodel]) -> tuple[list[float], list[float]]:
        found = sorted(found, key=lambda one: one.cost(kind) or nan)
        return [one.cost(kind) or nan for one in found], [one.loss for one in found]

    others = [one for one in slices.measured if one.submodel not in ladder]
    axes.plot(*points(others), ".", color="0.75", label="measured", zorder=1)
    heuristic = [one for one in slices.measured if one.submodel in ladder]
    axes.plot(
        *points(heuristic), "o-", color="tab:orange", mfc="white", ms=5, lw=1,
        label="the paper's heuristic", zorder=2,
    )  # fmt: skip
    axes.step(*points([*chosen]), where="post", color="tab:blue", lw=1, zorder=3)
    axes.plot(*points([*chosen]), "o", color="tab:blue", ms=4, label="slices", zorder=4)
    for one in slices.measured:
        if one.submodel in uniform:
            at = (one.cost(kind) or nan, one.loss)
            axes.annotate(one.submodel, at, xytext=(6, 6), textcoords="offset points")
    axes.set_xlabel(_axis(kind, slices.unit))
    axes.set_ylabel(f"validation loss, nats {one_of(slices.unit)}")
    axes.set_title(f"step {slices.step:,}, {slices.units:,} validation {slices.unit}", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=150)
