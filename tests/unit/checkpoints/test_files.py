"""Files are on disk, hashed as written, and whole or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from matformer_dist.checkpoints.files import (
    HashingStream,
    hash_file,
    replace_file,
    replace_json,
    write_file,
)
from matformer_dist.checkpoints.writer import CheckpointWriter


def test_what_is_hashed_while_writing_is_what_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    weights = torch.arange(70_000.0)
    saved = write_file(path, lambda stream: torch.save({"weights": weights}, stream))  # type: ignore[arg-type]
    content = path.read_bytes()
    assert saved.bytes == len(content)
    assert saved.sha256 == hashlib.sha256(content).hexdigest()
    seen: list[int] = []
    assert hash_file(path, seen.append) == saved
    assert sum(seen) == len(content)
    assert torch.equal(torch.load(path)["weights"], weights)


def test_json_has_null_where_a_number_is_not_finite(tmp_path: Path) -> None:
    inf = float("inf")
    replace_json(tmp_path / "x.json", {"a": inf, "b": [(-inf, 1.5)], "c": {"d": inf - inf}, "e": 2})
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert read == {"a": None, "b": [[None, 1.5]], "c": {"d": None}, "e": 2}


def test_a_full_disk_is_named_with_its_file() -> None:
    """Not by torch.save's own error, which says nothing about the disk."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write_file(full, lambda s: torch.save(torch.zeros(100_000), s))  # type: ignore[arg-type]
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(full)


def test_an_error_of_the_disk_is_told_where_the_caller_has_another_for_it() -> None:
    """As torch.save has where the disk becomes full in its last bytes."""

    def save(stream: HashingStream) -> None:
        with contextlib.suppress(OSError):
            for _ in range(100):
                stream.write(bytes(1 << 16))
        raise RuntimeError("unexpected pos 476224 vs 476176")

    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_file(Path("/dev/full"), save)


def test_text_is_replaced_at_once_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    for text in ("step-2", "step-10"):
        replace_file(path, text.encode())
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("in_background", [False, True])
def test_the_writer_tells_what_it_wrote(tmp_path: Path, in_background: bool) -> None:
    writer = CheckpointWriter(in_background)
    weights = torch.ones(5)
    for name in ("a.pt", "b.pt"):
        writer.save({"weights": weights}, str(tmp_path / name))
    if in_background:
        weights.zero_()  # training goes on
    writer.start()
    written = writer.take()
    assert written == {tmp_path / name: hash_file(tmp_path / name) for name in ("a.pt", "b.pt")}
    assert torch.equal(torch.load(tmp_path / "a.pt")["weights"], torch.ones(5))
    assert writer.take() == {}


@pytest.mark.parametrize("in_background", [False, True])
def test_a_failed_write_is_told_when_asked_for_and_only_once(
    tmp_path: Path, in_background: bool
) -> None:
    writer = CheckpointWriter(in_background)
    writer.save({}, str(tmp_path / "missing" / "a.pt"))
    writer.save({}, str(tmp_path / "b.pt"))
    writer.start()
    with pytest.raises(FileNotFoundError):
        writer.take()
    writer.start()
    assert writer.take() == {}
    assert not (tmp_path / "b.pt").exists(), "nothing more was to be written"


def test_what_is_written_beside_the_training_is_what_was_saved(tmp_path: Path) -> None:
    """Structure too; and again, in the memory of the time before, where other shapes came first."""
    writer = CheckpointWriter(in_background=True)
    for name, rows in (("a", 2), ("b", 4), ("c", 2), ("d", 2)):
        weight = torch.nn.Parameter(torch.ones(rows, 3))
        state = {"module": {"w": weight, "again": weight}, "steps": [1, (weight.data[0], "x")]}
        writer.save(state, str(tmp_path / name))
        with torch.no_grad():
            weight.zero_()  # training goes on
        writer.start()
        writer.take()
        found = torch.load(tmp_path / name, weights_only=True)
        assert torch.equal(found["module"]["w"], torch.ones(rows, 3))
        assert found["module"]["w"].data_ptr() == found["module"]["again"].data_ptr()
        assert not found["module"]["w"].requires_grad
        assert found["steps"][0] == 1 and torch.equal(found["steps"][1][0], torch.ones(3))
    sizes = {name: (tmp_path / name).stat().st_size for name in "abcd"}
    assert sizes["a"] == sizes["c"] == sizes["d"], "no more than the values is written"


class Opener:
    """A pickle that does something when it is read."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("touched"),)


def test_the_writer_reads_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"optimizer": Opener()}, "bad.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        CheckpointWriter().load("bad.pt")
    assert not Path("touched").exists()
