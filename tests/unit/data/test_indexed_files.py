from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from matformer_dist.data import indexed_files
from matformer_dist.data.indexed_files import IndexedWriter, open_indexed, token_dtype
from matformer_dist.errors import UserError


def make_documents(count: int = 50, seed: int = 0, high: int = 400) -> list[NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, high, rng.integers(1, 40)).astype(np.int32) for _ in range(count)]


def write_ours(
    prefix: Path, documents: list[NDArray[Any]], dtype: Any, force: bool = False
) -> None:
    writer = IndexedWriter(prefix, np.dtype(dtype), suffixes=(".json",), force=force)
    try:
        for start in range(0, len(documents), 7):
            some = documents[start : start + 7]
            tokens = np.concatenate(some).astype(dtype).tobytes()
            writer.add(tokens, np.array([len(ids) for ids in some], np.int32))
        writer.write_file(".json", b"{}")
        writer.publish()
    finally:
        writer.close()


def write_megatrons(prefix: Path, documents: list[NDArray[Any]], dtype: Any) -> None:
    """As Megatron-LM's tools/preprocess_data.py does."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(torch.from_numpy(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_match_megatrons_byte_for_byte(
    tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed_files, "_CHUNK", 16)  # several chunks an array
    documents = make_documents()
    write_ours(tmp_path / "ours", documents, dtype)
    write_megatrons(tmp_path / "theirs", documents, dtype)
    for suffix in (".bin", ".idx"):
        ours, theirs = (tmp_path / f"{name}{suffix}" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("ours*")) == [
        "ours.bin", "ours.idx", "ours.json",
    ]  # fmt: skip


def test_dtype_matches_megatrons_choice() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (1, 400, 32000, 65499, 65500, 65536, 262144):
        assert token_dtype(size) == DType.optimal_dtype(size)


def test_opened_files_match_what_was_written(tmp_path: Path) -> None:
    documents = make_documents()
    write_ours(tmp_path / "d.v1", documents, np.uint16)
    files = open_indexed(str(tmp_path / "d.v1"))
    assert files.lengths.tolist() == [len(ids) for ids in documents]
    assert files.token_ids().tolist() == np.concatenate(documents).tolist()
    assert files.tokens == len(files.token_ids())


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_every_truncation_is_found(tmp_path: Path, suffix: str) -> None:
    write_ours(tmp_path / "d", make_documents(5), np.uint16)
    path = tmp_path / f"d{suffix}"
    whole = path.read_bytes()
    for size in [*range(len(whole)), len(whole) + 1]:
        path.write_bytes((whole + b"\0")[:size])
        with pytest.raises(UserError, match=rf"d{suffix} (has \d+ bytes|is cut short)"):
            open_indexed(str(tmp_path / "d"))
    path.write_bytes(whole)
    open_indexed(str(tmp_path / "d"))


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    write_ours(tmp_path / "d", make_documents(5), np.uint16)
    with pytest.raises(UserError, match=r"no data file .*none\.idx; a data set is PREFIX\.bin"):
        open_indexed(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"write the prefix without its ending: .*/d\)"):
        open_indexed(str(tmp_path / "d.bin"))
    for byte in (0, 9, 17):  # magic, version, dtype
        index = bytearray((tmp_path / "d.idx").read_bytes())
        index[byte] ^= 0x55
        (tmp_path / "e.idx").write_bytes(index)
        (tmp_path / "e.bin").write_bytes((tmp_path / "d.bin").read_bytes())
        with pytest.raises(UserError, match=r"e\.idx is not an index of Megatron's"):
            open_indexed(str(tmp_path / "e"))
    (tmp_path / "d.bin").unlink()
    with pytest.raises(UserError, match=r"no data file .*d\.bin"):
        open_indexed(str(tmp_path / "d"))
    write_megatrons(tmp_path / "empty", [], np.uint16)
    with pytest.raises(UserError, match=r"empty is empty"):
        open_indexed(str(tmp_path / "empty"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("force", [False, True])
def test_dying_at_any_moment_of_publishing_leaves_no_half_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """At every call that reaches the disk; afterwards the data are missing, old or new."""
    old, new = make_documents(9), make_documents(9, seed=1)
    prefix = tmp_path / "d"
    calls = left = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*arguments, **options)

        return call

    states = set()
    dead: list[IndexedWriter] = []
    while not calls or left < 0:
        for path in tmp_path.iterdir():
            path.unlink()
        if force:
            write_ours(prefix, old, np.uint16)
        with monkeypatch.context() as patch:
            left = calls
            calls += 1
            for module, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
                patch.setattr(module, name, dying(getattr(module, name)))
            # The dead tidy nothing up, and what they still have in a buffer is lost.
            patch.setattr(IndexedWriter, "close", lambda self: dead.append(self))
            with contextlib.suppress(Killed):
                write_ours(prefix, new, np.uint16, force=force)
        state = state_of(prefix, old, new)
        states.add(state)
        while dead:
            dead.pop()._bin.close()
        if state != "new":  # the same call again mends it
            write_ours(prefix, new, np.uint16, force=force)
        assert state_of(prefix, old, new) == "new"
        assert {path.name for path in tmp_path.iterdir()} == {"d.bin", "d.idx", "d.json"}
    assert states == ({"old", "missing", "new"} if force else {"missing", "new"})
    assert calls > 8


def state_of(prefix: Path, old: list[NDArray[Any]], new: list[NDArray[Any]]) -> str:
    try:
        files = open_indexed(str(prefix))
    except UserError as error:
        return "missing" if "there is no data file" in str(error) else str(error)
    ids = files.token_ids().tolist()
    lengths = files.lengths.tolist()
    for name, documents in (("old", old), ("new", new)):
        if lengths == [len(d) for d in documents] and ids == np.concatenate(documents).tolist():
            return name
    return "mixed"


def test_two_writers_of_one_data_set_do_not_meet(tmp_path: Path) -> None:
    first = IndexedWriter(tmp_path / "d", np.dtype(np.uint16), suffixes=(), force=False)
    with pytest.raises(UserError, match="another process is preparing"):
        IndexedWriter(tmp_path / "d", np.dtype(np.uint16), suffixes=(), force=False)
    first.close()
    write_ours(tmp_path / "d", make_documents(3), np.uint16)


def test_closing_again_leaves_the_next_writer_alone(tmp_path: Path) -> None:
    def writer() -> IndexedWriter:
        return IndexedWriter(tmp_path / "d", np.dtype(np.uint16), suffixes=(".json",), force=True)

    documents = make_documents(3)
    first = writer()
    first.write_file(".json", b"{}")
    first.publish()
    second = writer()
    second.write_file(".json", b"{}")
    second.add(documents[0].astype(np.uint16).tobytes(), np.array([len(documents[0])], np.int32))
    first.close()  # as a `finally` does
    second.publish()
    assert open_indexed(str(tmp_path / "d")).token_ids().tolist() == documents[0].tolist()


def test_existing_data_are_replaced_only_on_demand(tmp_path: Path) -> None:
    write_ours(tmp_path / "d", make_documents(3), np.uint16)
    with pytest.raises(UserError, match=r"d\.json and .*d\.bin and .*d\.idx exist already"):
        write_ours(tmp_path / "d", make_documents(4), np.uint16)
    assert len(open_indexed(str(tmp_path / "d")).lengths) == 3
    write_ours(tmp_path / "d", make_documents(4), np.uint16, force=True)
    assert len(open_indexed(str(tmp_path / "d")).lengths) == 4
