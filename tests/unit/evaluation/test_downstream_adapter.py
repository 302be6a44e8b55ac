"""Our lm-eval model against lm-eval's own `hf` model, which reads the `hf` export."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from matformer_dist.errors import UserError
from matformer_dist.inference.language import LoadedLanguageModel
from matformer_dist.inference.loading import load_language_model
from matformer_dist.submodels.extract import extract
from tests.unit.submodels.odd_texts import ODD
from tests.unit.submodels.synthetic_run import TEXT, model_config, random_model, write_run

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # which lm-eval's hf model imports
pytest.importorskip("transformers")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from matformer_dist.evaluation.downstream.adapter import MatformerLM
from matformer_dist.evaluation.downstream.quiet import quiet
from matformer_dist.evaluation.downstream.task_loading import load_tasks

CONTEXT = 256  # tokens; some items of the shipped tasks are longer
BYTES = slice(3, 259)  # ids
SUBMODELS = ["S", "M", "L", "XL", "S:1,L:2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lm = random_model(model_config(max_seq_len=CONTEXT))
    with torch.no_grad():  # bytes that are not UTF-8 would be shown in two ways
        lm.head.weight[BYTES] *= 0.2
    return write_run(tmp_path_factory.mktemp("adapter") / "run", lm)


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedLanguageModel:
    return load_language_model(run)


@pytest.fixture(scope="module")
def theirs(run: Path) -> dict[str, Any]:
    """lm-eval's hf model of each submodel's export."""
    with quiet():
        exports = extract(str(run), SUBMODELS, output=run.parent / "exports", format="hf")
        return {
            one.submodel: HFLM(pretrained=str(one.path), device="cpu", batch_size=5)
            for one in exports
        }


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def _instances(kind: Any, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


@pytest.mark.parametrize("submodel", SUBMODELS)
def test_every_metric_of_shipped_tasks_matches_lm_evals_hf_model(
    loaded: LoadedLanguageModel, theirs: dict[str, Any], submodel: str
) -> None:
    found = []
    for lm in (theirs[submodel], MatformerLM(loaded, submodel, batch_size=7)):
        tasks = load_tasks(["stdlib"])
        for task in tasks.tasks.values():
            task.set_config("num_fewshot", 0)
        results = evaluate(
            lm, {"tasks": tasks.tasks, "groups": tasks.groups}, limit=12, bootstrap_iters=0
        )
        found.append(results)
    (expected, actual), (before, after) = (
        [one["results"] for one in found],
        [one["samples"] for one in found],
    )
    assert {*expected} == {"stdlib", "stdlib_cloze", "stdlib_choice"}
    perplexities = [one["stdlib_cloze"].pop("perplexity,none") for one in (expected, actual)]
    assert actual == expected
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-4)
    for name in before:
        for one, other in zip(before[name], after[name], strict=True):
            assert one["arguments"] == other["arguments"]
            _compare([x[0] for x in other["resps"]], [x[0] for x in one["resps"]])


def _compare(actual: Any, expected: Any) -> None:
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    likelihoods = [torch.tensor([value for value, _ in of]) for of in (actual, expected)]
    # Both are sums in fp32: one of -1100 nats has no digit below 1.2e-4.
    torch.testing.assert_close(*likelihoods, rtol=3e-7, atol=1e-4)


def _pairs() -> list[tuple[str, str]]:
    rng = random.Random(3)
    words = [*TEXT.split(), *(text for text in ODD if text.strip())]
    long = " ".join(rng.choices(words, k=400))
    return (
        [
            ("", "def total"),
            ("", " numbers"),
            ("def ", "total(numbers)"),  # white space moves to the continuation
            ("def total \n ", "x"),
            ("naïve café 漢字", " שלום עולם"),
            ("e\u0301 ", "\u2581a"),
            (long, " sum(numbers)"),  # longer than the context
            (long[:300], long[300:400]),
            ("return sum", "("),
            ("return sum", ")"),  # the same but for one token: one sequence
            ("return sum", "s"),
            ("return", " sum("),
        ]
        + [(" ".join(rng.choices(words, k=9)), f" {rng.choice(words)}") for _ in range(20)]
    )


@pytest.mark.parametrize("submodel", ["S", "S:1,L:2"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_loglikelihood_of_odd_requests_matches_lm_evals_hf_model(
    loaded: LoadedLanguageModel, theirs: dict[str, Any], submodel: str, batch_size: int
) -> None:
    requests = _instances("loglikelihood", _pairs())
    # With its cache, theirs takes the wrong rows where one sequence is split at two places.
    theirs[submodel].logits_cache = False
    expected = theirs[submodel].loglikelihood(requests, disable_tqdm=True)
    theirs[submodel].logits_cache = True
    lm = MatformerLM(loaded, submodel, batch_size)
    _compare(lm.loglikelihood(requests, disable_tqdm=True), expected)
    assert len(requests) == lm.requests and lm.truncated == 2
    greedy = _greedy(loaded, submodel, "def total")
    (answer,) = lm.loglikelihood(_instances("loglikelihood", [("def total", greedy)]))
    assert answer[1] and not any(hit for _, hit in expected)


def _greedy(loaded: LoadedLanguageModel, submodel: str, context: str) -> str:
    """A text of one token that is the likeliest one."""
    tokens = torch.tensor([loaded.tokenizer.encode(context)])
    with torch.no_grad():
        best = int(loaded.model.logits(tokens, loaded.parse(submodel))[0, -1].argmax())
    return loaded.tokenizer.decode([best])


@pytest.mark.parametrize("submodel", ["M", "XL"])
def test_rolling_likelihood_matches_lm_evals_hf_model(
    loaded: LoadedLanguageModel, theirs: dict[str, Any], submodel: str
) -> None:
    texts = [*ODD, TEXT, TEXT * 30, "x" * (CONTEXT - 1), "x" * CONTEXT, "x" * (CONTEXT + 1)]
    requests = _instances("loglikelihood_rolling", [(text,) for text in texts])
    expected = theirs[submodel].loglikelihood_rolling(requests, disable_tqdm=True)
    for batch_size in (1, 7):
        lm = MatformerLM(loaded, submodel, batch_size)
        actual = lm.loglikelihood_rolling(requests, disable_tqdm=True)
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert min(expected) < -1000 and expected[0] == 0


@pytest.mark.parametrize("submodel", ["S", "L"])
def test_generated_texts_match_lm_evals_hf_model(
    loaded: LoadedLanguageModel, theirs: dict[str, Any], submodel: str
) -> None:
    prompts = ["def total", "return", "naïve café", TEXT, TEXT * 20, "x"]
    common = {"do_sample": False}
    settings = [
        {"until": ["\n"], "max_gen_toks": 40},
        {"until": ["a", "("], "max_gen_toks": 70},
        {"until": [], "max_gen_toks": 5},
    ]
    pairs = [(prompt, {**common, **one}) for one in settings for prompt in prompts]
    requests = _instances("generate_until", pairs)
    expected = theirs[submodel].generate_until(requests, disable_tqdm=True)
    for batch_size in (1, 7):
        lm = MatformerLM(loaded, submodel, batch_size)
        assert lm.generate_until(requests, disable_tqdm=True) == expected
    assert lm.truncated == len(settings) and len(set(expected)) > 6


def test_sampled_texts_differ_and_repeat(loaded: LoadedLanguageModel) -> None:
    how = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "max_gen_toks": 12, "until": []}
    requests = _instances("generate_until", [("def total", how)] * 4)
    first, again = (MatformerLM(loaded, "M").generate_until(requests) for _ in range(2))
    assert first == again and len(set(first)) > 1


def test_adapters_share_weights(loaded: LoadedLanguageModel) -> None:
    small, large = (MatformerLM(loaded, submodel) for submodel in ("S", "XL"))
    mixed = MatformerLM(loaded, "S:1+L:2")  # as --model_args can have it
    assert str(mixed.submodel) == "S:1,L:2"
    assert small._model is large._model
    requests = _instances("loglikelihood", [("def", " total")])
    before = small.loglikelihood(requests)
    assert large.loglikelihood(requests) != before == small.loglikelihood(requests)


@pytest.mark.parametrize(
    ("kind", "argument", "says"),
    [
        ("loglikelihood", ("def", " x" * CONTEXT), f"at most {CONTEXT}, the model's context"),
        ("loglikelihood", ("def", ""), "0 tokens"),
        ("generate_until", ("def", {"until": [], "num_beams": 4}), "num_beams are unknown"),
        ("generate_until", ("def", {"until": []}), f"context of {CONTEXT}"),
        ("generate_until", ("def", {"until": [], "max_gen_toks": 0}), "max_gen_toks 0"),
    ],
)
def test_requests_that_cannot_be_answered(
    loaded: LoadedLanguageModel, kind: str, argument: Any, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        getattr(MatformerLM(loaded), kind)(_instances(kind, [argument]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch_size": "auto"}, "batch_size 'auto'"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"dtype": "int8"}, "dtype 'int8' must be one of"),
        ({"submodel": "XXL"}, "XXL"),
    ],
)
def test_bad_arguments(run: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        MatformerLM(str(run), **arguments)


def test_lm_eval_finds_the_model_by_name(run: Path, loaded: LoadedLanguageModel) -> None:
    made = get_model("matformer").create_from_arg_string(
        f"pretrained={run}@5,submodel=M", {"batch_size": "3", "device": "cpu"}
    )
    assert isinstance(made, MatformerLM)
    assert (str(made.submodel), made.batch_size) == ("M", 3)
    requests = _instances("loglikelihood", [("def", " total")])
    assert made.loglikelihood(requests) == MatformerLM(loaded, "M").loglikelihood(requests)
