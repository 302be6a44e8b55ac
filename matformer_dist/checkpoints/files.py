"""Files that are on disk when they are said to be, with the SHA-256 of what was meant to be there.

No torch here, and no collectives.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from matformer_dist.errors import UserError
from matformer_dist.run_directory import SavedFile

BLOCK_BYTES = 1 << 22
_WRITE_BACK_BYTES = 1 << 26  # of a file, after which they are sent on their way to the disk


class HashingStream:
    """What is written to it goes to a file and into a SHA-256, in one pass.

    The first error is kept in `error`: torch.save may report one of its own instead. `advance` is
    told of every block written, in bytes.
    """

    def __init__(self, file: BinaryIO, advance: Callable[[int], object] = lambda _: None) -> None:
        self._file = file
        self._advance = advance
        self._digest = hashlib.sha256()
        self._bytes = self._sent = 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        content = memoryview(data).cast("B")
        for start in range(0, len(content), BLOCK_BYTES):
            self._write_block(content[start : start + BLOCK_BYTES])
        return len(content)

    def _write_block(self, block: memoryview) -> None:
        try:
            self._file.write(block)
        except OSError as error:
            self.error = self.error or error
            raise
        self._digest.update(block)
        self._bytes += len(block)
        if self._bytes - self._sent >= _WRITE_BACK_BYTES:
            start_write_back(self._file, self._sent)
            self._sent = self._bytes
        self._advance(len(block))

    def flush(self) -> None:
        self._file.flush()

    def saved(self) -> SavedFile:
        return SavedFile(bytes=self._bytes, sha256=self._digest.hexdigest())


def write_file(
    path: Path,
    write: Callable[[HashingStream], object],
    advance: Callable[[int], object] = lambda _: None,
) -> SavedFile:
    """Make a file of what `write` writes, on disk when this returns; OSError where it cannot.

    `advance` is told of every block written, in bytes.
    """
    try:
        with path.open("wb") as file:
            stream = HashingStream(file, advance)
            try:
                write(stream)
            except Exception:
                if stream.error is not None:
                    raise stream.error from None
                raise
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return stream.saved()


def start_write_back(file: BinaryIO, first: int) -> None:
    """Have the system begin to put on disk what was written from byte `first` on.

    Else it waits until much has gathered, and the sync at the end takes as long as the disk does.
    """
    file.flush()
    if hasattr(os, "posix_fadvise"):
        # Linux begins to write the dirty pages of a range that it is told will not be read.
        size = file.tell() - first
        os.posix_fadvise(file.fileno(), first, size, os.POSIX_FADV_DONTNEED)


def hash_file(path: Path, advance: Callable[[int], object] = lambda _: None) -> SavedFile:
    """Size and SHA-256 of a file; `advance` is told of every block read, in bytes."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            advance(len(block))
    return SavedFile(bytes=size, sha256=digest.hexdigest())


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` into the file at once: readers find the old or the new, after a crash too."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write_file(temporary, lambda stream: stream.write(content))
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def check_output(file: Path | None) -> None:
    """UserError where what --output asks for cannot be a file: before hours of work for it."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        why = "is a folder" if file.is_dir() else f"has no folder {file.absolute().parent}"
        raise UserError(f"--output {file} {why}; name a file in a folder that is there")


def replace_json(path: Path, content: object) -> None:
    """`replace_file` with JSON of dicts, lists and plain values."""
    replace_file(path, (json_text(content, indent=1) + "\n").encode())


def json_text(content: object, indent: int | None = None) -> str:
    """JSON, in which null stands for a number that is not finite: it has no word for those."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_file(path: Path) -> None:
    """Put the content of a file that somebody else wrote on disk."""
    _sync(path)


def sync_directory(directory: Path) -> None:
    """Put a directory's entries on disk."""
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
