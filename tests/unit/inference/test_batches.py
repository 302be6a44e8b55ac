"""Rows of different lengths and submodels in one batch: each gets what it gets alone."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from matformer_dist.inference.batch import New, read
from matformer_dist.inference.decoding import decode
from matformer_dist.inference.generation import Drafting, Sampling, generate
from matformer_dist.inference.texts import Piece, as_text, in_order
from matformer_dist.submodels.extract import extract
from tests.unit.submodels.synthetic_run import (
    NESTING,
    VOCAB,
    model_config,
    random_model,
    small_tokenizer,
    write_run,
)

GREEDY = Sampling(temperature=0)
VARIANTS: list[dict[str, Any]] = [{"n_kv_heads": 2}, {"ffn": "gelu", "norm": "layernorm"}]
SCALED: dict[str, Any] = {
    "n_kv_heads": 1, "tied_embeddings": True, "rope_scaling": {"kind": "linear", "factor": 4.0},
}  # fmt: skip
CACHES: list[Literal["own", "shared"]] = ["own", "shared"]
NOTATIONS = ["XL", "S", "S:1,L:2", "M", "XL", "L", "XL:1,S:2", "S"]
SUBMODELS = [NESTING.parse(notation, 3) for notation in NOTATIONS]


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = prompts_of([5, 1, 12, 3, 7, 1, 20, 9])


@pytest.mark.parametrize("changes", VARIANTS)
@torch.no_grad()
def test_mixed_batch_logits_match_each_alone(changes: dict[str, Any]) -> None:
    """Of the prompts, and of a token and three more behind them."""
    lm = random_model(model_config(**changes))
    order = sorted(range(8), key=lambda i: NOTATIONS.index(NOTATIONS[i]))
    texts = [[*PROMPTS[i], *prompts_of([4], seed=i)[0]] for i in order]
    cache = lm.new_cache(8, 24)
    for behind, last in ((0, 1), (1, 1), (4, 3)):
        tokens = [text[: len(text) - 4 + behind] for text in texts]
        found = read(lm, [SUBMODELS[i] for i in order], tokens, cache, last)
        for i, row, logits in zip(order, tokens, found, strict=True):
            alone = lm.logits(torch.tensor([row]), SUBMODELS[i])[0, -last:]
            torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, top_k=50, top_p=0.9), Sampling()])
def test_mixed_batch_tokens_match_each_alone(changes: dict[str, Any], sampling: Sampling) -> None:
    """Also where rows end at their end of document, and leave. A prompt's number is part of its
    seed, so alone it is asked for behind others."""
    lm = random_model(model_config(**changes))
    options: dict[str, Any] = {"max_new_tokens": 28, "sampling": sampling, "seed": 7}
    eod = generate(lm, SUBMODELS, PROMPTS, **options)[3][9]
    together = generate(lm, SUBMODELS, PROMPTS, eod=eod, **options)
    assert len(together[3]) <= 9 and len({len(row) for row in together}) > 1
    for i, row in enumerate(together):
        fillers = [[1]] * i
        alone = generate(lm, SUBMODELS[i], [*fillers, PROMPTS[i]], eod=eod, **options)[i]
        assert row == alone
    assert together[0] != together[4]


def test_draws_of_a_prompt_do_not_hang_on_how_many_follow() -> None:
    lm = random_model(model_config())
    short, long = (
        generate(lm, SUBMODELS[0], PROMPTS[:1], max_new_tokens=n, sampling=Sampling(), seed=3)[0]
        for n in (5, 40)
    )
    assert short == long[:5]


def test_equal_prompts_are_drawn_for_apart() -> None:
    lm = random_model(model_config())
    rows = generate(lm, SUBMODELS[0], [[5, 9]] * 3, max_new_tokens=12, sampling=Sampling())
    assert rows[0] != rows[1] != rows[2] != rows[0]


def test_passes_tell_what_is_new() -> None:
    lm = random_model(model_config())
    passes = list(
        decode(lm, SUBMODELS[:3], PROMPTS[:3], max_new_tokens=4, sampling=GREEDY, eod=None)
    )
    expected = generate(lm, SUBMODELS[:3], PROMPTS[:3], max_new_tokens=4, sampling=GREEDY)
    assert len(passes) == 4
    for i, news in enumerate(passes):
        assert sorted(news) == [New(row, [expected[row][i]], 1, i == 3) for row in range(3)]


def test_long_texts_in_pieces_match_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ids come; and each piece takes as long as the first."""
    tokenizer = small_tokenizer()
    decode = type(tokenizer).decode
    whole = partial(decode, tokenizer)
    lengths: list[int] = []

    def counted(self: Any, ids: Any) -> str:
        lengths.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    for seed in range(20):
        chance = random.Random(seed)
        prompt = [chance.randrange(tokenizer.vocab_size) for _ in range(300)]
        ids = tokenizer.encode("die größte Lücke: 試 🙂, \n\t  " * 20) if seed < 3 else []
        ids += [chance.randrange(tokenizer.vocab_size) for _ in range(1000)]
        passes = [[New(0, [token], 1, i == len(ids) - 1)] for i, token in enumerate(ids)]
        lengths.clear()
        pieces = as_text(passes, [prompt], tokenizer)
        text = "".join(piece.text for piece in pieces)
        assert text == whole(prompt + ids)[len(whole(prompt)) :]
        assert max(lengths[20:]) < 100  # at first, perhaps, no character is whole


