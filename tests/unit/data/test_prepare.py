from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matformer_dist.data import corpus, prepare
from matformer_dist.data.documents import DocumentReader
from matformer_dist.data.indexed_files import open_indexed
from matformer_dist.data.prepare import PreparedData, prepare_data
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from tests.unit.data.conftest import make_texts
from tests.unit.data.test_corpus import write
from tests.unit.data.test_workers import is_alive

ROOT = str(Path(__file__).parents[3])


class InThisProcess:
    """In place of Workers, where a test is not about processes: starting them takes a second."""

    def __init__(self, _count: int, function: Callable[[Any], Any]) -> None:
        self.map = lambda tasks: map(function, tasks)

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "Workers", InThisProcess)


def documents_of(prepared: PreparedData) -> list[list[int]]:
    files = open_indexed(str(prepared.prefix))
    ends = np.cumsum(files.lengths)[:-1]
    return [ids.tolist() for ids in np.split(files.token_ids(), ends)]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.usefixtures("in_this_process")
def test_data_of_every_format_match_their_texts(tmp_path: Path, tokenizer_path: Path) -> None:
    texts = [*make_texts(50), "", "▁ odd \x00 text", "  "]
    tokenizer = load_tokenizer(tokenizer_path)
    folder = tmp_path / "corpus"
    folder.mkdir()
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"]
    for name in names:
        write(folder, name, texts, key="body")
    write(folder, "e.txt", ["one text"])
    write(folder, "f.md", [""])
    prepared = prepare_data(
        [folder], tmp_path / "out" / "d", tokenizer=tokenizer_path, text_key="body", workers=1
    )
    kept = [text for text in texts if text] * len(names) + ["one text"]
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in kept]
    assert documents_of(prepared) == expected
    assert prepared.documents == len(kept)
    assert prepared.empty_documents == len(names)
    assert prepared.tokens == sum(map(len, expected))
    assert prepared.text_bytes == sum(len(text.encode()) for text in kept)
    assert prepared.tokenizer == tokenizer_path
    described = json.loads((tmp_path / "out" / "d.json").read_text())
    assert described["tokenizer_sha256"] == tokenizer.digest
    assert (described["documents"], described["tokens"]) == (prepared.documents, prepared.tokens)
    assert sorted(digests(tmp_path / "out")) == ["d.bin", "d.idx", "d.json"]


def test_files_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    """Real processes, a tokenizer trained, files that are cut into several pieces."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder, "a.jsonl", make_texts(4000))
    write(folder, "b.jsonl.gz", make_texts(4000, seed=1))
    write(folder, "c.txt", make_texts(9000, seed=2))
    for i in range(30):
        write(folder, f"d{i}.txt", make_texts(3, seed=i))
    prepared = [
        prepare_data([folder], tmp_path / str(workers) / "d", vocab_size=400, workers=workers)
        for workers in (1, 3)
    ]
    assert digests(tmp_path / "1") == digests(tmp_path / "3")
    assert sorted(digests(tmp_path / "1")) == ["d.bin", "d.idx", "d.json", "d.model"]
    from_text = -(-(folder / "c.txt").stat().st_size // corpus.PIECE_BYTES)
    assert prepared[0].documents == 8000 + from_text + 30 and from_text > 1
    trained = load_tokenizer(prepared[0].tokenizer)
    assert trained.vocab_size == 400
    text = "".join(trained.decode(ids) for ids in documents_of(prepared[0]))
    assert text.endswith("".join(make_texts(3, seed=9)))


@pytest.mark.usefixtures("in_this_process")
def test_bad_input_is_one_clear_message(tmp_path: Path, tokenizer_path: Path) -> None:
    output = tmp_path / "out" / "d"
    text = write(tmp_path, "a.txt", make_texts(3))
    empty = write(tmp_path, "empty.txt", [""])
    blank = write(tmp_path, "blank.jsonl", ["", ""])
    bad = write(tmp_path, "bad.jsonl", ["x"])
    bad.write_text('{"text": "x"}\nhalf')
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "none.txt", {}, "there is no input"),
        (text, {"tokenizer": text}, r"a\.txt is not a SentencePiece model"),
        (text, {"tokenizer": None, "vocab_size": 5000}, "too small for a vocabulary of 5000"),
        (empty, {"tokenizer": None}, "the corpus is empty"),
        (empty, {}, r"the corpus .*empty\.txt is empty: no document holds any text"),
        (blank, {}, r"the corpus .*blank\.jsonl is empty"),
        (bad, {}, r"bad\.jsonl:2: not valid JSON"),
        (bad, {"text_key": "body"}, r"bad\.jsonl:1: no key 'body' \(its keys are text\)"),
        (text, {"workers": -1}, "workers -1 must be 0"),
    ]
    for path, options, message in cases:
        with pytest.raises(UserError, match=message):
            prepare_data([path], output, **{"tokenizer": tokenizer_path, "workers": 1, **options})
        assert not output.parent.exists() or not list(output.parent.iterdir()), message
    blocked = tmp_path / "a.txt" / "d"
    with pytest.raises(UserError, match=r"cannot prepare the data set .*a\.txt/d"):
        prepare_data([text], blocked, tokenizer=tokenizer_path, workers=1)


@pytest.mark.usefixtures("in_this_process")
def test_older_data_are_replaced_only_on_demand(tmp_path: Path, tokenizer_path: Path) -> None:
    text = write(tmp_path, "a.txt", make_texts(3))
    output = tmp_path / "d"
    prepare_data([text], output, tokenizer=tokenizer_path)
    before = digests(tmp_path)
    with pytest.raises(UserError, match=r"exist already; choose another output, or set force"):
        prepare_data([text], output, tokenizer=tokenizer_path)
    assert digests(tmp_path) == before
    write(tmp_path, "a.txt", make_texts(4))
    prepare_data([text], output, tokenizer=tokenizer_path, force=True)
    assert digests(tmp_path)["d.bin"] != before["d.bin"]


def test_bad_line_in_a_worker_is_the_first_in_the_corpus(
    tmp_path: Path, tokenizer_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(4):
        path = write(folder, f"{i}.jsonl", make_texts(10_000))
        lines = path.read_text().splitlines(keepends=True)
        lines[9_000 - i] = "broken\n"
        path.write_text("".join(lines))
    with pytest.raises(UserError, match=r"0\.jsonl:9001: not valid JSON"):
        prepare_data([folder], tmp_path / "d", tokenizer=tokenizer_path, workers=2)
    assert "Traceback" not in capfd.readouterr().err
    assert list(tmp_path.glob("d*")) == []


@pytest.mark.usefixtures("in_this_process")
def test_tokenizer_sample_stays_within_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a file that compresses far better than is reckoned with."""
    monkeypatch.setattr(corpus, "PIECE_BYTES", 1000)
    texts = {"a.jsonl": make_texts(5000), "b.jsonl.zst": make_texts(1) * 5000}
    for name, written in texts.items():
        path = write(tmp_path, name, written)
        source = prepare._Corpus((str(path),), corpus.INCLUDE, (), DocumentReader())
        whole = sum(len(text.encode()) for text in written)
        for limit in (20_000, 1 << 18, 1 << 30):
            sampled = list(prepare._Training(source, limit)._sample())
            size = sum(len(text.encode()) for text in sampled)
            assert 0.3 * min(limit, whole) < size <= limit + 4 * len(sampled[-1])


