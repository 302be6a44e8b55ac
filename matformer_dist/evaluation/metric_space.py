"""Does an encoder keep the distances of another? On a bounded sample of query-gallery pairs.

Legend: q queries, n images of the gallery, p gallery images drawn for each query, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from matformer_dist.evaluation.intervals import interval, resampled_means
from matformer_dist.evaluation.neighbours import similarities
from matformer_dist.submodels.retrieval_results import Measure

PAIRS = 200_000  # about as many, or one of each query
_SEED = 0
_NO_VARIANCE = 1e-17  # distances are multiples of 1e-9: below, only rounding differs


@dataclass(frozen=True)
class Pairs:
    """Gallery images that each query's distance is taken to, drawn with repetition: [q, p]."""

    gallery: Tensor

    @classmethod
    def draw(cls, q: int, n: int, leave_one_out: bool) -> Pairs:
        """The same for the same numbers of images; leave_one_out: none is the query itself."""
        shape = (q, max(1, PAIRS // q))
        generator = torch.Generator().manual_seed(_SEED)
        drawn = torch.randint(n - leave_one_out, shape, generator=generator)
        if leave_one_out:
            drawn += drawn >= torch.arange(q)[:, None]
        return cls(drawn)

    def __len__(self) -> int:
        return self.gallery.numel()

    def distances(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """Cosine distances of normalised embeddings queries [q, D], gallery [n, D]: fp64 [q, p]."""
        columns = self.gallery.to(queries.device)
        rows = torch.arange(len(columns), device=queries.device).repeat_interleave(columns.shape[1])
        found = 1 - similarities(queries, gallery, rows, columns.flatten())
        return found.view(columns.shape).cpu()


def pearson(distances: Tensor, reference: Tensor) -> Measure:
    """Correlation of distances [q, p]; queries are drawn for the interval. NaN of equal ones."""
    x, y = distances - distances.mean(), reference - reference.mean()
    sums = torch.stack([column.mean(dim=1) for column in (x, y, x * x, y * y, x * y)], dim=1)
    means = resampled_means(sums, sums.new_ones(len(sums)))
    value = float(_correlation(sums.mean(dim=0, keepdim=True)))
    return Measure(value=value, interval=interval(_correlation(means)))


def spearman(distances: Tensor, reference: Tensor) -> Measure:
    """The same of their ranks among all pairs, which are not ranked again for the interval."""
    return pearson(ranks(distances), ranks(reference))


def ranks(values: Tensor) -> Tensor:
    """Places in ascending order from 1 on, equal values at the mean of theirs: as values, fp64."""
    _, inverse, counts = values.flatten().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(dim=0).double()
    return (last - (counts - 1) / 2)[inverse].view(values.shape)


def _correlation(means: Tensor) -> Tensor:
    """Of means of x, y, x^2, y^2 and xy, [r, 5]: [r]. NaN where x or y does not vary."""
    x, y, xx, yy, xy = means.unbind(dim=1)
    var_x, var_y = xx - x * x, yy - y * y
    found = (xy - x * y) / (var_x * var_y).clamp(min=1e-300).sqrt()
    varies = (var_x > _NO_VARIANCE) & (var_y > _NO_VARIANCE)
    return torch.where(varies, found.clamp(-1, 1), nan)
