"""AutoTokenizer on an exported directory against our SentencePiece tokenizer."""

from __future__ import annotations

import io
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from matformer_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer
from matformer_dist.errors import UserError
from matformer_dist.submodels.transformers_tokenizer import tokenizer_files
from tests.unit.submodels.odd_texts import CORPUS, ODD

transformers = pytest.importorskip("transformers")


def _train(**options: Any) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 400, "byte_fallback": True,
           "normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options},
    )  # fmt: skip
    return SentencePieceTokenizer.of(model.getvalue(), "test")


@pytest.fixture(scope="module", params=["ours", "dummy-prefix"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our tokenizer, and transformers' of the files that we write."""
    ours = train_tokenizer(CORPUS, 400) if request.param == "ours" else _train()
    directory = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer_files(ours, max_seq_len=2048).items():
        (directory / name).write_text(str(content), encoding="utf-8")
    (directory / "tokenizer.model").write_bytes(ours.model)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return ours, transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


@pytest.mark.parametrize("text", [*ODD, *CORPUS[:3]])
def test_ids_and_text_match_sentencepiece(pair: Any, text: str) -> None:
    _check(pair, text)


_words = st.sampled_from([*ODD, "def ", "self", "--", "==", "=", "-", " ", "  ", "\n", "a", "é"])


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(), st.lists(_words, max_size=30).map("".join)))
def test_ids_and_text_match_sentencepiece_on_any_text(pair: Any, text: str) -> None:
    _check(pair, text)


def _check(pair: Any, text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids)
    if not theirs.backend_tokenizer.normalizer:  # else one space goes before the text
        assert theirs.decode(ids) == text


def test_special_ids_are_ours(pair: Any) -> None:
    ours, theirs = pair
    assert theirs.eos_token_id == ours.eod == theirs.bos_token_id
    assert len(theirs) == ours.vocab_size
    assert theirs.decode([*ours.encode("x"), ours.eod], skip_special_tokens=True) == "x"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text"),
        ({"remove_extra_whitespaces": True}, "it removes spaces"),
        ({"byte_fallback": False, "vocab_size": 150}, "it has no byte pieces"),
        ({"model_type": "unigram", "vocab_size": 310}, "it is not a BPE model"),
        ({"user_defined_symbols": ["<|x|>"]}, "it has user-defined pieces"),
    ],
)
def test_tokenizers_without_an_exact_form_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"{reason}.*--format native"):
        tokenizer_files(_train(**options), max_seq_len=2048)
