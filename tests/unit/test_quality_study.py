"""benchmarks/quality: that its models are comparable, and its measures what decoding would do."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality import results, study
from benchmarks.quality.measures import DRAFTED, rounds
from benchmarks.quality.scaling import Point, fit
from matformer_dist.inference.generation import Drafting, Sampling, generate
from matformer_dist.inference.speculative import Statistics
from tests.unit.submodels.synthetic_run import NESTING, model_config, random_model


@pytest.fixture(scope="module")
def runs() -> list[study.Run]:
    return [run for part in study.MODELS.values() for run in part()]


def test_every_model_has_a_valid_configuration_and_a_place_of_its_own(
    runs: list[study.Run],
) -> None:
    for run in runs:
        assert run.config().run.dir == run.directory
    assert len({run.result for run in runs}) == len(runs)


def test_universal_models_spend_what_their_granularities_alone_do(runs: list[study.Run]) -> None:
    """Or the share of it that their name tells."""

    def flops(run: study.Run) -> float:
        config = run.config()
        return study.step_flops(config) * config.training.total_steps

    seed = study.SEEDS[0]
    sizes = {run.size for run in runs}
    alone = {size: sum(flops(run) for run in study.all_alone(size, seed)) for size in sizes}
    for run in runs:
        if run.family == "universal" and run.seed == seed:
            suffix = run.name[run.name.rfind("-") :]
            share = study.TOKENS.get(suffix, 1.0)
            if run.imported:
                share = study.CONTINUED * study.TOKENS[study.LONG]
            # What is drawn differs by the seed.
            assert flops(run) == pytest.approx(share * alone[run.size], rel=0.005), run


def test_models_that_are_trained_apart_begin_apart_and_universal_ones_alike(
    runs: list[study.Run],
) -> None:
    first = {(run.family, run.seed): run.config().training.seed for run in runs}
    assert len(set(first.values())) == len(first)
    assert all(run.config().training.seed == first[run.family, run.seed] for run in runs)


@pytest.mark.parametrize("draft", ["S", "M", "L"])
def test_rounds_are_those_of_speculative_decoding(draft: str) -> None:
    model = random_model(model_config(init_std=0.3))
    new_tokens, prompts = 40, [[5, 9, 2], [7, 7, 1], [3, 20, 11]]
    layers = model.model.n_layers
    largest, smaller = NESTING.parse("XL", layers), NESTING.parse(draft, layers)
    seen = Statistics()
    texts = generate(
        model, largest, prompts, max_new_tokens=new_tokens, sampling=Sampling(0.0),
        drafting=Drafting(smaller, DRAFTED, "own"), statistics=seen,
    )  # fmt: skip
    whole = torch.tensor([[*p, *text] for p, text in zip(prompts, texts, strict=True)])
    with torch.no_grad():
        guesses = model.logits(whole[:, :-1], smaller).argmax(dim=-1)
    right = (guesses == whole[:, 1:])[:, len(prompts[0]) - 1 :]
    counted = [one for row in right.tolist() for one in rounds(row, DRAFTED)]
    assert sum(asked for asked, _ in counted) == seen.drafted
    assert sum(taken for _, taken in counted) == seen.accepted > 0
    assert len(counted) == seen.verifies
    assert sum(taken + 1 for _, taken in counted) == seen.verified


def test_a_fit_finds_the_numbers_that_made_the_points() -> None:
    a, b, c = 40.0, -0.16, 1.5
    points = [
        Point("any", "any", n, d, (a * float(n * d) ** b + c,))
        for n in (80_000, 260_000, 1_000_000, 4_000_000)
        for d in (1_000_000, 2_000_000)
    ]
    found = fit(points)
    assert found.values == pytest.approx((a, b, c), rel=0.02)
    assert found.largest_error < 1e-4
    for value, (low, high) in zip((a, b, c), found.intervals, strict=True):
        assert min(low, high) - 0.1 * abs(value) <= value <= max(low, high) + 0.1 * abs(value)


def test_seeds_are_paired_where_models_are_compared() -> None:
    """What the data of a seed adds to both is in neither's difference."""
    ours = {1: {"S": 3.0}, 2: {"S": 3.4}, 3: {"S": 3.8}, 4: {"S": 9.0}}
    other = {1: {"S": 3.1}, 2: {"S": 3.5}, 3: {"S": 3.9}}
    found = results.difference(ours, other, "S")
    assert found is not None and found.seeds == 3
    assert found.value == pytest.approx(-0.1) and found.half_width == pytest.approx(0, abs=1e-9)
    apart = results.mean(other, "S")
    assert apart is not None
    # 4.303 is Student's t at 97.5% with two degrees of freedom.
    assert apart.half_width == pytest.approx(4.303 * 0.4 / 3**0.5, rel=1e-3)
    assert results.difference(ours, {}, "S") is None
