"""Megatron's indexed files: PREFIX.bin holds token ids, PREFIX.idx where sequences lie in it.

```
.idx   9 bytes magic, u64 version 1, u8 dtype code, u64 sequences N, u64 documents + 1,
       int32 lengths [N] in tokens, int64 offsets [N] in bytes, int64 first sequence of every
       document, and N at the end
```
Megatron-Core's own writer keeps every document's numbers in Python lists; this one keeps none, so
a corpus may have any number of documents. The files are the same, byte for byte.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matformer_dist.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CHUNK = 1 << 20
PARTIAL = ".partial"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """What Megatron stores ids of such a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Writes a pair of files under temporary names; `publish` gives them their own.

    Training cannot mistake an unfinished pair for a whole one: PREFIX.idx appears last, when all
    else is on the disk. Other files of the data set (`PREFIX.json`, ...) are added by
    `write_file` and appear with it. A later writer removes what a killed one left.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any], *, suffixes: Sequence[str], force: bool):
        self.prefix = prefix
        self.dtype = dtype
        self.suffixes = (*suffixes, ".bin", ".idx")  # in the order of publishing
        self.documents = 0
        self.tokens = 0
        self._refuse_to_replace(force)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(self._partial(".bin"), "ab")  # noqa: SIM115
        try:
            fcntl.flock(self._bin, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._bin.close()
            raise UserError(
                f"another process is preparing {prefix} right now; wait for it, or choose "
                "another output"
            ) from None
        self._bin.truncate(0)
        self._lengths = open(self._partial(".lengths"), "wb+")  # noqa: SIM115

    def add(self, tokens: bytes, lengths: NDArray[Any]) -> None:
        """Append documents of `lengths` int32 [documents] tokens each, one after the other."""
        assert lengths.dtype == np.int32
        self._bin.write(tokens)
        self._lengths.write(lengths.tobytes())
        self.documents += len(lengths)
        self.tokens += int(lengths.sum(dtype=np.int64))

    def write_file(self, suffix: str, content: bytes) -> None:
        assert suffix in self.suffixes
        self._partial(suffix).write_bytes(content)

    def publish(self) -> None:
        """Write the index, bring all to the disk, then rename: the index last."""
        self._lengths.flush()
        with open(self._partial(".idx"), "wb") as index:
            self._write_index(index)
        self._lengths.close()
        self._partial(".lengths").unlink()
        self._bin.flush()
        for suffix in self.suffixes:
            _sync(self._partial(suffix))
        self._final(".idx").unlink(missing_ok=True)  # or an old index would meet new tokens
        _sync(self.prefix.parent)
        for suffix in self.suffixes[:-1]:
            os.replace(self._partial(suffix), self._final(suffix))
        _sync(self.prefix.parent)
        os.replace(self._partial(".idx"), self._final(".idx"))
        _sync(self.prefix.parent)
        self.close()

    def close(self) -> None:
        """Remove what is unfinished; after `publish` nothing is. Again: no effect."""
        if self._bin.closed:  # with the lock gone, what lies there may be another writer's
            return
        self._lengths.close()
        for suffix in (*self.suffixes, ".lengths"):
            self._partial(suffix).unlink(missing_ok=True)
        self._bin.close()  # and with it goes the lock

    def _write_index(self, index) -> None:  # type: ignore[no-untyped-def]
        """From the lengths on disk, a chunk at a time."""
        code = next(code for code, dtype in _DTYPES.items() if self.dtype == dtype)
        index.write(_HEADER.pack(_MAGIC, 1, code, self.documents, self.documents + 1))
        self._lengths.seek(0)
        shutil.copyfileobj(self._lengths, index, _CHUNK)
        self._lengths.seek(0)
        offset = 0
        while chunk := self._lengths.read(4 * _CHUNK):
            ends = offset + np.cumsum(np.frombuffer(chunk, np.int32), dtype=np.int64)
            index.write((np.append(offset, ends[:-1]) * self.dtype.itemsize).tobytes())
            offset = int(ends[-1])
        for start in range(0, self.documents + 1, _CHUNK):
            stop = min(start + _CHUNK, self.documents + 1)
            index.write(np.arange(start, stop, dtype=np.int64).tobytes())

    def _refuse_to_replace(self, force: bool) -> None:
        if force or self._partial(".idx").exists():  # the latter: killed while publishing
            return
        there = [str(path) for path in map(self._final, self.suffixes) if path.exists()]
        if there:
            raise UserError(
                f"{' and '.join(there)} exist already; choose another output, or set force to "
                "replace them"
            )

    def _final(self, suffix: str) -> Path:
        return Path(f"{self.prefix}{suffix}")

    def _partial(self, suffix: str) -> Path:
        return Path(f"{self.prefix}{suffix}{PARTIAL}")


@dataclass(frozen=True)
class IndexedFiles:
    """A whole pair of files. `lengths` [sequences] is mapped from the index, in tokens."""

    prefix: str
    dtype: np.dtype[Any]
    lengths: NDArray[Any]

    @property
    def tokens(self) -> int:
        return os.path.getsize(f"{self.prefix}.bin") // self.dtype.itemsize

    def token_ids(self) -> NDArray[Any]:
        """All ids [tokens], mapped."""
        return np.memmap(f"{self.prefix}.bin", self.dtype, "r")


def open_indexed(prefix: str) -> IndexedFiles:
    """Check that both files are there and whole, by their sizes; UserError where they are not."""
    sizes = {}
    for suffix in (".idx", ".bin"):
        path = Path(prefix + suffix)
        if not path.is_file():
            hint = ""
            if prefix.endswith((".bin", ".idx")):
                hint = f" (write the prefix without its ending: {prefix[:-4]})"
            raise UserError(
                f"there is no data file {path}{hint}; a data set is PREFIX.bin and PREFIX.idx, "
                "made by `matformer prepare-data` or Megatron-LM"
            )
        sizes[suffix] = path.stat().st_size
    damaged = f"the data set {prefix} is damaged: {prefix}"
    again = "copy or prepare it again"
    with open(f"{prefix}.idx", "rb") as index:
        header = index.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise UserError(f"{damaged}.idx is cut short after {len(header)} bytes; {again}")
    magic, version, code, sequences, documents = _HEADER.unpack(header)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise UserError(f"{prefix}.idx is not an index of Megatron's, version 1; {again}")
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if sizes[".idx"] != expected:
        raise UserError(
            f"{damaged}.idx has {sizes['.idx']} bytes, for {sequences} sequences it must have "
            f"{expected}; {again}"
        )
    if sequences == 0:
        raise UserError(f"the data set {prefix} is empty; prepare it from a corpus with text")
    dtype = np.dtype(_DTYPES[code])
    lengths = np.memmap(f"{prefix}.idx", np.int32, "r", _HEADER.size, sequences)
    offsets = np.memmap(f"{prefix}.idx", np.int64, "r", _HEADER.size + 4 * sequences, sequences)
    expected = int(offsets[-1]) + int(lengths[-1]) * dtype.itemsize
    if sizes[".bin"] != expected:
        raise UserError(
            f"{damaged}.bin has {sizes['.bin']} bytes, its index says {expected}; {again}"
        )
    return IndexedFiles(prefix, dtype, lengths)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
