from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from matformer_dist.data import corpus, documents
from matformer_dist.data.corpus import CorpusFile, Piece, Rows, find_files, pieces, sample
from matformer_dist.data.documents import DocumentReader, InvalidText
from matformer_dist.errors import UserError
from tests.unit.data.conftest import make_texts

TEXTS = [*make_texts(200), "", "  ", 'a "quote"\n\\ and \u2028 line', "😀" * 30, "x" * 500]


def write(folder: Path, name: str, texts: list[str], key: str = "text") -> Path:
    """`texts` as a corpus file of the format that `name` ends in."""
    path = folder / name
    lines = "".join(json.dumps({"id": i, key: t}) + "\n" for i, t in enumerate(texts)).encode()
    if name.endswith(".parquet"):
        table = pyarrow.table({"id": range(len(texts)), key: texts})
        parquet.write_table(table, path, row_group_size=7)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines[:2000]) + gzip.compress(lines[2000:]))
    elif name.endswith(".zst"):
        path.write_bytes(pyarrow.compress(lines, codec="zstd", asbytes=True))
    elif name.endswith(".jsonl"):
        path.write_bytes(lines)
    else:
        path.write_bytes("".join(texts).encode())
    return path


def corpus_file(path: Path) -> CorpusFile:
    (file,) = find_files([path], corpus.INCLUDE, ())
    return file


def read(path: Path, key: str = "text", invalid: InvalidText = "error") -> list[str]:
    reader = DocumentReader(key, invalid)
    return [text for piece in pieces(corpus_file(path), key) for text in reader.read(piece)]


