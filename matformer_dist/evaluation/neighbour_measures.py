"""What is said of the neighbours that queries find, query by query; and what chance would give.

Legend: q queries, n images of the gallery, k neighbours of a query, nearest first, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from matformer_dist.evaluation.intervals import interval, resampled_means
from matformer_dist.submodels.retrieval_results import Chance, Measure

_Name = TypeVar("_Name")


def vote(labels: Tensor) -> Tensor:
    """The most frequent of the neighbours' labels [q, k], of tied ones the nearest's: [q]."""
    k = labels.shape[1]
    votes = torch.stack([(labels == labels[:, i : i + 1]).sum(dim=1) for i in range(k)], dim=1)
    first = votes.argmax(dim=1, keepdim=True)  # of several maxima, the first
    return labels.gather(1, first)[:, 0]


def knn_right(found: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the vote of the k nearest is the query's own class, fp64 [q]. k = 1: 1-NN.

    found [q, >= k]: labels of neighbours; labels [q].
    """
    return (vote(found[:, :k]) == labels).double()


def recalled(found: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether at least one of the k nearest is of the query's class, fp64 [q].

    Its mean is recall@k as image retrieval has it (Jegou et al. 2011; Oh Song et al. 2016), not the
    share of all relevant images. found [q, >= k]: labels of neighbours; labels [q].
    """
    return (found[:, :k] == labels[:, None]).any(dim=1).double()


def overlap(found: Tensor, reference: Tensor, k: int) -> Tensor:
    """Share of the k nearest that are among the reference's k nearest, in any order, fp64 [q].

    found, reference [q, >= k]: indices in the same gallery.
    """
    both = torch.cat([found[:, :k], reference[:, :k]], dim=1).sort(dim=1).values
    return (both[:, 1:] == both[:, :-1]).sum(dim=1).double() / k


def described(columns: Mapping[_Name, Tensor]) -> dict[_Name, Measure]:
    """Means of values [q], fp64, with their intervals, all resampled alike; NaN for one query."""
    values = torch.stack([*columns.values()], dim=1)
    means = resampled_means(values, values.new_ones(len(values)))
    return {
        name: Measure(value=float(values[:, i].mean()), interval=interval(means[:, i]))
        for i, name in enumerate(columns)
    }


def chances(gallery: Tensor, queries: Tensor, ks: Sequence[int], leave_one_out: bool) -> Chance:
    """What k neighbours drawn at random give. Labels gallery [n], queries [q]; never negative.

    leave_one_out: the queries are the gallery, and none draws itself.
    """
    classes = int(torch.cat([gallery, queries]).max()) + 1
    per_class = torch.bincount(gallery, minlength=classes)
    asked = torch.bincount(queries, minlength=classes).double() / len(queries)  # [C]
    n = len(gallery) - leave_one_out
    same = (per_class - int(leave_one_out)).clamp(min=0).double()  # [C], that a query can find
    recall = {k: float(asked @ (1 - _all_miss(same, n, k))) for k in ks}
    return Chance(
        accuracy=float(asked @ same) / n,
        majority=float(asked[per_class.argmax()]),
        recall=recall,
        neighbour_agreement={k: k / n for k in ks},
        own_image_found=1 / len(queries),
    )


def _all_miss(same: Tensor, n: int, k: int) -> Tensor:
    """Chance that k of n images, without repetition, are none of the `same` [C]: fp64 [C]."""
    drawn = torch.arange(k, dtype=torch.float64)
    return ((n - same[:, None] - drawn).clamp(min=0) / (n - drawn)).prod(dim=1)
