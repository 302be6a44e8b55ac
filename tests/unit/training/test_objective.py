from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matformer_dist.config import ObjectiveConfig
from matformer_dist.models.forward_pass import Pass
from matformer_dist.nesting import Nesting
from matformer_dist.training.objective import Objective

NESTING = Nesting.from_fractions(64, ["1/8", "1/4", "1/2", 1])


def objective(**settings: Any) -> Objective:
    return Objective(ObjectiveConfig(**settings), NESTING, n_layers=2, seed=5)


def counts(plan: Pass) -> dict[str, int]:
    return {str(segment.submodel): segment.sequences for segment in plan.segments}


def test_joint_runs_every_granularity_widest_first() -> None:
    plan = objective(kind="joint").plan(0, 0, 1, 3)
    assert counts(plan) == {"XL": 3, "L": 3, "M": 3, "S": 3}
    assert list(counts(plan)) == ["XL", "L", "M", "S"]
    assert plan.shared_tokens
    assert plan.ce_weights == (0.25,) * 4
    assert plan.kl_weights == (0.0,) * 4


def test_joint_weights_follow_their_names() -> None:
    weights = {"XL": 0.4, "S": 0.1, "M": 0.2, "L": 0.3}
    plan = objective(
        kind="joint", weights=weights, z_loss=0.01, distillation=2.0, temperature=3.0
    ).plan(7, 0, 1, 2)
    assert plan.ce_weights == (0.4, 0.3, 0.2, 0.1)
    assert plan.z_weights == pytest.approx((0.004, 0.003, 0.002, 0.001))
    assert plan.kl_weights == pytest.approx((0.0, 0.6, 0.4, 0.2))
    assert plan.temperature == 3.0


def test_sampled_runs_one_granularity_a_step_on_all_ranks() -> None:
    drawn: Counter[str] = Counter()
    sampled = objective(kind="sampled", probabilities={"S": 0.5, "M": 0.5, "L": 0, "XL": 0})
    for step in range(400):
        plans = [sampled.plan(step, i, 4, 3) for i in range(4)]
        assert len({plan.segments for plan in plans}) == 1
        (segment,) = plans[0].segments
        assert segment.sequences == 3
        drawn[str(segment.submodel)] += 1
    assert set(drawn) == {"S", "M"}
    assert 150 < drawn["S"] < 250


def test_sandwich_runs_xl_s_and_one_between() -> None:
    middles: Counter[str] = Counter()
    for step in range(200):
        plan = objective(kind="sandwich", distillation=1.0).plan(step, 0, 1, 2)
        names = list(counts(plan))
        assert names[0] == "XL" and names[2] == "S" and plan.shared_tokens
        assert sum(plan.ce_weights) == pytest.approx(1)
        assert plan.kl_weights[0] == 0 and plan.kl_weights[1] == pytest.approx(1 / 3)
        middles[names[1]] += 1
    assert set(middles) == {"M", "L"} and 60 < middles["M"] < 140


@pytest.mark.parametrize("granularities", [1, 2, 3])
def test_sandwich_fits_small_nestings(granularities: int) -> None:
    nesting = Nesting.from_widths(range(1, granularities + 1))
    plan = Objective(ObjectiveConfig(kind="sandwich"), nesting, 2, 0).plan(0, 0, 1, 1)
    assert len(plan.segments) == granularities


def test_per_sequence_deals_exact_counts_every_micro_batch() -> None:
    dealt = objective(kind="per_sequence")
    for step in range(50):
        for micro_batch in range(3):
            plan = dealt.plan(step, micro_batch, 3, 8)
            assert counts(plan) == {"XL": 2, "L": 2, "M": 2, "S": 2}
            assert not plan.shared_tokens and plan.ce_weights == (1.0,) * 4


