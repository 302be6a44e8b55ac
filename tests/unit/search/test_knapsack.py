"""The knapsack and the predictor against trying everything."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest

from matformer_dist.config import Sample
from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.counting import count_parameters, flops_per_unit
from matformer_dist.errors import UserError
from matformer_dist.nesting import Nesting, Submodel, mix_n_match
from matformer_dist.search import knapsack
from matformer_dist.search.budget import KINDS, Budget, Costs, short_cost
from matformer_dist.search.knapsack import Knapsack
from matformer_dist.search.predictor import Predictor, one_layer_changes
from matformer_dist.search.search import _frontier
from matformer_dist.submodels.slices import Cost

NESTING = Nesting.from_widths([8, 16, 40, 64])
LAYERS = 4
MODEL = LanguageModelConfig(
    d_model=32, n_layers=LAYERS, n_heads=4, d_ff=64, max_seq_len=48, n_kv_heads=2
)
EVERY = [Submodel(NESTING, chosen) for chosen in product(range(4), repeat=LAYERS)]


def costs(latency: tuple[float, ...] = (1.0, 1.7, 2.0, 4.3)) -> Costs:
    return Costs.of(MODEL, NESTING, 307, Sample(16, 16), dtype="bf16", latency_ms=latency)


def random_predictor(seed: int, layers: int = LAYERS) -> Predictor:
    generator = np.random.default_rng(seed)
    return Predictor(5.0, generator.exponential(0.1, (layers, 3)) - 0.01)


def test_costs_match_counts_of_every_submodel() -> None:
    found = costs()
    for one in EVERY[::7]:
        count = count_parameters(MODEL, 307, one)
        assert found.cost("params", one) == count.total
        assert found.cost("flops", one) == flops_per_unit(MODEL, 307, one, Sample(16, 16))
        cache = 2 * LAYERS * 2 * 8 * 16  # keys and values of 2 heads of 8
        assert found.cost("memory", one) == 2 * (count.total + cache)
        assert found.embeddings == count.total - count.non_embedding
    assert found.cost("latency", NESTING.parse("S:1,XL:3", 4)) == pytest.approx(1 + 3 * 3.3 / 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_best_matches_trying_everything(kind: Cost, seed: int) -> None:
    predictor, found = random_predictor(seed), costs()
    sack = Knapsack(predictor, found, kind, keep=6)
    ends = [found.cost(kind, NESTING.uniform(i, LAYERS)) for i in (0, 3)]
    for share in (0, 0.1, 0.33, 0.5, 0.77, 1):
        budget = Budget(kind, ends[0] + share * (ends[1] - ends[0]))
        within = [one for one in EVERY if found.fits(one, budget)]
        expected = sorted(predictor.loss(one) for one in within)[:6]
        best = sack.best(budget, 6)
        assert all(found.fits(one, budget) for one in best)
        assert len(set(best)) == len(best)
        assert [predictor.loss(one) for one in best] == pytest.approx(expected)


def test_too_many_costs_share_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "_PLACES", 25)
    predictor, found = random_predictor(9), costs((1.0, 1.713, 2.0009, 4.3001))
    sack = Knapsack(predictor, found, "latency", keep=4)
    assert len(sack.losses) <= 26 * 4
    for limit in (1.5, 2.2, 3.1, 4.3001):
        within = [one for one in EVERY if found.fits(one, Budget("latency", limit))]
        least = min(predictor.loss(one) for one in within)
        (best,) = sack.best(Budget("latency", limit), 1)
        assert found.fits(best, Budget("latency", limit))
        assert predictor.loss(best) - least < 0.03


def test_the_best_of_a_deep_model_is_near_the_bound_of_its_dual() -> None:
    odd = Nesting.from_widths([1024, 1537, 2048, 3071, 4096, 6111, 8192, 10240])
    deep = LanguageModelConfig(d_model=2560, n_layers=48, n_heads=20, d_ff=10240, max_seq_len=2048)
    found = Costs.of(deep, odd, 256_000, Sample(2048, 2048), dtype="bf16")
    predictor = Predictor(3.0, np.random.default_rng(0).exponential(0.01, (48, 7)))
    sack = Knapsack(predictor, found, "params", keep=12)
    smallest, largest = (found.cost("params", odd.uniform(i, 48)) for i in (0, 7))
    half = Budget("params", (smallest + largest) / 2)
    (best,) = sack.best(half, 1)
    # No multiplier of Lagrange leaves less: a bound from below, by duality.
    added = np.array(found.added["params"])
    gained = np.concatenate([np.zeros((48, 1)), predictor.gains.cumsum(axis=1)], axis=1)
    bounds = [
        predictor.base - (gained - rate * added).max(axis=1).sum() - rate * (half.limit - smallest)
        for rate in np.geomspace(1e-12, 1e-8, 400)
    ]
    assert max(bounds) <= predictor.loss(best) < max(bounds) + 0.005


def true_losses(seed: int) -> dict[Submodel, float]:
    """Losses with diminishing returns, and layers that matter unequally."""
    generator = np.random.default_rng(seed)
    weights = generator.exponential(1.0, LAYERS)

    def loss(one: Submodel) -> float:
        capacity = sum(w * np.log2(width) for w, width in zip(weights, one.widths, strict=True))
        return float(3 + 6 / (2 + capacity))

    return {one: loss(one) for one in EVERY}


@pytest.mark.parametrize("seed", range(4))
def test_predictions_are_exact_at_granularities_and_near_elsewhere(seed: int) -> None:
    truth = true_losses(seed)
    changes = {one: truth[one] for _, _, one in one_layer_changes(NESTING, LAYERS)}
    known = changes | {one: truth[one] for one in NESTING.uniforms(LAYERS)}
    first = Predictor.from_changes(NESTING, LAYERS, known)
    for one in NESTING.uniforms(LAYERS):
        assert first.loss(one) == pytest.approx(truth[one])
    errors = [abs(first.loss(one) - truth[one]) for one in EVERY]
    spread = max(truth.values()) - min(truth.values())
    assert np.mean(errors) < 0.1 * spread
    more = known | {one: truth[one] for one in EVERY[::9]}
    corrected = first.corrected(more)
    later = [abs(corrected.loss(one) - truth[one]) for one in EVERY]
    assert np.mean(later) < np.mean(errors)


def test_the_correction_is_as_strong_as_what_was_measured_allows() -> None:
    """Where losses are sums over layers, many of them leave nothing to guess; where they are noise
    around the first guess, it stays."""
    moved = []
    for seed in range(20):
        truth, guess = random_predictor(seed), random_predictor(seed + 100)
        sums = {one: truth.loss(one) for one in EVERY[::3]}
        exact = guess.corrected(sums)
        assert max(abs(exact.loss(one) - truth.loss(one)) for one in EVERY) < 1e-3
        noise = 0.1 * np.random.default_rng(seed).standard_normal(len(EVERY))
        kept = guess.corrected(
            {EVERY[i]: guess.loss(EVERY[i]) + noise[i] for i in range(0, 256, 8)}
        )
        moved.append(np.mean([abs(kept.loss(one) - guess.loss(one)) for one in EVERY]))
    assert np.mean(moved) < 0.02  # 0.04 without a thought of the noise


def test_budgets_of_a_frontier_lie_from_end_to_end() -> None:
    found = costs()
    ladder = [found.cost("params", one) for one in mix_n_match(NESTING, LAYERS)]
    budgets = [budget.limit for budget in _frontier(found, "params", 5)]
    evenly, uniform = {0, 3, 6, 9, 12}, {0, 4, 8, 12}
    assert budgets == [ladder[i] for i in sorted(evenly | uniform)]


def test_one_layer_changes_are_each_step_of_each_layer_from_both_sides() -> None:
    changes = list(one_layer_changes(NESTING, LAYERS))
    assert len(changes) == 2 * LAYERS * 3 and len({one for *_, one in changes}) == len(changes)
    for layer, step, one in changes:
        others = {one.granularities[i] for i in range(LAYERS) if i != layer}
        assert {one.granularities[layer], *others} == {step - 1, step} and len(others) == 1


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("params=1.5B", "params", 1.5e9), ("params= 20000", "params", 2e4),
        ("flops=3GFLOP", "flops", 3e9), ("flops=3e9", "flops", 3e9),
        ("memory=4GiB", "memory", 2**32), ("memory=5.2MB", "memory", 5.2e6),
        ("latency=12ms", "latency", 12), ("latency=0.5s", "latency", 500),
    ],
)  # fmt: skip
def test_budgets_are_read(text: str, kind: str, limit: float) -> None:
    budget = Budget.parse(text)
    assert budget.kind == kind and budget.limit == pytest.approx(limit)
    assert Budget.parse(f"{kind}={short_cost(budget.kind, limit, 6)}").limit == pytest.approx(limit)


@pytest.mark.parametrize(
    "text",
    ["1.5B", "size=3", "params=", "params=-1", "params=0", "params=1e99", "params=3GiB",
     "latency=12", "memory=nan", "flops=1.2.3", "params=1,5B"],
)  # fmt: skip
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--budget .* must be"):
        Budget.parse(text)


@pytest.mark.parametrize(("limit", "where"), [(100, "below S"), (10**9, "above XL")])
def test_budgets_out_of_range_are_told_the_range(limit: float, where: str) -> None:
    found = costs()
    ends = [short_cost("params", found.cost("params", NESTING.uniform(i, 4)), 5) for i in (0, 3)]
    with pytest.raises(UserError, match=rf"{where}.*{ends[0]} \(S\) to {ends[1]} \(XL\)"):
        found.check(Budget("params", limit))


@pytest.mark.parametrize("kind", KINDS)
def test_the_range_that_is_told_can_be_asked_for(kind: Cost) -> None:
    large = LanguageModelConfig(d_model=2568, n_layers=LAYERS, n_heads=4, d_ff=64, max_seq_len=48)
    times = (1.0000001, 2, 3, 4321.98765)
    found = Costs.of(large, NESTING, 32001, Sample(16, 16), dtype="bf16", latency_ms=times)
    with pytest.raises(UserError) as told:
        found.check(Budget(kind, 1e-3))
    smallest, largest = re.findall(r"([0-9.]+[A-Za-z]*) \((?:S|XL)\)", str(told.value))
    for text, one in ((smallest, 0), (largest, 3)):
        budget = Budget.parse(f"{kind}={text}")
        found.check(budget)
        assert found.fits(NESTING.uniform(one, LAYERS), budget)
