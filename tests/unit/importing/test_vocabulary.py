"""Tokenizers beside embeddings of more, as many and fewer rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import torch

from matformer_dist.config_file import load_config
from matformer_dist.config_language import as_language
from matformer_dist.data.sentencepiece_tokenizer import train_tokenizer
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from matformer_dist.importing.import_model import import_model
from matformer_dist.importing.options import ImportOptions
from matformer_dist.importing.vocabulary import find_tokenizer
from matformer_dist.inference.generation import sample
from matformer_dist.submodels.extract import extract
from tests.unit.byte_level import save_tokenizer
from tests.unit.importing.checkpoints import (
    random_llama,
    save,
    some_tokens,
    transformers,
    xl_logits,
)
from tests.unit.submodels.odd_texts import CORPUS, ODD
from tests.unit.submodels.synthetic_run import TEXT, VOCAB, small_tokenizer

PADDED = 320
SIZE = 330


def test_an_embedding_with_more_rows_keeps_them_and_fills_up_the_tokenizer(tmp_path: Path) -> None:
    llama = random_llama(vocab_size=PADDED)
    source = save(llama, tmp_path / "hf")
    model = import_model(source, tmp_path / "run")
    tokens = some_tokens(PADDED)
    with torch.no_grad():
        expected = llama(tokens).logits
    actual = xl_logits(tmp_path / "run", tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert "prepare data with it" in model.notices[0]

    (out,) = extract(str(tmp_path / "run"), ["XL"], output=tmp_path / "out", format="hf")
    hf = transformers.AutoTokenizer.from_pretrained(out.path, local_files_only=True)
    assert len(hf) == PADDED
    text = f"{TEXT} <unused-307> </s>"
    assert hf(text).input_ids == small_tokenizer().encode(text)


def test_added_pieces_have_the_checkpoints_names_and_no_text(tmp_path: Path) -> None:
    save(random_llama(vocab_size=PADDED), tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": 308, "<s>": 309}))
    decoder = {"2": {"content": "</s>"}, "310": {"content": "<|bot|>"}, "312": {"content": "tm"}}
    config = {"added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    original, filled = small_tokenizer(), find_tokenizer(tmp_path, None, PADDED)
    assert (filled.vocab_size, filled.eod) == (PADDED, original.eod)
    processor = sentencepiece.SentencePieceProcessor(model_proto=filled.files["tokenizer.model"])
    names = [processor.id_to_piece(i) for i in range(306, 312)]
    assert names[1:] == ["<unused-307>", "<|user|>", "<unused-309>", "<|bot|>", "<unused-311>"]
    assert processor.id_to_piece(312) == "tm"
    for text in ("<|user|> def", "<unused-307><s>", TEXT, "▁é😀", "tm"):  # "tm" would be one piece
        assert filled.encode(text) == original.encode(text)
        assert filled.decode(filled.encode(text)) == text
    assert find_tokenizer(tmp_path, None, PADDED).files == filled.files
    assert filled.digest != original.digest


def test_names_that_cannot_be_are_not_taken(tmp_path: Path) -> None:
    save(random_llama(vocab_size=PADDED), tmp_path)
    added = {"<unused-308>": 307, "a" * 1000: 309, "\ud800": 310, "\x00": 311, "": 312}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    decoder = {"9" * 5000: {"content": "x"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    filled = find_tokenizer(tmp_path, None, PADDED)
    processor = sentencepiece.SentencePieceProcessor(model_proto=filled.files["tokenizer.model"])
    assert [processor.id_to_piece(i) for i in range(307, 313)] == [
        "<unused-308>", "<<unused-308>>", *(f"<unused-{i}>" for i in range(309, 313))
    ]  # fmt: skip


def test_a_tokenizer_that_fits_is_kept_as_it_is(tmp_path: Path) -> None:
    save(random_llama(), tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run")
    assert load_tokenizer(tmp_path / "run/tokenizer.model").digest == small_tokenizer().digest


def test_a_tokenizer_with_more_pieces_than_rows_is_refused(tmp_path: Path) -> None:
    source = save(random_llama(vocab_size=VOCAB - 1), tmp_path / "hf")
    with pytest.raises(UserError, match=r"has 307 ids, the embedding in .* has 306 rows"):
        import_model(source, tmp_path / "run")


def test_a_checkpoint_without_a_tokenizer_needs_one_by_name(tmp_path: Path) -> None:
    source = save(random_llama(), tmp_path / "hf")
    model = tmp_path / "elsewhere.model"
    (source / "tokenizer.model").rename(model)
    with pytest.raises(UserError, match=r"hf holds no tokenizer: neither tokenizer\.model nor tok"):
        import_model(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    import_model(source, tmp_path / "run", ImportOptions(tokenizer=model))
    assert (tmp_path / "run/tokenizer.model").read_bytes() == model.read_bytes()
    (source / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as of Llama 3's first: tiktoken
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        import_model(source, tmp_path / "other")


@pytest.mark.parametrize("rows", [SIZE, SIZE + 10])
def test_a_tokenizer_json_comes_in_and_goes_out(tmp_path: Path, rows: int) -> None:
    llama = random_llama(vocab_size=rows, eos_token_id=SIZE - 1)
    source = save(llama, tmp_path / "hf")
    (source / "tokenizer.model").unlink()
    save_tokenizer(source, CORPUS, SIZE)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    model = import_model(source, tmp_path / "run")
    run, original = load_tokenizer(tmp_path / "run"), load_tokenizer(source)
    assert (run.vocab_size, run.eod) == (rows, original.eod)
    config = load_config(tmp_path / "run/config.yaml", ["data.train=[[1,x]]"])
    assert as_language(config, "it").data.tokenizer == (tmp_path / "run/tokenizer.json")
    first, *rest = model.notices
    assert first.startswith(f"the checkpoint's texts begin with id {SIZE - 2}; ")
    assert "extracted" not in first, "this tokenizer comes and goes whole"
    assert rest == [] or (rows > SIZE and "prepare data with it" in rest[0])
    for text in (*ODD, TEXT, f"<unused-{SIZE}>", "<|end_of_text|>"):
        assert run.encode(text) == original.encode(text)

    (out,) = extract(str(tmp_path / "run"), ["XL"], output=tmp_path / "out", format="hf")
    hf = transformers.AutoTokenizer.from_pretrained(out.path, local_files_only=True)
    assert len(hf) == rows and hf.chat_template == "{{ messages }}"
    assert hf(TEXT).input_ids == original.encode_prompt(TEXT)
    assert load_tokenizer(out.path).files == run.files
    ours = sample(out.path, "def ", max_new_tokens=9, temperature=0)
    (native,) = extract(str(tmp_path / "run"), ["XL"], output=tmp_path / "native")
    assert sample(native.path, "def ", max_new_tokens=9, temperature=0).text == ours.text
    prompt = torch.tensor([run.encode_prompt("def ")])
    theirs = llama.generate(prompt, max_new_tokens=9, do_sample=False)[0, prompt.shape[1] :]
    assert run.decode(theirs.tolist()) == ours.text


def test_a_tokenizer_json_with_gaps_is_refused(tmp_path: Path) -> None:
    """The reader of Hugging Face would give the ids of other tokens to the added ones."""
    source = save(random_llama(vocab_size=SIZE + 10), tmp_path / "hf")
    (source / "tokenizer.model").unlink()
    path = save_tokenizer(source, CORPUS, SIZE)
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab.pop(merged := next(token for token, i in vocab.items() if i == 300))
    content["model"]["merges"] = [m for m in content["model"]["merges"] if merged not in "".join(m)]
    for token in [token for token in vocab if merged in token]:
        del vocab[token]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"leaves out ids: it gives '<\|begin.* the id 328, which"):
        import_model(source, tmp_path / "run")
    content["added_tokens"] = []
    content["post_processor"] = None
    path.write_text(json.dumps(content))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    with pytest.raises(UserError, match=r"leaves out ids: it gives '<unused-328>' the id 328"):
        import_model(source, tmp_path / "run")


def test_ends_that_differ_are_said(tmp_path: Path) -> None:
    source = save(random_llama(eos_token_id=[7, 9]), tmp_path / "hf")
    model = import_model(source, tmp_path / "run")
    assert "config.json ends texts with id 7, 9, the run's documents end" in model.notices[0]


def test_a_beginning_that_is_lost_is_said(tmp_path: Path) -> None:
    source = save(random_llama(), tmp_path / "hf")
    (source / "tokenizer_config.json").unlink()  # LlamaTokenizer's default is to begin with <s>
    (notice,) = import_model(source, tmp_path / "run").notices
    assert notice == (
        "the checkpoint's texts begin with id 1; documents in prepared data begin with nothing, "
        "and so do prompts here and of extracted models"
    )


def test_another_tokenizer_of_the_right_size_is_taken_where_it_is_named(tmp_path: Path) -> None:
    source = save(random_llama(), tmp_path / "hf")
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(["another text\n" * 3 + TEXT * 3], VOCAB).model)
    import_model(source, tmp_path / "run", ImportOptions(tokenizer=other))
    assert (tmp_path / "run/tokenizer.model").read_bytes() == other.read_bytes()