@given(
    st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda p: sum(p) > 0.1),
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(0, 1000),
)
def test_per_sequence_counts_are_within_one_of_probabilities(
    shares: list[float], micro_batches: int, sequences: int, step: int
) -> None:
    p = dict(zip(NESTING.names, [share / sum(shares) for share in shares], strict=True))
    dealt = objective(kind="per_sequence", probabilities=p)
    whole: Counter[str] = Counter()
    for micro_batch in range(micro_batches):
        found = counts(dealt.plan(step, micro_batch, micro_batches, sequences))
        assert sum(found.values()) == sequences
        assert all(abs(found.get(name, 0) - sequences * p[name]) <= 1 + 1e-9 for name in p)
        whole.update(found)
    total = micro_batches * sequences
    assert all(abs(whole[name] - total * p[name]) <= 1 + 1e-9 for name in p)


def test_per_sequence_is_right_on_average_for_one_sequence_a_step() -> None:
    p = {"S": 0.44, "M": 0.31, "L": 0.15, "XL": 0.10}
    dealt = objective(kind="per_sequence", probabilities=p)
    drawn = Counter(name for step in range(4000) for name in counts(dealt.plan(step, 0, 1, 1)))
    assert all(abs(drawn[name] / 4000 - p[name]) < 0.03 for name in p)


def test_no_rank_always_carries_the_widest_granularity() -> None:
    """One sequence a micro-batch on four ranks: at a step one runs XL, and it is not the same."""
    dealt = objective(kind="per_sequence")
    widest = Counter(
        rank
        for step in range(200)
        for rank in range(4)
        if "XL" in counts(dealt.plan(step, rank, 4, 1))
    )
    assert set(widest.values()) == {50}


def test_every_granularity_sees_every_place_of_a_micro_batch() -> None:
    """A blend puts its data sets into the same places of every micro-batch."""
    dealt = objective(kind="per_sequence")
    seen: Counter[tuple[str, int]] = Counter()
    for step in range(1000):
        plan = dealt.plan(step, step % 3, 3, 4)
        assert plan.order is not None and sorted(plan.order) == [0, 1, 2, 3]
        for place, name in zip(plan.order, counts(plan), strict=True):  # one sequence each
            seen[name, place] += 1
    assert all(abs(seen[name, place] - 250) < 60 for name in NESTING.names for place in range(4))
    assert dealt.plan(7, 1, 3, 4).order == dealt.plan(7, 1, 3, 4).order
    assert len({dealt.plan(7, i, 9, 4).order for i in range(9)}) > 1
    for kind in ("joint", "sampled", "sandwich"):
        assert objective(kind=kind).plan(0, 0, 1, 4).order is None


def test_a_steps_counts_are_those_of_its_micro_batches() -> None:
    """The whole step as one micro-batch: what the FLOPs of a step are counted from."""
    p = {"S": 0.44, "M": 0.31, "L": 0.15, "XL": 0.10}
    dealt = objective(kind="per_sequence", probabilities=p)
    for step in range(50):
        parts = sum((Counter(counts(dealt.plan(step, i, 5, 3))) for i in range(5)), Counter())
        assert parts == Counter(counts(dealt.plan(step, 0, 1, 15)))


def test_even_micro_batches_are_named() -> None:
    assert objective(kind="joint").even_micro_batch() == 1
    assert objective(kind="per_sequence").even_micro_batch() == 4
    p = {"S": 0.44, "M": 0.31, "L": 0.15, "XL": 0.10}
    assert objective(kind="per_sequence", probabilities=p).even_micro_batch() == 100
    p = {"S": 2**-0.5, "M": 1 - 2**-0.5, "L": 0, "XL": 0}
    assert objective(kind="per_sequence", probabilities=p).even_micro_batch() is None


def test_plans_are_a_function_of_seed_and_step() -> None:
    settings = ObjectiveConfig(kind="sampled")
    one = [Objective(settings, NESTING, 2, 1).plan(s, 0, 1, 2) for s in range(50)]
    again = [Objective(settings, NESTING, 2, 1).plan(s, 0, 1, 2) for s in reversed(range(50))]
    other = [Objective(settings, NESTING, 2, 2).plan(s, 0, 1, 2) for s in range(50)]
    assert one == again[::-1] and one != other
