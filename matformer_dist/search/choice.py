"""Of all that was measured, the best submodel within each budget, and what it is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from matformer_dist.evaluation.measured import Measured, gain
from matformer_dist.nesting import Submodel, mix_n_match
from matformer_dist.search.budget import Budget, Costs, short_cost
from matformer_dist.search.measurements import Measurements
from matformer_dist.submodels.slices import Cost, MeasuredSubmodel, Slice

_MOST_DIGITS = 12  # of a name


def heuristic_within(costs: Costs, budget: Budget) -> Submodel:
    """The paper's submodel within a budget: the widest of its ladder from S to XL."""
    *_, widest = (
        one for one in mix_n_match(costs.nesting, costs.n_layers) if costs.fits(one, budget)
    )
    return widest


def best_within(known: Measurements, costs: Costs, budget: Budget) -> Submodel:
    """Of the lowest loss, the cheapest of several; every budget's heuristic is among the known."""
    within = (one for one in known if costs.fits(one, budget))
    return min(within, key=lambda one: (known[one].loss, costs.cost(budget.kind, one)))


def choose(known: Measurements, costs: Costs, budgets: Sequence[Budget]) -> list[Slice]:
    """A slice each, by kind and budget; the best of several budgets of a kind is one, at the
    smallest of them.
    """
    ladder = set(mix_n_match(costs.nesting, costs.n_layers))
    once: dict[tuple[Cost, Submodel], Slice] = {}
    for budget in sorted(budgets, key=lambda budget: (budget.kind, budget.limit)):
        best = best_within(known, costs, budget)
        if (budget.kind, best) in once:
            continue
        heuristic = heuristic_within(costs, budget)
        gained, interval = gain(known[best], known[heuristic])
        once[budget.kind, best] = Slice(
            **describe(known[best], costs, best).model_dump(),
            name=str(best) if best.is_uniform else "",
            kind=budget.kind,
            budget=budget.limit,
            found_by="uniform" if best.is_uniform else "heuristic" if best in ladder else "search",
            heuristic=str(heuristic),
            gain=gained,
            gain_interval=interval,
        )
    return _named(list(once.values()))


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
        flops_per_token=round(costs.cost("flops", submodel)),
        memory_bytes=round(costs.cost("memory", submodel)),
        latency_ms=costs.cost("latency", submodel) if "latency" in costs.base else None,
        loss=measured.loss,
        loss_interval=described["loss_interval"],
        agreement=described["agreement"],
        kl=described["kl"],
    )
