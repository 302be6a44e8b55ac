"""The section on adaptive retrieval: its rows, and what they say in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isfinite, nan
from statistics import fmean

from matformer_dist.report import curves, text
from matformer_dist.report.inputs import Run
from matformer_dist.submodels.retrieval_results import (
    NESTED,
    OWN,
    RetrievalEntry,
    RetrievalResult,
)

WITHIN_POINTS = 0.5  # of 1-NN accuracy, as the paper has it


@dataclass(frozen=True, eq=False)
class Row:
    """One query encoder on one gallery; shares are of queries, `saved` is of XL's query FLOPs."""

    entry: RetrievalEntry
    name: str
    gallery: str
    color: str
    saved: float
    cells: list[tuple[str, str]]  # (what, as text), the same names in all rows

    @property
    def flops(self) -> int:
        return self.entry.query_flops

    @property
    def accuracy_percent(self) -> float:
        return 100 * self.entry.knn_accuracy[1].value

    @property
    def interval_percent(self) -> tuple[float, float]:
        low, high = self.entry.knn_accuracy[1].interval
        return 100 * low, 100 * high

    @property
    def lost_points(self) -> float:
        return 100 * self.entry.accuracy_lost[1].value


@dataclass(frozen=True)
class Retrieval:
    """What the templates show; rows by gallery, the cheapest query first."""

    result: RetrievalResult
    nested: list[Row]  # submodels on XL's gallery
    own: list[Row]  # submodels on a gallery of their own
    apart: list[Row]  # encoders that were trained apart, on their own gallery
    across: list[Row]  # and on another's
    chance: list[str]  # the cells of neighbours drawn at random
    sentences: list[str]

    @property
    def rows(self) -> list[Row]:
        return [*self.nested, *self.own, *self.apart, *self.across]


def read_rows(run: Run) -> Retrieval | None:
    """None where retrieval was not measured."""
    found = run.retrieval
    if found is None:
        return None
    rows = sorted((_row(run, found, one) for one in found.entries), key=lambda row: row.flops)
    nested = [row for row in rows if row.entry.encoder == NESTED]
    alone = [row for row in rows if row.entry.encoder != NESTED]
    kinds = {
        "nested": [row for row in nested if row.entry.gallery == found.largest],
        "own": [row for row in nested if row.entry.gallery == OWN],
        "apart": [row for row in alone if row.entry.gallery == OWN],
        "across": [row for row in alone if row.entry.gallery != OWN],
    }
    said = [
        _within(found, kinds["nested"]),
        _own_galleries(found, kinds["nested"], kinds["own"]),
        _apart(found, kinds["apart"], kinds["across"]),
    ]
    return Retrieval(found, **kinds, chance=_chance(found), sentences=[s for s in said if s])


def _row(run: Run, found: RetrievalResult, entry: RetrievalEntry) -> Row:
    nested = entry.encoder == NESTED
    colors = {
        "uniform": curves.color(run, entry.submodel),
        "heuristic": "var(--heuristic)",
        "mix": "var(--mix)",
    }
    saved = nan if entry is found.reference else found.saved(entry)
    return Row(
        entry=entry,
        name=entry.submodel if nested else entry.encoder,
        gallery="its own" if entry.gallery == OWN else entry.gallery,
        color=colors[entry.kind] if nested else "var(--p3)",
        saved=saved,
        cells=_cells(found, entry, saved),
    )


def _cells(found: RetrievalResult, entry: RetrievalEntry, saved: float) -> list[tuple[str, str]]:
    k, lost = found.ks[-1], entry.accuracy_lost[1]
    is_reference = entry is found.reference
    return [
        ("query FLOPs", text.compact(entry.query_flops, "", "G")),
        ("saved", _percent(saved)),
        ("1-NN accuracy", _percent(entry.knn_accuracy[1].value)),
        ("95% of it", text.percent_interval(entry.knn_accuracy[1].interval)),
        ("points lost", text.fixed(nan if is_reference else 100 * lost.value, 2)),
        ("95% of them", text.percent_interval((nan, nan) if is_reference else lost.interval, 2)),
        *((f"recall@{k}", _percent(entry.recall[k].value)) for k in found.ks if k > 1),
        (f"agreement@{k}", _percent(entry.neighbour_agreement[k].value)),
        ("Pearson", text.fixed(entry.pearson.value)),
        ("Spearman", text.fixed(entry.spearman.value)),
        ("own image", _percent(entry.own_image_found.value if entry.own_image_found else nan)),
    ]


