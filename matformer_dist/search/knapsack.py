"""The submodels that a predictor likes best within a budget: a multiple-choice knapsack.

Every layer picks one granularity; costs and gains are sums over layers. Layer after layer, the
`keep` best choices of every cost are kept, which is exact. Where costs are too many to keep (many
granularities of odd widths), neighbouring ones share a place: then it is nearly so, and no cost is
ever rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import nsmallest
from typing import NamedTuple

from matformer_dist.nesting import Submodel
from matformer_dist.search.budget import Budget, Costs
from matformer_dist.search.predictor import Predictor

_PLACES = 4000  # of costs


class Choice(NamedTuple):
    """Of the first layers: predicted loss in nats, cost, and their granularities."""

    loss: float
    cost: float
    granularities: tuple[int, ...]


class Knapsack:
    """All budgets of one kind are answered from one table."""

    def __init__(self, predictor: Predictor, costs: Costs, kind: str, keep: int = 4) -> None:
        added = costs.added[kind]  # type: ignore[index]
        self.costs = costs
        table = [Choice(predictor.base, costs.base[kind], ())]  # type: ignore[index]
        for gains in predictor.gains:
            gained = [0.0, *gains.cumsum().tolist()]
            grown = [
                Choice(loss - gained[i], cost + added[i], (*granularities, i))
                for loss, cost, granularities in table
                for i in range(len(added))
            ]
            table = _best_of_each_cost(grown, keep)
        self.table = sorted(table, key=lambda choice: choice.loss)

    def best(self, budget: Budget, count: int) -> list[Submodel]:
        """The `count` of the lowest predicted loss within the budget, the best first."""
        within = [choice for choice in self.table if choice.cost <= budget.limit * (1 + 1e-9)]
        return [Submodel(self.costs.nesting, choice.granularities) for choice in within[:count]]


def _best_of_each_cost(choices: list[Choice], keep: int) -> list[Choice]:
    lowest = min(choice.cost for choice in choices)
    highest = max(choice.cost for choice in choices)
    places: Mapping[int, list[Choice]]
    grain = (highest - lowest) * 1e-12 or 1.0
    places = _by_place(choices, lowest, grain)
    if len(places) > _PLACES:
        places = _by_place(choices, lowest, (highest - lowest) / _PLACES)
    return [choice for place in places.values() for choice in nsmallest(keep, place)]


def _by_place(choices: list[Choice], lowest: float, grain: float) -> dict[int, list[Choice]]:
    places: dict[int, list[Choice]] = {}
    for choice in choices:
        places.setdefault(round((choice.cost - lowest) / grain), []).append(choice)
    return places
