"""benchmarks/quality: that its models are comparable, and its measures what decoding would do."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quality import baseline, results, study, tables
from benchmarks.quality.corpus import Corpus
from benchmarks.quality.measures import DRAFTED, rounds
from benchmarks.quality.scaling import APART, PAPER, Form, Point, fit
from matformer_dist.inference.generation import Drafting, Sampling, generate
from matformer_dist.inference.speculative import Statistics
from matformer_dist.submodels.extract import extract
from matformer_dist.training.engine import learning_rate
from tests.unit.submodels.synthetic_run import NESTING, VOCAB, model_config, random_model, write_run


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


def test_every_universal_model_spends_its_share(runs: list[study.Run]) -> None:
    """At every size and with every setting; that FLOPs are counted rightly is tested above."""

    def flops(run: study.Run) -> float:
        config = run.config()
        return study.step_flops(config) * config.training.total_steps

    seed = study.SEEDS[0]
    sizes = {run.size for run in runs}
    alone = {size: sum(flops(run) for run in study.all_alone(size, seed)) for size in sizes}
    for run in runs:
        share = study.TOKENS.get(run.name[run.name.rfind("-") :], 1.0)
        if run.imported:
            share = study.CONTINUED * study.TOKENS[study.LONG]
        if run.family == "universal" and run.seed == seed:
            # What is drawn differs by the seed.
            assert flops(run) == pytest.approx(share * alone[run.size], rel=0.005), run


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


def test_a_fit_of_exact_points_is_exact() -> None:
    a, b, c = 40.0, -0.16, 1.5
    points = _noisy_points(PAPER, (math.log(a), b, c), 0.0)
    found = fit(points, PAPER, 20)
    assert PAPER.shown(found.values) == pytest.approx((a, b, c), rel=0.02)
    assert found.largest_error < 1e-4
    for value, (_, low, high) in zip((a, b, c), found.intervals(), strict=True):
        assert min(low, high) - 0.1 * abs(value) <= value <= max(low, high) + 0.1 * abs(value)


def _noisy_points(form: Form, values: Sequence[float], noise: float) -> list[Point]:
    random = np.random.default_rng(1)
    return [
        Point(f"{n} {d}", "any", n, d, float(loss + noise * random.standard_normal()))
        for n in (80_000, 260_000, 1_000_000, 4_000_000)
        for d in (1_000_000, 2_000_000, 4_000_000, 8_000_000, 32_000_000)
        for loss in [form.of((np.log(float(n)), np.log(float(d))), *values)]
    ]


def test_points_of_one_run_are_drawn_together() -> None:
    """What a run has of luck is in all of its points, and no reason to trust them the more."""
    luck = {1: 0.03, 2: -0.02, 4: 0.01, 8: -0.03, 32: 0.02}  # of the runs, by million tokens
    points = [
        replace(point, loss=point.loss + luck[point.tokens // 1_000_000])
        for point in _noisy_points(PAPER, FORMS[PAPER], 0.001)
    ]
    together = [replace(point, run=str(point.tokens)) for point in points]
    at = np.array([80_000 * 32e6])
    apart, of_runs = (float(np.ptp(fit(of, PAPER, 100).band(at))) for of in (points, together))
    assert of_runs > 1.2 * apart


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


def test_the_baseline_follows_the_same_learning_rates() -> None:
    config = study.read(study.SMALL)
    steps = config.training.total_steps
    for step in (0, 17, 39, 40, 41, 500, steps - 1):
        expected = learning_rate(config.schedule, config.optimizer.lr, step, steps)
        assert baseline.learning_rate(config, step, steps) == pytest.approx(expected)


def test_the_baselines_model_computes_what_ours_does(tmp_path: Path) -> None:
    shape = study.read(study.SMALL).model.model_dump()
    changes = {"vocab_size": VOCAB, "d_ff": NESTING.widths[-1], "init_std": 0.2}
    lm = random_model(model_config(**shape | changes))
    run = write_run(tmp_path / "run", lm)
    (exported,) = extract(str(run), ["XL"], output=tmp_path / "out", format="hf")
    theirs = baseline.llama(lm.model)
    weights = load_file(exported.path / "model.safetensors")
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied
    tokens = torch.randint(0, VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = lm.logits(tokens, NESTING.parse("XL", lm.model.n_layers))
        actual = theirs(input_ids=tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_what_is_held_out_is_neither_known_nor_most_of_the_whole(tmp_path: Path) -> None:
    def words(name: str, lines: int) -> str:
        return "".join(f"the {i}th line of {name}, long enough\n" for i in range(lines))

    texts = {f"{i:02d}": words(str(i), 20) for i in range(12)}
    texts["04"] = words("copied", 12) + words("4", 8)
    texts["05"] = words("copied", 12)
    texts["08"] = words("large", 20_000)
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    trained_on, held_out = Corpus((tmp_path,), held_out=4).split()
    assert [file.stem for file in held_out] == ["00"]
    assert {file.stem for file in trained_on} == {*texts} - {"00", "04", "08"}


def test_results_of_other_text_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for name, size, tokens in (("a", "260k", 7), ("b", "1m", 7), ("c", "78m", 9), ("d", "4m", 8)):
        path = tmp_path / "quality" / size / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"size": size, "data": {"tokens": tokens}}))
        if name != "d":
            results.check_data()
    with pytest.raises(SystemExit, match=r"d.json was measured on .*8.*cannot be compared"):
        results.check_data()


@pytest.mark.parametrize(
    ("name", "values", "verdict"),
    [
        ("XL", [3.01], "held"),  # by 0.33%
        ("XL", [3.02], "lost"),
        ("S", [2.99], "lost"),  # 0.01 better, where 0.02 is wanted
        ("S", [2.97, 2.97, 2.97], "held"),
        ("S", [2.96, 2.97, 2.99], "open"),
    ],
)
def test_a_goal_is_judged_by_the_ends_of_the_interval(
    name: str, values: list[float], verdict: str
) -> None:
    ours = {seed: {name: value} for seed, value in enumerate(values)}
    alone = {seed: {name: 3.0} for seed in range(3)}
    nats, percent = (
        results.difference(ours, alone, name, in_percent=in_percent) for in_percent in (False, True)
    )
    assert nats and percent
    assert tables.verdict(name, nats, percent) == verdict
