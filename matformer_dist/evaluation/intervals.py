"""Bootstrap intervals of means over validation data (Efron 1979), whole sequences drawn.

Tokens of a sequence depend on each other, so that drawing tokens would make intervals too narrow.
Of retrieval, whole queries are drawn, by the same functions.
"""

from __future__ import annotations

import functools
from math import nan

import torch
from torch import Tensor

RESAMPLES = 2000
SHARE = 0.95
_SEED = 0  # all submodels are resampled alike: so their differences are those of pairs
_DRAWS = 1 << 23  # at once, 8 bytes each


def resampled_means(values: Tensor, counts: Tensor) -> Tensor:
    """A mean a token of each resample, [RESAMPLES, k].

    values [sequences, k]: sums over each sequence's tokens; counts [sequences]: its tokens.
    Computed as sum / tokens of the drawn sequences. Differences of two results of the same
    sequences are resampled differences. NaN of one sequence, which tells nothing of how they vary.
    """
    if len(values) < 2:
        return values.new_full((RESAMPLES, values.shape[1]), nan)
    means = []
    for some in _taken(len(values)).split(_resamples_at_once(len(values))):
        taken = some.double()
        means.append((taken @ values) / (taken @ counts)[:, None])
    return torch.cat(means)


@functools.lru_cache(maxsize=1)  # a search asks for hundreds of submodels, on the same sequences
def _taken(n: int) -> Tensor:
    """How often each resample draws each of n sequences, uint8 [RESAMPLES, n].

    256 draws of one of n, where the mean is 1, do not come: their chance is below 1 in 10^490.
    """
    generator, size = torch.Generator().manual_seed(_SEED), _resamples_at_once(n)
    taken = torch.zeros(RESAMPLES, n, dtype=torch.uint8)
    for some in taken.split(size):
        draws = torch.randint(n, some.shape, generator=generator)
        some.scatter_add_(1, draws, some.new_ones(1, 1).expand(draws.shape))
    return taken


def _resamples_at_once(n: int) -> int:
    return max(1, _DRAWS // n)


def interval(means: Tensor) -> tuple[float, float]:
    """The middle 95% of resampled values; nan where they are not finite."""
    low, high = means.quantile(torch.tensor([(1 - SHARE) / 2, (1 + SHARE) / 2]).to(means)).tolist()
    return low, high