def _chance(found: RetrievalResult) -> list[str]:
    """The same cells of neighbours that are drawn at random."""
    k, chance = found.ks[-1], found.chance
    nothing = text.fixed(nan)
    return [
        nothing, nothing, _percent(chance.accuracy), nothing, nothing, nothing,
        *(_percent(chance.recall[k]) for k in found.ks if k > 1),
        _percent(chance.neighbour_agreement[k]), text.fixed(0.0), text.fixed(0.0),
        _percent(chance.own_image_found),
    ]  # fmt: skip


def _percent(share: float) -> str:
    """With a real minus, and a digit more where it would show as 0.0 %."""
    digits = 1 if not abs(share) < 0.0005 or not share else 3
    return f"{text.fixed(100 * share, digits)} %" if isfinite(share) else text.fixed(nan)


def _within(found: RetrievalResult, nested: list[Row]) -> str:
    """The cheapest query that loses next to nothing, or the one that loses least."""
    reference = found.reference
    if reference is None:
        return ""
    cheaper = [row for row in nested if row.flops < reference.query_flops]
    cheaper = [row for row in cheaper if isfinite(row.lost_points)]
    if not cheaper:
        return ""
    xl = f"{WITHIN_POINTS} points of {found.largest}'s 1-NN accuracy"
    good = [row for row in cheaper if row.lost_points <= WITHIN_POINTS + 1e-9]
    if not good:
        row = min(cheaper, key=lambda row: row.lost_points)
        return (
            f"No cheaper query is within {xl}: {row.name} comes nearest, saves "
            f"{_percent(row.saved)} of the compute of a query and loses "
            f"{text.fixed(row.lost_points, 2)} points."
        )
    row = good[0]
    lost = row.lost_points
    change = f"loses {text.fixed(lost, 2)}" if lost >= 0 else f"gains {text.fixed(-lost, 2)}"
    interval = text.percent_interval(row.entry.accuracy_lost[1].interval, 2)
    known = f" (95% of the loss: {interval})" if interval != text.fixed(nan) else ""
    return (
        f"The cheapest query within {xl} is {row.name}: it saves {_percent(row.saved)} of the "
        f"compute of a query and {change} points{known}."
    )


def _own_galleries(found: RetrievalResult, nested: list[Row], own: list[Row]) -> str:
    shared = {row.name: row.accuracy_percent for row in nested}
    both = [(row, shared[row.name]) for row in own if row.name in shared]
    if not both:
        return ""
    said = ", ".join(
        f"{row.name} reaches {text.fixed(row.accuracy_percent, 1)} % instead of "
        f"{text.fixed(xl, 1)} %"
        for row, xl in both
    )
    return f"With a gallery of its own in place of {found.largest}'s, {said}."


def _apart(found: RetrievalResult, apart: list[Row], across: list[Row]) -> str:
    if not apart:
        return ""
    said = f"Encoders that were trained apart reach {_range(apart)} in their own galleries"
    values = _accuracies(across)
    if values:
        mean = f" ({text.fixed(fmean(values), 1)} % on average)" if len(values) > 1 else ""
        said += f", and {_range(across)}{mean} in another's, where chance is "
        said += _percent(found.chance.accuracy)
    return f"{said}."


def _range(rows: Iterable[Row]) -> str:
    values = _accuracies(rows)
    low, high = (text.fixed(end, 1) for end in (min(values, default=inf), max(values, default=inf)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _accuracies(rows: Iterable[Row]) -> list[float]:
    return [row.accuracy_percent for row in rows if isfinite(row.accuracy_percent)]
