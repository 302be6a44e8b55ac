from __future__ import annotations

import inspect
import io
import pickle
import typing
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from matformer_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from tests.unit.data.conftest import make_texts

CODE = "def f(a,  b):\n\tif a >= 10:\r\n        return  'é中😀'\n\n\n\x00\x0b  "
CASES = [
    "",
    " ",
    "  \t",
    "\n",
    CODE,
    "▁",
    "a▁▁ b▁",
    "<s></s><unk><0x0A>",
    "\ufeffx\u2028\u200b",
    "é",
]


def _trained(texts: list[str], **options: Any) -> bytes:
    """A model as SentencePiece makes it where it is asked for little."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=writer, vocab_size=300,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return writer.getvalue()


@pytest.mark.parametrize("text", CASES)
def test_decode_gives_back_odd_texts(tokenizer: SentencePieceTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(st.characters(codec="utf-8"), max_size=200))
def test_decode_gives_back_any_unicode(tokenizer: SentencePieceTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_parts_of_long_texts_match_the_whole_encoded_at_once(
    tokenizer: SentencePieceTokenizer,
) -> None:
    whole = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    long_text = inspect.getsource(typing) + "".join(make_texts(300)) + " " * 30_000 + "\n" * 9_000
    parts = list(tokenizer._parts(long_text))
    assert len(parts) > 10 and "".join(parts) == long_text
    assert tokenizer.encode(long_text) == whole.encode(long_text)


def test_no_part_is_longer_than_a_million_characters(tokenizer: SentencePieceTokenizer) -> None:
    """Spaces alone offer no exact cut: memory counts more there."""
    text = " " * 3_000_000
    assert max(map(len, tokenizer._parts(text))) <= 1 << 20
    assert "".join(tokenizer._parts(text)) == text


def test_special_ids_and_size_match_sentencepiece(tokenizer: SentencePieceTokenizer) -> None:
    whole = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert tokenizer.eod == whole.piece_to_id("</s>")
    assert tokenizer.vocab_size == 400
    assert tokenizer.eod not in tokenizer.encode("</s>")
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod]) == "a"


def test_training_twice_gives_the_same_file(tokenizer: SentencePieceTokenizer) -> None:
    again = train_tokenizer(make_texts(200), 400)
    assert again.model == tokenizer.model and again.digest == tokenizer.digest
    assert train_tokenizer(make_texts(200, seed=1), 400).digest != tokenizer.digest


def test_pickled_tokenizer_matches_the_original(tokenizer: SentencePieceTokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.digest == tokenizer.digest and again.encode(CODE) == tokenizer.encode(CODE)


def test_tokenizer_with_normalisation_gets_its_text_whole() -> None:
    other = SentencePieceTokenizer.of(_trained(make_texts(200)), "other")
    text = "".join(make_texts(300)) + " a▁b "
    whole = sentencepiece.SentencePieceProcessor(model_proto=other.model)
    assert other.encode(text) == whole.encode(text)


@pytest.mark.parametrize("long", [False, True])
def test_ids_match_transformers_llama_tokenizer(tokenizer_path: Path, long: bool) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(tokenizer_path)
    theirs = transformers.LlamaTokenizer.from_pretrained(
        tokenizer_path.parent,
        add_prefix_space=False,
        add_bos_token=False,
        split_special_tokens=True,
    )
    text = CODE + "<s>" + (inspect.getsource(typing) if long else "".join(make_texts(3)))
    ids = ours.encode(text)
    assert theirs.encode(text) == ids
    assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, len(theirs)) == (ours.eod, 400)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (make_texts(5), 9000, r"too small for a vocabulary of 9000 pieces, it gives at most \d{3}"),
        (make_texts(5), 100, r"100 pieces is too small .* set vocab_size to \d{3} or more"),
        ([], 400, "the corpus is empty"),
        ([""], 400, "the corpus is empty"),
    ],
)
def test_impossible_training_is_one_clear_message(
    texts: list[str], vocab_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, vocab_size)


def test_other_files_are_not_taken_for_tokenizers(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*none\.model: No such file"):
        load_tokenizer(tmp_path / "none.model")
    for content in (b"", b"hello world\n" * 100, tokenizer.model[: len(tokenizer.model) // 2]):
        path = tmp_path / "other.model"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"other\.model is not a SentencePiece model"):
            load_tokenizer(path)


def test_tokenizer_without_end_of_document_is_refused() -> None:
    model = _trained(make_texts(50), eos_id=-1)
    with pytest.raises(UserError, match="no end-of-document piece"):
        SentencePieceTokenizer.of(model, "x")


def test_lone_surrogate_is_one_clear_message(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(UserError, match=r"'ok \\ud800' holds a lone surrogate"):
        tokenizer.encode("ok \ud800")