SCRIPT = """
import sys
from matformer_dist.data.prepare import prepare_data
from matformer_dist.errors import UserError
if __name__ == "__main__":
    try:
        prepare_data([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3] or None, vocab_size=400,
                     workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": ROOT},
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def wait_until(condition: Callable[[], Any], timeout_s: float = 240) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def session_of(process: int) -> list[int]:
    """Living processes that `process` started, and itself."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if os.getsid(int(folder.name)) == process and is_alive(int(folder.name)):
                found.append(int(folder.name))
        except (ValueError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_stopped_preparation_leaves_nothing_to_train_on_and_can_be_repeated(
    tmp_path: Path, tokenizer_path: Path, name: str
) -> None:
    folder = tmp_path / "out"
    text = write(tmp_path, "a.txt", make_texts(150_000))
    process = start(tmp_path, text, folder / "d", tokenizer_path)
    partial = folder / "d.bin.partial"
    wait_until(lambda: partial.exists() and partial.stat().st_size > 0)
    if name == "SIGKILL":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    _, errors = process.communicate(timeout=240)
    assert process.returncode == (-9 if name == "SIGKILL" else 130), errors
    assert "Traceback" not in errors
    wait_until(lambda: session_of(process.pid) == [], timeout_s=120)
    with pytest.raises(UserError, match=r"there is no data file .*d\.idx"):
        open_indexed(str(folder / "d"))
    assert partial.exists() == (name == "SIGKILL")
    write(tmp_path, "a.txt", make_texts(10))
    prepare_data([text], folder / "d", tokenizer=tokenizer_path, workers=1)
    assert sorted(path.name for path in folder.iterdir()) == ["d.bin", "d.idx", "d.json"]
    assert len(open_indexed(str(folder / "d")).lengths) == 1


def test_interrupted_tokenizer_training_ends_at_once(tmp_path: Path) -> None:
    text = write(tmp_path, "a.txt", make_texts(150_000))
    process = start(tmp_path, text, tmp_path / "d", "")
    wait_until(lambda: len(session_of(process.pid)) > 1)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert not re.search("Traceback", errors)
    wait_until(lambda: session_of(process.pid) == [], timeout_s=120)
    assert list(tmp_path.glob("d.*")) == []


@pytest.mark.usefixtures("in_this_process")
def test_progress_is_lines_where_there_is_no_terminal(
    tmp_path: Path,
    tokenizer_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("matformer_dist.data.progress._SECONDS_BETWEEN_LINES", 0.0)
    text = write(tmp_path, "a[b].txt", make_texts(20_000))
    prepared = prepare_data([text], tmp_path / "d", tokenizer=tokenizer_path)
    lines = capfd.readouterr().err.splitlines()
    size = f"{text.stat().st_size / 1e6:,.1f} MB"
    expected = re.compile(rf"encoding: [\d.]+ MB of {size}, .* M tokens, .* s left")
    assert any(map(expected.search, lines))
    assert f"{prepared.tokens:,} tokens of {prepared.documents} documents" in lines[-1]
    assert "\x1b" not in "".join(lines)