def test_pieces_are_whole_characters_and_come_in_order() -> None:
    tokenizer = small_tokenizer()
    text = "def ümläut(€):"
    ids = tokenizer.encode(text)
    prompt = tokenizer.encode("x ")
    passes = [
        [New(1, [token], 1, i == len(ids) - 1), New(0, [token], 1, i == len(ids) - 1)]
        for i, token in enumerate(ids)
    ]
    assert any("\ufffd" in tokenizer.decode(ids[:i]) for i in range(len(ids))), "bytes are pieces"
    pieces = list(as_text(passes, [prompt, prompt], tokenizer))
    assert "\ufffd" not in "".join(piece.text for piece in pieces)
    whole = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
    for row in (0, 1):
        own = [piece for piece in pieces if piece.prompt == row]
        assert "".join(piece.text for piece in own) == whole
        assert [piece.done for piece in own] == [False] * (len(ids) - 1) + [True]
    ordered = list(in_order(pieces))
    assert sorted(ordered, key=lambda piece: piece.prompt) == ordered
    assert sorted(ordered) == sorted(pieces)
    first = next(iter(in_order(iter([Piece(1, "b", 1, True), Piece(0, "a", 1, False)]))))
    assert first.text == "a", "the first prompt's pieces do not wait"


@pytest.mark.parametrize("changes", [*VARIANTS, SCALED])
def test_long_ragged_generation_matches_transformers(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """XL, 200 tokens, against transformers' greedy generation of the export, prompt by prompt; as
    it generates alone, and with drafts."""
    transformers = pytest.importorskip("transformers")
    lm = random_model(model_config(max_seq_len=256, init_std=1.0, **changes))
    (one,) = extract(
        str(write_run(tmp_path / "run", lm)), ["XL"], output=tmp_path / "hf", format="hf"
    )
    hf = transformers.AutoModelForCausalLM.from_pretrained(one.path)
    prompts = prompts_of([3, 17, 1, 9])
    xl, s = NESTING.uniform(3, 3), NESTING.uniform(0, 3)
    ours = generate(lm, xl, prompts, max_new_tokens=200, sampling=GREEDY)
    for cache in CACHES:
        assert ours == generate(
            lm, xl, prompts, max_new_tokens=200, sampling=GREEDY, drafting=Drafting(s, 4, cache)
        )
    for prompt, row in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert row == theirs[0, len(prompt) :].tolist()
        assert len(set(row[100:])) > 15, "varied enough to tell"


def test_transformers_pads_ragged_prompts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    lm = random_model(model_config(init_std=1.0))
    run = write_run(tmp_path / "run", lm)
    (one,) = extract(str(run), ["M"], output=tmp_path / "hf", format="hf")
    texts = ["def total", "x", "return sum(numbers)"]
    ids = list(map(small_tokenizer().encode, texts))
    m = NESTING.uniform(1, 3)
    expected = generate(lm, m, ids, max_new_tokens=20, sampling=GREEDY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(one.path)
    hf = transformers.AutoModelForCausalLM.from_pretrained(one.path)
    assert hf.model.embed_tokens.padding_idx is None
    assert hf.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    found = hf.generate(**batch, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert found[:, batch["input_ids"].shape[1] :].tolist() == expected
