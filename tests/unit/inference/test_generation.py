"""Generation with a key-value cache against plain forward passes, and its options."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from matformer_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer
from matformer_dist.errors import UserError
from matformer_dist.inference import loading
from matformer_dist.inference.generation import Drafting, Sampling, generate, sample
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Submodel
from matformer_dist.submodels.extract import extract
from tests.unit.submodels.synthetic_run import (
    NESTING,
    model_config,
    random_model,
    small_tokenizer,
    write_run,
)

GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 9, 200, 31, 7], [1, 300, 44, 44, 2]]


@torch.no_grad()
def greedy_without_cache(
    lm: MatLM, submodel: Submodel, prompts: list[list[int]], steps: int
) -> list[list[int]]:
    tokens = torch.tensor(prompts)
    for _ in range(steps):
        chosen = lm.logits(tokens, submodel)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens[:, len(prompts[0]) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("changes", [{"n_kv_heads": 2}, {"ffn": "gelu", "norm": "layernorm"}])
@pytest.mark.parametrize("notation", ["S", "XL", "S:1,L:2"])
def test_cached_greedy_matches_uncached(changes: dict[str, Any], notation: str) -> None:
    lm = random_model(model_config(**changes))
    submodel = NESTING.parse(notation, 3)
    expected = greedy_without_cache(lm, submodel, PROMPTS, 43)
    assert len({token for row in expected for token in row}) > 10
    actual = generate(lm, submodel, PROMPTS, max_new_tokens=43, sampling=GREEDY)
    assert actual == expected
    alone = generate(lm, submodel, PROMPTS[1:], max_new_tokens=43, sampling=GREEDY)
    assert alone == expected[1:]


def test_generation_ends_with_the_document() -> None:
    lm = random_model(model_config())
    submodel = NESTING.uniform(3, 3)
    rows = greedy_without_cache(lm, submodel, PROMPTS, 20)
    eod = rows[0][6]
    cut = [row[: row.index(eod)] if eod in row else row for row in rows]
    assert [len(row) for row in cut] != [20, 20]
    actual = generate(lm, submodel, PROMPTS, max_new_tokens=20, sampling=GREEDY, eod=eod)
    assert actual == cut


def test_draws_follow_the_limited_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.05, 0.25])
    logits = probabilities.log().expand(40_000, 5)

    def frequencies(sampling: Sampling) -> list[float]:
        drawn = sampling.draw(
            logits, torch.rand(40_000, generator=torch.Generator().manual_seed(0))
        )
        return (torch.bincount(drawn, minlength=5) / len(drawn)).tolist()

    def close(actual: list[float], weights: list[float]) -> bool:
        expected = [weight / sum(weights) for weight in weights]
        return all(
            abs(a - e) < 0.015 and (a == 0) == (e == 0)
            for a, e in zip(actual, expected, strict=True)
        )

    assert close(frequencies(Sampling()), [0.1, 0.4, 0.2, 0.05, 0.25])
    assert close(frequencies(Sampling(top_k=2)), [0, 0.4, 0, 0, 0.25])
    # 0.4 + 0.25 = 0.65 falls short of 0.7: a third is needed.
    assert close(frequencies(Sampling(top_p=0.7)), [0, 0.4, 0.2, 0, 0.25])
    assert close(frequencies(Sampling(top_p=0.1)), [0, 1, 0, 0, 0])
    # Of the three likeliest, 0.4 + 0.25 holds 0.76.
    assert close(frequencies(Sampling(top_k=3, top_p=0.7)), [0, 0.4, 0, 0, 0.25])
    assert close(frequencies(Sampling(temperature=0.5)), [0.01, 0.16, 0.04, 0.0025, 0.0625])
    assert frequencies(GREEDY) == [0, 1, 0, 0, 0]
    # The fewest that hold half: one of two that are as likely.
    assert (Sampling(top_p=0.5).probabilities(torch.zeros(1, 2)) > 0).sum() == 1


def test_a_seed_gives_the_same_text_again() -> None:
    lm = random_model(model_config())
    submodel = NESTING.uniform(1, 3)
    rows = [
        generate(lm, submodel, PROMPTS, max_new_tokens=30, sampling=Sampling(), seed=seed)
        for seed in (1, 1, 2)
    ]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[1, 2], []], 4, r"prompt 1 of 2 \(from 0\) is empty"),
        ([], 4, "there is no prompt"),
        ([[1, 2], [1] * 40], 9, "prompt of 40 tokens and 9 new tokens .* at most 48"),
        ([[1] * 40], 9, "prompt of 40 tokens and 9 new tokens .* at most 48"),
        ([[1]], 0, "at least 1 new token"),
    ],
)
def test_prompts_that_do_not_fit_are_named(prompts: Any, new: int, message: str) -> None:
    lm = random_model(model_config())
    with pytest.raises(UserError, match=message):
        generate(lm, NESTING.uniform(0, 3), prompts, max_new_tokens=new, sampling=GREEDY)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
@pytest.mark.parametrize("drafting", [None, Drafting(NESTING.uniform(0, 3))])
def test_logits_that_are_no_numbers_are_named(
    sampling: Sampling, drafting: Drafting | None
) -> None:
    lm = random_model(model_config())
    with torch.no_grad():
        lm.final_norm.weight[0] = float("nan")  # type: ignore[index,operator]
    with pytest.raises(UserError, match=r"logits are not numbers: .* an earlier checkpoint"):
        generate(
            lm, NESTING.uniform(3, 3), PROMPTS, max_new_tokens=4, sampling=sampling,
            drafting=drafting,
        )  # fmt: skip


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
@pytest.mark.parametrize("drafting", [None, Drafting(NESTING.uniform(0, 3))])
@pytest.mark.parametrize("passes", range(1, 5))
def test_numbers_that_end_behind_the_prompts_are_named(
    monkeypatch: pytest.MonkeyPatch, sampling: Sampling, drafting: Drafting | None, passes: int
) -> None:
    lm = random_model(model_config())
    logits, calls = lm.head.logits, itertools.count()

    def broken(*arguments: Any) -> torch.Tensor:
        return logits(*arguments) * (float("nan") if next(calls) >= passes else 1.0)

    monkeypatch.setattr(lm.head, "logits", broken)
    with pytest.raises(UserError, match="logits are not numbers"):
        generate(
            lm, NESTING.uniform(3, 3), PROMPTS, max_new_tokens=9, sampling=sampling,
            drafting=drafting,
        )  # fmt: skip


@pytest.mark.parametrize("bad", [307, -1])
def test_ids_that_the_model_has_not_are_named(bad: int) -> None:
    lm = random_model(model_config())
    with pytest.raises(UserError, match=rf"prompt 1 .* holds the id {bad}; ids .* from 0 to 306"):
        generate(lm, NESTING.uniform(3, 3), [[306, 0], [4, bad]], max_new_tokens=2, sampling=GREEDY)


def test_submodels_of_other_depths_are_named() -> None:
    lm = random_model(model_config())
    options: dict[str, Any] = {"max_new_tokens": 2, "sampling": GREEDY}
    for layers in (2, 4):
        other = NESTING.uniform(0, layers)
        says = f"submodel S is of {layers} layers, the model has 3"
        with pytest.raises(UserError, match=says):
            generate(lm, other, PROMPTS, **options)
        with pytest.raises(UserError, match=says):
            generate(lm, NESTING.uniform(3, 3), PROMPTS, drafting=Drafting(other), **options)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1e-6), Sampling(1e-40), Sampling(1e-310), Sampling(top_p=1e-9), Sampling(top_k=1)],
)
def test_little_randomness_is_the_likeliest(sampling: Sampling) -> None:
    lm, xl = random_model(model_config()), NESTING.uniform(3, 3)
    expected = generate(lm, xl, PROMPTS, max_new_tokens=20, sampling=GREEDY)
    for drafting in (None, Drafting(NESTING.uniform(0, 3))):
        assert expected == generate(
            lm, xl, PROMPTS, max_new_tokens=20, sampling=sampling, drafting=drafting
        )
    shares = Sampling(1.0, top_p=5e-324).probabilities(torch.tensor([[0.0, 2.0, 1.0]]))
    assert shares.tolist() == [[0.0, 1.0, 0.0]]


def test_more_than_the_vocabulary_is_no_limit() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    found = Sampling(top_k=51).probabilities(logits)
    torch.testing.assert_close(found, logits.softmax(-1))


def test_submodels_are_one_or_one_each() -> None:
    lm = random_model(model_config())
    with pytest.raises(UserError, match="4 submodels were given for 2 prompts"):
        generate(lm, NESTING.uniforms(3), PROMPTS, max_new_tokens=2, sampling=GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_p": 0}, "top_p 0"),
        ({"top_p": 1.5}, r"top_p 1\.5"),
        ({"top_k": -2}, "top_k -2"),
    ],
)
def test_sampling_options_that_do_not_fit_are_named(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**options)


@pytest.fixture(scope="module")
def lm() -> MatLM:
    return random_model(model_config(n_kv_heads=2))


@pytest.fixture(scope="module")
def extracted(lm: MatLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("sample")
    run = write_run(directory / "run", lm)
    found = {}
    for kind in ("native", "hf"):
        (one,) = extract(str(run), ["S:2,M:1"], output=directory / kind, format=kind)
        found[kind] = one.path
    return found


@pytest.mark.parametrize("format", ["native", "hf"])
@pytest.mark.parametrize("prompt", ["def tot", ""])
def test_sample_matches_universal_model_in_place(
    lm: MatLM, extracted: dict[str, Path], format: str, prompt: str
) -> None:
    if format == "hf":
        pytest.importorskip("transformers")
    tokenizer = small_tokenizer()
    parts: list[str] = []
    ids = tokenizer.encode(prompt) or [tokenizer.eod]
    new = 48 - len(ids)
    result = sample(
        extracted[format], prompt, max_new_tokens=new, temperature=0, device="cpu",
        on_text=parts.append,
    )  # fmt: skip
    expected = greedy_without_cache(lm, NESTING.parse("S:2,M:1", 3), [ids], new)[0]
    assert tokenizer.eod not in expected
    assert result.text == tokenizer.decode(expected)
    assert result.tokens == new and result.seconds > 0
    assert "".join(parts) == prompt + result.text and len(parts) > 5 and all(parts)


def test_sample_stops_at_the_end_of_a_document(
    extracted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = small_tokenizer()
    whole = sample(extracted["native"], "def", max_new_tokens=20, temperature=0, device="cpu")
    ids = tokenizer.encode("def")
    loaded = loading.load_language_model(extracted["native"])
    (tokens,) = generate(loaded.model, loaded.submodel, [ids], max_new_tokens=20, sampling=GREEDY)
    monkeypatch.setattr(SentencePieceTokenizer, "eod", tokens[7])
    cut = sample(extracted["native"], "def", max_new_tokens=20, temperature=0, device="cpu")
    first = tokens.index(tokens[7])
    assert cut.tokens == first + 1 < whole.tokens
    assert cut.text == tokenizer.decode(tokens[:first])


def test_low_precision_weights_run_in_fp32_on_a_cpu(lm: MatLM, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lm)
    tokenizer = small_tokenizer()
    prompts = ["d", "total", "re", "(", "co", "s", "#", "n"]  # enough for bf16 to stray from fp32

    def continuations(dtype: torch.dtype) -> list[str]:
        loaded = loading.load_language_model(tmp_path / "native", dtype)
        rows = [
            generate(loaded.model, loaded.submodel, [ids], max_new_tokens=40, sampling=GREEDY)[0]
            for ids in map(tokenizer.encode, prompts)
        ]
        return [tokenizer.decode(row) for row in rows]

    for kind in ("native", "hf"):
        if kind == "hf":
            pytest.importorskip("transformers")
        (one,) = extract(str(run), ["M"], output=tmp_path / kind, format=kind, dtype="bf16")
        texts = [
            sample(one.path, prompt, max_new_tokens=40, temperature=0, device="cpu").text
            for prompt in prompts
        ]
        assert texts == continuations(torch.float32) != continuations(torch.bfloat16)


@pytest.mark.parametrize("format", ["native", "hf"])
@pytest.mark.parametrize("kept", [0, 5, 500, -100])  # of the bytes: none, of the header, of weights
def test_truncated_weights_are_named(
    extracted: dict[str, Path], tmp_path: Path, format: str, kept: int
) -> None:
    if format == "hf":
        pytest.importorskip("transformers")
    damaged = tmp_path / "damaged"
    shutil.copytree(extracted[format], damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"cannot .* the model again"):
        sample(damaged, "x", max_new_tokens=4)


def test_directories_and_prompts_that_do_not_fit_are_named(
    extracted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="is not an extracted model"):
        sample(tmp_path, "x")
    for directory in extracted.values():
        with pytest.raises(UserError, match="at most 48, the model's context"):
            sample(directory, "x", max_new_tokens=48)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install matformer-dist\[export\]"):
        sample(extracted["hf"], "x")
