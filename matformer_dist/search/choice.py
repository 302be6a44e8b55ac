"""Of all that was measured, the best submodel within each budget, and what it is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from typing import Literal

from matformer_dist.evaluation.measured import Measured, gain
from matformer_dist.nesting import Submodel, mix_n_match
from matformer_dist.search.budget import Budget, Costs, short_cost
from matformer_dist.search.measurements import Measurements
from matformer_dist.submodels.slices import Cost, MeasuredSubmodel, Slice

_MOST_DIGITS = 12  # of a name


def widest_within(costs: Costs, budget: Budget) -> Submodel:
    """Of the paper's heuristic, whose submodels are a ladder from S to XL, what fills a budget."""
    *_, widest = (
        one for one in mix_n_match(costs.nesting, costs.n_layers) if costs.fits(one, budget)
    )
    return widest


def best_within(
    known: Measurements, costs: Costs, budget: Budget, among: Container[Submodel] | None = None
) -> Submodel:
    """Of the lowest loss, the cheapest of several. `among`: None for all that was measured."""
    within = (one for one in known if costs.fits(one, budget) and (among is None or one in among))
    return min(within, key=lambda one: (known[one].loss, costs.cost(budget.kind, one)))


def choose(known: Measurements, costs: Costs, budgets: Sequence[Budget]) -> list[Slice]:
    """The slice within each budget, in their order; the widest of the heuristic within each of them
    is known. Equal submodels have equal names.
    """
    ladder = set(mix_n_match(costs.nesting, costs.n_layers))
    slices = []
    for budget in budgets:
        best = best_within(known, costs, budget)
        heuristic = best_within(known, costs, budget, ladder)
        gained, interval = gain(known[best], known[heuristic])
        slices.append(
            Slice(
                **describe(known[best], costs, best).model_dump(),
                name=str(best) if best.is_uniform else "",
                kind=budget.kind,
                budget=budget.limit,
                found_by=_found_by(best, ladder),
                heuristic=str(heuristic),
                gain=gained,
                gain_interval=interval,
            )
        )
    distinct = without_repetitions(slices)
    names = {(one.kind, one.submodel): one.name for one in _named(distinct)}
    return [one.model_copy(update={"name": names[one.kind, one.submodel]}) for one in slices]


def _found_by(
    one: Submodel, ladder: Container[Submodel]
) -> Literal["uniform", "heuristic", "search"]:
    if one.is_uniform:
        return "uniform"
    return "heuristic" if one in ladder else "search"


def without_repetitions(slices: Sequence[Slice]) -> list[Slice]:
    """By kind and budget; what is best within several budgets, at the smallest of them."""
    once: dict[tuple[Cost, str], Slice] = {}
    for one in sorted(slices, key=lambda one: (one.kind, one.budget)):
        once.setdefault((one.kind, one.submodel), one)
    return list(once.values())


def _named(slices: Sequence[Slice]) -> list[Slice]:
    """Those without a name get their cost, with as many digits as tell it from the others."""
    names = [one.name for one in slices]
    for digits in range(3, _MOST_DIGITS + 1):
        short = [short_cost(one.kind, one.cost(one.kind) or 0.0, digits) for one in slices]
        shared = Counter(text for text, one in zip(short, slices, strict=True) if not one.name)
        for i, text in enumerate(short):
            if not names[i] and shared[text] == 1:
                names[i] = text
    assert all(names), "two slices of one kind and cost"
    return [one.model_copy(update={"name": name}) for one, name in zip(slices, names, strict=True)]


def describe(measured: Measured, costs: Costs, submodel: Submodel) -> MeasuredSubmodel:
    """As slices.json has it."""
    described, parameters = measured.described(), round(costs.cost("params", submodel))
    return MeasuredSubmodel(
        submodel=str(submodel),
        widths=list(submodel.widths),
        parameters=parameters,
        non_embedding_parameters=parameters - costs.embeddings,
        flops=round(costs.cost("flops", submodel)),
        memory_bytes=round(costs.cost("memory", submodel)),
        latency_ms=costs.cost("latency", submodel) if "latency" in costs.base else None,
        loss=measured.loss,
        loss_interval=described["loss_interval"],
        agreement=described["agreement"],
        kl=described["kl"],
        accuracy=described["accuracy"],
        accuracy_interval=described["accuracy_interval"],
    )
