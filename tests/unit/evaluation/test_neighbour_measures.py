"""Measures of retrieval against small cases by hand, scipy, and draws at random."""

from __future__ import annotations

from math import isnan

import pytest
import torch
from scipy import stats
from torch import Tensor

from matformer_dist.evaluation import metric_space
from matformer_dist.evaluation.metric_space import Pairs, pearson, ranks, spearman
from matformer_dist.evaluation.neighbour_measures import (
    chances,
    described,
    knn_right,
    overlap,
    recalled,
    vote,
)
from matformer_dist.evaluation.neighbours import normalised

FOUND = torch.tensor([[1, 2, 2, 1, 0], [0, 1, 2, 3, 3], [4, 4, 0, 0, 0], [7, 6, 6, 7, 5]])


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [1, 0, 4, 7]), (3, [2, 0, 4, 6]), (4, [1, 0, 4, 7]), (5, [1, 3, 0, 7])]
)
def test_vote_is_of_the_majority_and_ties_are_the_nearest(k: int, expected: list[int]) -> None:
    assert vote(FOUND[:, :k]).tolist() == expected
    assert knn_right(FOUND, torch.tensor([1, 3, 4, 7]), k).tolist() == [
        float(one == own) for one, own in zip(expected, [1, 3, 4, 7], strict=True)
    ]


def test_recall_asks_for_one_of_the_class_among_the_nearest() -> None:
    labels = torch.tensor([2, 3, 5, 7])
    assert recalled(FOUND, labels, 1).tolist() == [0, 0, 0, 1]
    assert recalled(FOUND, labels, 2).tolist() == [1, 0, 0, 1]
    assert recalled(FOUND, labels, 4).tolist() == [1, 1, 0, 1]


def test_overlap_counts_shared_neighbours_in_any_order() -> None:
    found = torch.tensor([[5, 3, 9, 1], [0, 1, 2, 3], [4, 8, 6, 7]])
    reference = torch.tensor([[3, 5, 1, 9], [9, 8, 0, 7], [4, 8, 6, 7]])
    assert overlap(found, reference, 1).tolist() == [0, 0, 1]
    assert overlap(found, reference, 2).tolist() == [1, 0, 1]
    assert overlap(found, reference, 3).tolist() == pytest.approx([2 / 3, 1 / 3, 1])


def test_means_and_intervals_are_of_queries() -> None:
    right = (torch.arange(400) < 300).double()
    found = described({"right": right, "wrong": 1 - right})
    assert found["right"].value == 0.75
    low, high = found["right"].interval
    assert (low, high) == pytest.approx((0.75 - 0.0424, 0.75 + 0.0424), abs=0.006)
    assert found["wrong"].interval == pytest.approx((1 - high, 1 - low))  # resampled alike


@pytest.mark.parametrize("leave", [False, True])
def test_chances_match_neighbours_drawn_at_random(leave: bool) -> None:
    gallery = torch.tensor([0] * 12 + [1] * 5 + [2] * 3 + [4] * 1)
    queries = gallery if leave else torch.tensor([0, 1, 1, 3, 2, 4, 4, 4])
    ks = [1, 2, 6]
    found = chances(gallery, queries, ks, leave)
    generator, rounds = torch.Generator().manual_seed(3), 2000
    hits: dict[object, float] = dict.fromkeys(["accuracy", *ks, "agreement"], 0.0)
    for _ in range(rounds):
        keys = torch.rand(2, len(queries), len(gallery), generator=generator)
        if leave:
            keys.diagonal(dim1=1, dim2=2).fill_(-1)
        drawn, other = keys.argsort(dim=2, descending=True)[:, :, :6]
        for k in ks:
            hits[k] += float(recalled(gallery[drawn], queries, k).mean()) / rounds
        hits["accuracy"] += float(knn_right(gallery[drawn], queries, 1).mean()) / rounds
        hits["agreement"] += float(overlap(drawn, other, 6).mean()) / rounds
    assert [found.accuracy, *found.recall.values(), found.neighbour_agreement[6]] == pytest.approx(
        [*hits.values()], abs=0.012
    )
    assert list(found.recall) == list(found.neighbour_agreement) == ks
    assert found.majority == pytest.approx(12 / 21 if leave else 1 / 8)
    assert found.own_image_found == 1 / len(queries)


def test_chance_is_certain_where_all_are_drawn() -> None:
    found = chances(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]), [2, 3], False)
    assert found.recall == pytest.approx({2: (1 + 2 / 3) / 3, 3: 2 / 3})


def distances(seed: int, q: int = 60, p: int = 40) -> Tensor:
    return torch.rand(q, p, generator=torch.Generator().manual_seed(seed)).double()


def test_correlations_match_scipy() -> None:
    x = distances(1)
    y = (x + 0.3 * distances(2)) ** 3
    y[:5] = y[0, 0]  # ties
    x, y = (x * 50).round() / 50, y
    for ours, theirs in ((pearson, stats.pearsonr), (spearman, stats.spearmanr)):
        expected = theirs(x.flatten().numpy(), y.flatten().numpy()).statistic
        assert ours(x, y).value == pytest.approx(expected, abs=1e-12)
    assert torch.equal(ranks(x).flatten(), torch.from_numpy(stats.rankdata(x.flatten().numpy())))


def test_intervals_of_correlations_hold_the_truth_as_often_as_they_say() -> None:
    held, truth = 0, 0.6
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        x, noise = torch.randn(2, 60, 20, generator=generator).double()
        low, high = pearson(x, truth * x + (1 - truth**2) ** 0.5 * noise).interval
        held += low <= truth <= high
    assert 0.9 <= held / 200 <= 0.99


def test_the_same_distances_correlate_wholly_and_constant_ones_not_at_all() -> None:
    x = distances(3)
    assert pearson(x, 2 * x + 1).value == pytest.approx(1) == pytest.approx(spearman(x, x).value)
    assert pearson(x, -x).interval == pytest.approx((-1, -1))
    for constant in (torch.full_like(x, 0.3), torch.zeros_like(x)):
        for measure in (pearson, spearman):
            assert isnan(measure(constant, x).value) and isnan(measure(x, constant).interval[0])


@pytest.mark.parametrize(("q", "n"), [(7, 5), (3, 900), (2000, 12)])
@pytest.mark.parametrize("leave", [False, True])
def test_pairs_are_as_many_as_said_and_cover_the_gallery(
    monkeypatch: pytest.MonkeyPatch, q: int, n: int, leave: bool
) -> None:
    monkeypatch.setattr(metric_space, "PAIRS", 1000)
    n = q if leave else n
    pairs = Pairs.draw(q, n, leave)
    assert len(pairs) == {7: 994, 3: 999, 2000: 2000}[q]
    assert torch.equal(pairs.gallery, Pairs.draw(q, n, leave).gallery)
    low, high = int(pairs.gallery.min()), int(pairs.gallery.max())
    assert (low, high) == (0, n - 1) if n < 500 else 0 <= low < high < n
    itself = pairs.gallery == torch.arange(q)[:, None]
    assert itself.any() == (not leave and n < 500)


def test_distances_match_cosine_distances() -> None:
    queries, gallery = (normalised(torch.randn(n, 7), "XL") for n in (30, 50))
    pairs = Pairs.draw(30, 50, False)
    expected = (1 - queries @ gallery.T).double().gather(1, pairs.gallery)
    torch.testing.assert_close(pairs.distances(queries, gallery), expected, atol=1e-6, rtol=0)
