"""Submodels as points of cost and quality, joined from evaluation.json and slices.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, nan

from matformer_dist.errors import UserError
from matformer_dist.nesting import SubmodelKind, mix_n_match
from matformer_dist.report import text
from matformer_dist.report.inputs import Run
from matformer_dist.report.shapes import Evaluated
from matformer_dist.submodels.slices import SLICES, Cost, MeasuredSubmodel


@dataclass(frozen=True, eq=False)
class Point:
    """One measured submodel; NaN where its file does not say."""

    submodel: str
    kind: SubmodelKind
    parameters: int
    flops: int
    loss: float
    loss_interval: tuple[float, float]
    accuracy: float
    accuracy_interval: tuple[float, float]
    agreement: float
    kl: float
    granularities: tuple[int, ...] = ()  # of the layers; only where it comes from slices.json
    memory_bytes: float = nan
    latency_ms: float = nan

    def cells(self, run: Run) -> list[tuple[str, str]]:
        """What is known of it: names, the same for all of a run, and texts. Costs come first."""
        accuracy = [
            ("accuracy", text.percent(self.accuracy)),
            ("95% of it", text.percent_interval(self.accuracy_interval)),
        ]
        return [
            ("parameters", text.compact(self.parameters)),
            (f"FLOPs {run.one_unit}", text.compact(self.flops, billion="G")),
            ("memory", text.file_size(self.memory_bytes)),
            ("latency", text.milliseconds(self.latency_ms)),
            *(accuracy if run.is_vision else []),
            ("loss", text.fixed(self.loss, 4)),
            ("95% of it", text.interval(self.loss_interval, 4)),
            ("agreement", text.percent(self.agreement)),
            ("KL", text.fixed(self.kl, 4)),
        ]


def cost_kinds(run: Run) -> list[tuple[Cost, str, Callable[[Point], float]]]:
    """What budgets are of: kind, its name on the page, and what a point costs."""
    return [
        ("params", "parameters", lambda point: point.parameters),
        ("flops", f"FLOPs {run.one_unit}", lambda point: point.flops),
        ("memory", "memory", lambda point: point.memory_bytes),
        ("latency", "latency", lambda point: point.latency_ms),
    ]


@dataclass
class Points:
    """All points of the charts, the smallest first, and the numbers of the page's own list.

    The list (`numbered`) is written into the page once; charts and explorer point into it.
    """

    shown: list[Point]
    searched: list[Point]  # those of slices.json; empty where the run was not searched
    notes: list[str] = field(default_factory=list)

    def numbered(self) -> dict[Point, int]:
        ordered = dict.fromkeys([*self.shown, *self.searched])
        return {point: number for number, point in enumerate(ordered)}

    def page_list(self, run: Run) -> dict[str, object]:
        """As JSON for page.js: of every submodel its name and its cells."""
        cells = {point: point.cells(run) for point in self.numbered()}
        names = next(([name for name, _ in of] for of in cells.values()), [])
        items = [[point.submodel, [cell for _, cell in of]] for point, of in cells.items()]
        return {"cells": names, "items": items}


def join_points(run: Run) -> Points:
    """Points of both files where they measured the same thing, else of the newer or the search.

    Losses of another step, or of other validation data, are not comparable: they are left out of
    the charts, and a note says so.
    """
    evaluated = (
        [_of_evaluation(item) for item in run.evaluation.submodels] if run.evaluation else []
    )
    evaluated.sort(key=lambda point: point.parameters)
    searched = _of_slices(run)
    evaluation, slices = run.evaluation, run.slices
    if slices is None or evaluation is None:
        return Points(searched or evaluated, searched)
    if evaluation.step > slices.step:
        note = (
            f"{SLICES} is of step {slices.step:,}, older than evaluation.json of step "
            f"{evaluation.step:,}, which the charts show; run matformer search again."
        )
        return Points(evaluated, searched, [note])
    if evaluation.step < slices.step:
        note = (
            f"evaluation.json is of step {evaluation.step:,}, older than {SLICES} of step "
            f"{slices.step:,}, which the charts show; run matformer evaluate again."
        )
        return Points(searched, searched, [note])
    digests = {evaluation.data_sha256, slices.data_sha256} - {""}
    if evaluation.units != slices.units or len(digests) > 1:
        note = (
            f"The charts show losses on the {slices.units:,} validation {run.units} of the search; "
            f"those of evaluation.json are on {evaluation.units:,} others."
        )
        return Points(searched, searched, [note])
    known = {point.submodel for point in searched}
    shown = [*searched, *(point for point in evaluated if point.submodel not in known)]
    return Points(sorted(shown, key=lambda point: point.parameters), searched)


def _of_evaluation(item: Evaluated) -> Point:
    return Point(
        submodel=item.submodel,
        kind=item.kind,
        parameters=item.parameters,
        flops=item.flops,
        loss=item.loss,
        loss_interval=item.loss_interval,
        accuracy=item.accuracy,
        accuracy_interval=item.accuracy_interval,
        agreement=item.agreement,
        kl=item.kl,
    )


def _of_slices(run: Run) -> list[Point]:
    if run.slices is None:
        return []
    heuristic = {
        submodel.granularities for submodel in mix_n_match(run.nesting, run.config.model.n_layers)
    }
    points = [_of_measured(run, one, heuristic) for one in run.slices.measured]
    return sorted(points, key=lambda point: point.parameters)


def _of_measured(run: Run, one: MeasuredSubmodel, heuristic: set[tuple[int, ...]]) -> Point:
    try:
        submodel = run.nesting.parse(one.submodel, run.config.model.n_layers)
    except UserError as error:
        raise UserError(
            f"{run.directory / SLICES} is not of this run ({error}); run `matformer search` again, "
            "or delete the file"
        ) from None
    kind: SubmodelKind = "heuristic" if submodel.granularities in heuristic else "mix"
    return Point(
        submodel=str(submodel),
        kind="uniform" if submodel.is_uniform else kind,
        parameters=one.parameters,
        flops=one.flops,
        loss=one.loss,
        loss_interval=one.loss_interval,
        accuracy=one.accuracy,
        accuracy_interval=one.accuracy_interval,
        agreement=one.agreement,
        kl=one.kl,
        granularities=submodel.granularities,
        memory_bytes=one.memory_bytes,
        latency_ms=nan if one.latency_ms is None else one.latency_ms,
    )


def frontier(points: Iterable[Point], cost: Callable[[Point], float]) -> list[Point]:
    """The best point within every budget: costs rise, losses fall from one to the next."""
    usable = [point for point in points if isfinite(point.loss) and isfinite(cost(point))]
    found: list[Point] = []
    for point in sorted(usable, key=lambda point: (cost(point), point.loss)):
        if point.loss < (found[-1].loss if found else inf):
            found.append(point)
    return found


def best_within(
    points: Sequence[Point], cost: Callable[[Point], float], budget: float
) -> Point | None:
    """The last point of a frontier that costs no more than the budget."""
    return next((point for point in reversed(points) if cost(point) <= budget), None)
