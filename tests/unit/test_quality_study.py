"""benchmarks/quality: that its models are comparable, and its measures what decoding would do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch

from benchmarks.quality import results, study
from benchmarks.quality.measures import DRAFTED, rounds
from benchmarks.quality.scaling import APART, PAPER, Form, Point, fit
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


def test_universal_models_spend_what_their_granularities_alone_do() -> None:
    """By hand: two FLOPs a weight, and the scores of attention, which are not cut by causality."""
    vocab_size, d, layers, context, batch = 4096, 64, 4, 256, 8 * 256
    attention = 2 * 4 * d * d + 4 * d * context
    tokens = {
        width: layers * (attention + 2 * 3 * d * width) + 2 * d * vocab_size
        for width in (32, 64, 128, 256)
    }
    whole = math.ceil(2_000_000 / batch) * sum(tokens.values())  # of a batch's token
    # All granularities of a batch have the first layer's attention in common.
    joint = sum(tokens.values()) - 3 * attention
    sandwich = tokens[32] + tokens[256] + fmean((tokens[64], tokens[128])) - 2 * attention
    for objective, step in (
        ("per_sequence", fmean(tokens.values())),
        ("sampled", fmean(tokens.values())),
        ("joint", joint),
        ("sandwich", sandwich),
    ):
        run = study.universal(study.SMALL, 1, "any", study.OBJECTIVES[objective])
        # What is drawn differs from what is expected.
        assert run.config().training.total_steps == pytest.approx(whole / step, rel=0.005)
    alone = study.all_in_one(study.SMALL, 1).config().training
    assert alone.total_steps == round(whole / tokens[256])


def test_runs_for_more_tokens_take_as_many_more_steps(runs: list[study.Run]) -> None:
    steps = {
        run.name: run.config().training.total_steps
        for run in runs
        if run.size == study.SMALL and run.seed == 1
    }
    for suffix, share in study.TOKENS.items():
        longer = [name for name in steps if name.endswith(suffix) and "drift" not in name]
        assert study.BEST + suffix in longer and len(longer) >= 5
        for name in longer:
            expected = share * steps[name.removesuffix(suffix)]
            assert steps[name] == pytest.approx(expected, abs=2)
    share = study.CONTINUED * study.TOKENS[study.LONG]
    assert steps["continued-none"] == pytest.approx(share * steps[study.BEST], abs=1)


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


FORMS = {PAPER: (3.5, -0.13, 1.2), APART: (4.5, 0.3, 5.0, 0.35, 1.2)}


@pytest.mark.parametrize("form", list(FORMS), ids=lambda form: form.text)
def test_a_fit_finds_the_numbers_that_made_the_points(form: Form) -> None:
    truth = FORMS[form]
    widths = []
    for noise in (0.001, 0.004):
        found = fit(_noisy_points(form, truth, noise), form, 100)
        assert found.rms_error == pytest.approx(noise, rel=0.6)
        assert found.values[-1] == pytest.approx(truth[-1], abs=0.3)
        shown = form.shown(np.array(truth))
        ends = [(low, high) for _, low, high in found.intervals()]
        assert all(low < value < high for value, (low, high) in zip(shown, ends, strict=True))
        widths.append([high - low for low, high in ends])
    assert all(more > less for less, more in zip(*widths, strict=True))


def _noisy_points(form: Form, values: Sequence[float], noise: float) -> list[Point]:
    random = np.random.default_rng(1)
    return [
        Point(f"{n} {d}", "any", "any", n, d, float(loss + noise * random.standard_normal()))
        for n in (80_000, 260_000, 1_000_000, 4_000_000)
        for d in (1_000_000, 2_000_000, 4_000_000, 8_000_000, 32_000_000)
        for loss in [form.of((np.log(float(n)), np.log(float(d))), *values)]
    ]


def test_points_of_one_run_are_drawn_together() -> None:
    """So many points of few runs tell less than as many of their own."""
    points = _noisy_points(PAPER, FORMS[PAPER], 0.004)
    together = [replace(point, run=str(point.tokens)) for point in points]
    (apart, *_), (of_few, *_) = (
        [high - low for _, low, high in fit(of, PAPER, 100).intervals()]
        for of in (points, together)
    )
    assert of_few > 1.2 * apart


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
