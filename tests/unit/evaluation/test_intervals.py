"""Bootstrap intervals against the normal approximation and against sampling itself."""

from __future__ import annotations

from math import isnan, sqrt

import pytest
import torch

from matformer_dist.evaluation import intervals
from matformer_dist.evaluation.intervals import interval, resampled_means
from matformer_dist.evaluation.measured import Measured, gain


def of_sequences(losses: torch.Tensor, tokens: int = 10) -> torch.Tensor:
    """Sums of sequences whose tokens have these mean losses."""
    sums = torch.zeros(len(losses), 5, dtype=torch.float64)
    sums[:, 0] = losses.double() * tokens
    sums[:, 3] = tokens
    return sums


def test_interval_matches_the_normal_approximation() -> None:
    losses = torch.randn(400, generator=torch.Generator().manual_seed(1)).double() + 3
    half = 1.96 * float(losses.std()) / sqrt(len(losses))
    low, high = interval(resampled_means(losses[:, None] * 7, torch.full((400,), 7.0).double()))
    assert low == pytest.approx(float(losses.mean()) - half, abs=0.15 * half)
    assert high == pytest.approx(float(losses.mean()) + half, abs=0.15 * half)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(2)
    held = 0
    for _ in range(300):
        losses = torch.randn(80, generator=generator).double().exp()  # skewed, of mean exp(1/2)
        low, high = interval(resampled_means(losses[:, None], torch.ones(80).double()))
        held += low <= 1.6487 <= high
    assert 0.86 <= held / 300 <= 0.98  # percentile intervals of skewed means hold a little less


def test_long_sequences_weigh_more() -> None:
    tokens = torch.tensor([10.0, 1.0]).double()
    assert interval(resampled_means(tokens[:, None], tokens)) == (1.0, 1.0)
    sequences = torch.tensor([[10.0, 5, 1, 10, 7], [4.0, 1, 0, 1, 1]]).double()
    measured = Measured(sequences, text_bytes=28)
    assert measured.loss == pytest.approx(14 / 11) and measured.predictions == 11
    assert measured.mean(1) == pytest.approx(6 / 11)
    assert measured.described()["accuracy"] == pytest.approx(8 / 11)
    assert measured.bits_per_byte == pytest.approx(14 / 28 / 0.693147, rel=1e-5)


def test_one_sequence_has_no_interval() -> None:
    alone = Measured(of_sequences(torch.tensor([3.0])), text_bytes=0)
    described = alone.described()
    assert described["loss"] == 3.0 and all(map(isnan, described["loss_interval"]))
    gained, ends = gain(alone, alone)
    assert gained == 0 and all(map(isnan, ends))


def test_gain_of_pairs_is_narrower_than_the_losses() -> None:
    losses = torch.randn(200, generator=torch.Generator().manual_seed(3)).double() + 3
    worse = Measured(of_sequences(losses + 0.01), 1)
    better = Measured(of_sequences(losses), 1)
    gained, (low, high) = gain(better, worse)
    assert gained == pytest.approx(0.01) and low == pytest.approx(0.01) == pytest.approx(high)
    assert gain(worse, better)[0] == pytest.approx(-0.01)
    wide = interval(better.resampled[:, 0])
    assert wide[1] - wide[0] > 0.1


def test_blocks_of_resamples_match_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(300, 2, generator=torch.Generator().manual_seed(4)).double()
    whole = resampled_means(values, torch.ones(300).double())
    intervals._taken.cache_clear()
    monkeypatch.setattr(intervals, "_DRAWS", 300 * 7)
    blocks = resampled_means(values, torch.ones(300).double())
    torch.testing.assert_close(blocks, whole, atol=1e-12, rtol=0)
    intervals._taken.cache_clear()
    assert torch.equal(intervals._taken(300).sum(dim=1), torch.full((2000,), 300))
