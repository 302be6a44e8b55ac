"""The submodels that a predictor likes best within a budget: a multiple-choice knapsack.

Every layer picks one granularity; costs and gains are sums over layers. Layer after layer, the
`keep` best choices of every cost are kept, which is exact. Where costs are too many to keep (many
granularities of odd widths), neighbouring ones share a place: then it is nearly so, and no cost is
ever rounded. numpy alone.

Legend: N choices of the layers so far.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from matformer_dist.nesting import Submodel
from matformer_dist.search.budget import Budget, Costs
from matformer_dist.search.predictor import Predictor
from matformer_dist.submodels.slices import Cost

_PLACES = 4000  # of costs


class Knapsack:
    """All budgets of one kind are answered from one table, the lowest predicted loss first.

    `losses` [N] in nats a token, `paid` [N] as the kind's costs are, `granularities` [N, layers].
    """

    def __init__(self, predictor: Predictor, costs: Costs, kind: Cost, keep: int = 4) -> None:
        self.costs = costs
        added = np.array(costs.added[kind])
        losses, paid = np.array([predictor.base]), np.array([costs.base[kind]])
        granularities = np.zeros((1, 0), np.int16)
        for gains in predictor.gains:
            gained = np.concatenate([[0.0], gains.cumsum()])
            losses = (losses[:, None] - gained).ravel()
            paid = (paid[:, None] + added).ravel()
            kept = _best_of_each_cost(losses, paid, keep)
            before, granularity = np.divmod(kept, len(added))
            chosen = granularity.astype(np.int16)[:, None]
            granularities = np.concatenate([granularities[before], chosen], axis=1)
            losses, paid = losses[kept], paid[kept]
        order = np.argsort(losses, kind="stable")
        self.losses, self.paid, self.granularities = (
            losses[order],
            paid[order],
            granularities[order],
        )

    def best(self, budget: Budget, count: int) -> list[Submodel]:
        """The `count` of the lowest predicted loss within the budget, the best first."""
        (within,) = np.nonzero(self.paid <= budget.limit * (1 + 1e-9))
        return [
            Submodel(self.costs.nesting, tuple(self.granularities[i].tolist()))
            for i in within[:count]
        ]


def _best_of_each_cost(
    losses: NDArray[np.float64], paid: NDArray[np.float64], keep: int
) -> NDArray[np.int64]:
    """Indices of the `keep` lowest losses of every cost."""
    above = paid - paid.min()
    span = above.max() or 1.0
    places = np.rint(above / (span * 1e-12))
    if len(np.unique(places)) > _PLACES:
        places = np.rint(above / (span / _PLACES))
    order = np.lexsort((losses, places))
    places = places[order]
    rank = np.arange(len(places)) - np.searchsorted(places, places)
    return order[rank < keep]
