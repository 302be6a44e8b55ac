from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matformer_dist.data.huggingface_tokenizer import HuggingFaceTokenizer
from matformer_dist.data.prepare import prepare_data
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from matformer_dist.run_directory import TOKENIZER_FILES
from tests.unit.byte_level import BOS, EOS, byte_level_tokenizer, save_tokenizer
from tests.unit.data.conftest import make_texts
from tests.unit.submodels.odd_texts import ODD

SIZE = 330


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return byte_level_tokenizer(tmp_path_factory.mktemp("json"), make_texts(50), SIZE)


@pytest.mark.parametrize("text", [*ODD, f"a{EOS}b{BOS}"])
def test_decode_gives_back_odd_texts(byte_level: HuggingFaceTokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert byte_level.eod not in ids


@given(text=st.text(st.characters(codec="utf-8"), max_size=200))
def test_decode_gives_back_any_unicode(byte_level: HuggingFaceTokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text)) == text


def test_ids_are_transformers(byte_level: HuggingFaceTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(
        Path(byte_level.source).parent, local_files_only=True
    )
    assert (theirs.eos_token_id, len(theirs)) == (byte_level.eod, byte_level.vocab_size) == (
        SIZE - 1, SIZE,
    )  # fmt: skip
    for text in (*ODD, *make_texts(5, seed=1)):
        assert theirs(text).input_ids == byte_level.encode_prompt(text) or not text
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert plain == byte_level.encode(text)


def test_prompts_begin_as_the_file_says(tmp_path: Path, byte_level: HuggingFaceTokenizer) -> None:
    assert byte_level.encode_prompt("def")[0] == SIZE - 2
    assert byte_level.encode_prompt("") == [SIZE - 2]
    plain = load_tokenizer(save_tokenizer(tmp_path, make_texts(50), SIZE, begins=False))
    assert plain.encode_prompt("def") == plain.encode("def")
    assert plain.encode_prompt("") == [plain.eod]


def test_a_pickled_tokenizer_and_a_copy_elsewhere_are_the_same(
    tmp_path: Path, byte_level: HuggingFaceTokenizer
) -> None:
    assert set(byte_level.files) <= set(TOKENIZER_FILES)
    for name, content in byte_level.files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    copy = load_tokenizer(tmp_path)
    assert "chat_template.jinja" in copy.files and set(copy.files) <= set(TOKENIZER_FILES)
    for again in (copy, pickle.loads(pickle.dumps(byte_level))):
        assert again.digest == byte_level.digest and again.encode("def é") == byte_level.encode(
            "def é"
        )


def test_the_end_of_documents_decides_the_digest(
    tmp_path: Path, byte_level: HuggingFaceTokenizer
) -> None:
    path = save_tokenizer(tmp_path, make_texts(50), SIZE)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": BOS}}))
    other = load_tokenizer(path)
    assert other.files["tokenizer.json"] == byte_level.files["tokenizer.json"]
    assert (other.eod, other.digest != byte_level.digest) == (SIZE - 2, True)


def test_data_are_prepared_with_it(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "json", make_texts(50), SIZE)
    texts = make_texts(20, seed=3)
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = prepare_data([source], tmp_path / "d", tokenizer=path.parent, workers=2)
    tokenizer = load_tokenizer(path)
    assert done.tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert done.tokenizer == path
    assert json.loads((tmp_path / "d.json").read_text())["tokenizer_sha256"] == tokenizer.digest


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, r"cannot read the tokenizer .*tokenizer_config\.json: No such file"),
        ("{}", r"tokenizer_config\.json does not name the eos_token.*KeyError"),
        ('{"eos_token": null}', r"does not name the eos_token, .*\(eos_token None\)"),
        ("[", r"does not name the eos_token.*JSONDecodeError"),
        ('{"eos_token": "</s>"}', r"names the eos_token '</s>', which .*json does not hold"),
    ],
)
def test_a_file_without_an_end_of_documents_is_refused(
    tmp_path: Path, config: str | None, says: str
) -> None:
    path = save_tokenizer(tmp_path, make_texts(50), SIZE)
    (tmp_path / "tokenizer_config.json").unlink()
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match=says):
        load_tokenizer(path)


@pytest.mark.parametrize("content", ["", "{}", "[1", "hello"])
def test_other_files_are_not_taken_for_one(tmp_path: Path, content: str) -> None:
    path = save_tokenizer(tmp_path, make_texts(50), SIZE)
    path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read \(.*; give the tokenizer"):
        load_tokenizer(path)


def test_a_folder_without_any_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither tokenizer\.model nor tokenizer\.json is there"):
        load_tokenizer(tmp_path)


def test_lone_surrogate_is_one_clear_message(byte_level: Any) -> None:
    with pytest.raises(UserError, match=r"'ok \\ud800' holds a lone surrogate"):
        byte_level.encode("ok \ud800")