@pytest.fixture
def cut_every(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def cut(size: int) -> None:
        for module in (corpus, documents):
            monkeypatch.setattr(module, "PIECE_BYTES", size)

    return cut


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("size", [64, 1000, 1 << 20])
def test_documents_match_what_was_written(
    tmp_path: Path, cut_every: Callable[[int], None], name: str, size: int
) -> None:
    cut_every(size)
    path = write(tmp_path, name, TEXTS)
    assert read(path) == TEXTS
    if size == 64:
        cut = list(pieces(corpus_file(path), "text"))
        assert len(cut) > 2
        assert sum(p.disk_bytes for p in cut) == pytest.approx(path.stat().st_size, abs=len(cut))


@pytest.mark.parametrize("seed", range(30))
def test_text_cut_into_documents_matches_the_file(
    tmp_path: Path, cut_every: Callable[[int], None], seed: int
) -> None:
    """At any size, with and without line ends near the cuts, and never inside a character."""
    rng = random.Random(seed)
    size = rng.choice([5, 8, 64, 100])
    cut_every(size)
    letters = rng.choice(["ab\n", "😀é\n", "abcdefghij" * 10 + "\n", "x", "中"])
    text = "".join(rng.choices(letters, k=rng.choice([0, 1, size - 1, size, size + 1, 10 * size])))
    path = write(tmp_path, "a.txt", [text])
    found = read(path)
    assert "".join(found) == text
    assert all(len(part.encode()) <= 2 * size + 4 for part in found)
    if len(text.encode()) <= size:
        assert len(found) <= 1
    if letters == "ab\n":
        assert all(part.endswith("\n") for part in found[:-1] if size == 100)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_byte_order_mark_is_left_out(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf" + (b"hello" if name == "a.txt" else b'{"text": "hello"}\n')
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert [text for text in read(path) if text] == ["hello"]


def test_line_ends_and_null_texts_are_kept_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert read(tmp_path / "a.txt") == ["a\r\nb\rc\n"]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": null}\r\n\r\n{"text": "x"}')
    assert read(tmp_path / "a.jsonl") == ["", "x"]
    parquet.write_table(pyarrow.table({"text": [None, "x"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["", "x"]


@pytest.mark.parametrize("kind", ["large_string", "dictionary"])
def test_other_kinds_of_parquet_strings_are_read(tmp_path: Path, kind: str) -> None:
    column = pyarrow.array(["a", "b", "a"])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", "b", "a"]


def damaged(folder: Path, name: str, lines: list[bytes]) -> Path:
    data = b"".join(lines)
    path = folder / name
    if name.endswith(".gz"):
        data = gzip.compress(data)
    elif name.endswith(".zst"):
        data = pyarrow.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    return path


GOOD = b'{"text": "good"}\n'
BAD_LINES = [
    (b'{"text": "half\n', r"{path}:300: not valid JSON"),
    (b'["text"]\n', r"{path}:300: no key 'text' \(no object\); set text_key"),
    (b'{"body": "x", "id": 3}\n', r"{path}:300: no key 'text' \(its keys are body, id\)"),
    (b'{"text": 3}\n', r"{path}:300: 'text' holds 3, not text"),
    (b'{"text": "caf\xe9"}\n', r"{path}:300: byte 0xE9 at offset 13 is not UTF-8"),
    (b'{"text": "\\ud800 x"}\n', r"{path}:300: character 0 of the text is a lone surrogate"),
    (b"[" * 100_000 + b"\n", r"{path}:300: not valid JSON"),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize(("bad", "message"), BAD_LINES)
def test_bad_line_is_named_by_file_and_line(
    tmp_path: Path, cut_every: Callable[[int], None], name: str, bad: bytes, message: str
) -> None:
    cut_every(1000)
    path = damaged(tmp_path, name, [*[GOOD] * 299, bad, GOOD])
    with pytest.raises(UserError, match=message.format(path=re.escape(str(path)))):
        read(path)


def test_bad_bytes_of_text_and_parquet_are_named(
    tmp_path: Path, cut_every: Callable[[int], None]
) -> None:
    cut_every(100)
    path = tmp_path / "a.txt"
    path.write_bytes(b"line\n" * 100 + b"caf\xe9\n")
    with pytest.raises(UserError, match=r"a\.txt: byte 0xE9 at offset 503 is not UTF-8"):
        read(path)
    invalid = pyarrow.array([b"x"] * 99 + [b"\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": invalid}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: row 99: byte 0xE9 at offset 0"):
        read(tmp_path / "a.parquet")


def test_invalid_text_is_replaced_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9\n")
    assert read(path, invalid="replace") == ["caf\ufffd\n"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xe9 \\ud800 \\ud83d\\ude00"}')
    assert read(path, invalid="replace") == ["\ufffd \ufffd 😀"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_damaged_containers_are_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, make_texts(500))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-9], whole[:1], b"plain text\n" * 99):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"cannot read .*{name}, the file is damaged: "):
            read(path)


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet", TEXTS)
    with pytest.raises(UserError, match=r"has no column 'body'; its columns are id, text"):
        read(path, "body")
    with pytest.raises(UserError, match=r"column 'id' holds int64, not text"):
        read(path, "id")


def test_endless_line_is_refused(
    tmp_path: Path, cut_every: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_every(100)
    for module in (corpus, documents):
        monkeypatch.setattr(module, "LONGEST_LINE_BYTES", 1000)
    long = b'{"text": "' + b"x" * 2000 + b'"}\n'
    for name in ("a.jsonl", "a.jsonl.zst"):
        path = damaged(tmp_path, name, [GOOD, long])
        with pytest.raises(UserError, match=rf"{name}:2: the line is longer than"):
            read(path)


def test_files_of_folders_are_found_by_name(tmp_path: Path) -> None:
    for name in (
        "b.py", "a.txt", "c.bin", ".hidden.txt", "sub/z.jsonl", "sub/deep/d.md", "sub/a.parquet",
        ".git/x.txt", "tests/t.py", "site-packages/p.py",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)

    def found(include: Sequence[str] = corpus.INCLUDE, exclude: Sequence[str] = ()) -> list[str]:
        files = find_files([tmp_path], include, exclude)
        return [os.path.relpath(file.path, tmp_path) for file in files]

    everything = "a.txt b.py site-packages/p.py sub/a.parquet sub/deep/d.md sub/z.jsonl tests/t.py"
    assert found() == everything.split()
    assert found(("*.py",), ("site-*", "tests")) == ["b.py"]
    assert found(("*.bin",)) == ["c.bin"]


def test_inputs_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("none", r"there is no input .*none; give files"),
        ("a.docx", r"a\.docx is of an unsupported type; give \.txt, \.jsonl, \.jsonl\.gz"),
        ("empty", r"the folder .*empty holds no file that matches \*\.txt, \*\.md"),
    ]:
        with pytest.raises(UserError, match=message):
            list(find_files([tmp_path / name], corpus.INCLUDE, ()))
    (file,) = find_files([tmp_path / "a.docx"], ("*.docx",), ())
    assert file.kind == "text"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_sample_is_repeatable_and_all_where_it_fits(
    tmp_path: Path, cut_every: Callable[[int], None], name: str
) -> None:
    cut_every(500)
    file = corpus_file(write(tmp_path, name, make_texts(2000)))
    whole = list(pieces(file, "text"))

    def drawn(limit: int, seed: int = 0) -> list[Piece]:
        return list(sample([file], "text", limit, file.size, seed))

    assert drawn(file.size) == whole
    some = drawn(file.size // 2)
    assert some == drawn(file.size // 2) != drawn(file.size // 2, seed=1)
    assert [piece for piece in whole if piece in some] == some


@pytest.mark.parametrize("name", ["a.txt", "a.parquet"])
@pytest.mark.parametrize("least_reach_bytes", [0, 1 << 22])
@pytest.mark.parametrize("share", [0.3, 0.02])
def test_sample_is_of_the_size_asked_for(
    tmp_path: Path,
    cut_every: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    least_reach_bytes: int,
    share: float,
) -> None:
    """On average over seeds: looking at a part of a large stream, or at some of many files."""
    cut_every(500)
    monkeypatch.setattr(corpus, "_LEAST_REACH_BYTES", least_reach_bytes)
    file = corpus_file(write(tmp_path, name, make_texts(6400, words=6)))
    seeds = 10 if share > 0.1 else 60
    pieces_in_all = len(list(pieces(file, "text")))
    draws = [
        list(sample([file], "text", int(share * file.size), file.size, s)) for s in range(seeds)
    ]
    mean = sum(map(len, draws)) / len(draws) / pieces_in_all
    assert mean == pytest.approx(0.75 * share, rel=0.4)
    if name == "a.parquet" and share == 0.02:
        rows = [piece.first_row for draw in draws for piece in draw if isinstance(piece, Rows)]
        from_behind = max(rows) > 3200
        assert from_behind == (least_reach_bytes > 0)
