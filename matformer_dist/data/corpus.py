"""A corpus' files, cut into pieces of about a megabyte that processes can read on their own.

| file                  | documents                                                               |
|-----------------------|-------------------------------------------------------------------------|
| text (.txt, .py, ...) | the file; above 1 MiB, pieces of about that size, cut at line ends      |
| .jsonl                | the string under `text_key` of every line; byte ranges read in parallel |
| .jsonl.gz, .jsonl.zst | the same; one reader decompresses, the encoding is spread               |
| .parquet              | the string in column `text_key` of every row; one reader, as above      |

The pieces of a corpus, their order and their documents do not depend on who reads them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from matformer_dist.errors import UserError

PIECE_BYTES = 1 << 20
LONGEST_LINE_BYTES = 1 << 28
CODECS = {".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
CONTAINERS = (".jsonl", *CODECS, ".parquet")
INCLUDE = ("*.txt", "*.md", "*.rst", "*.py", *(f"*{suffix}" for suffix in CONTAINERS))
_TEXT_PER_DISK_BYTE = 4  # of compressed files, roughly: only the tokenizer's sample relies on it
_STREAM_KEEP = 1 / 16
_LEAST_REACH_BYTES = 1 << 22


@dataclass(frozen=True)
class CorpusFile:
    path: str
    kind: str  # one of CONTAINERS, or "text"
    size: int  # bytes

    @property
    def is_stream(self) -> bool:
        """Whether it can only be read from its beginning, by one reader."""
        return self.kind not in ("text", ".jsonl")


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a file; a line belongs to the span in which it begins."""

    file: CorpusFile
    start: int
    stop: int

    @property
    def disk_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Block:
    """Whole lines out of a compressed file, which took `disk_bytes` of it."""

    path: str
    first_line: int
    lines: bytes
    disk_bytes: int


@dataclass(frozen=True)
class Rows:
    """Neighbouring values of a Parquet file's text column, as UTF-8."""

    path: str
    first_row: int
    texts: list[bytes | None]
    disk_bytes: int


Piece = Span | Block | Rows


def find_files(
    inputs: Sequence[str | Path], include: Sequence[str], exclude: Sequence[str]
) -> Iterator[CorpusFile]:
    """The corpus' files: inputs in the order given, a folder's by name, at any depth.

    In a folder, files are taken whose name matches one of the patterns `include`, unless their
    name or that of a folder above them is hidden or matches one of `exclude`; folders that are
    links are not entered. UserError for an input that is missing, of another type, or gives
    nothing.
    """
    for path in map(str, inputs):
        if os.path.isdir(path):
            found = False
            for file in _walk(path, include, exclude):
                found = True
                yield file
            if not found:
                raise UserError(
                    f"the folder {path} holds no file that matches {', '.join(include)}; set "
                    "include to patterns of its files' names"
                )
        elif not os.path.exists(path):
            raise UserError(f"there is no input {path}; give files, or folders of them")
        else:
            kind = _kind(os.path.basename(path), include)
            if kind is None:
                raise UserError(
                    f"the input {path} is of an unsupported type; give .txt, "
                    f"{', '.join(CONTAINERS)}, or let include match it to read it as text"
                )
            yield CorpusFile(path, kind, os.path.getsize(path))


def _walk(folder: str, include: Sequence[str], exclude: Sequence[str]) -> Iterator[CorpusFile]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None
    for entry in entries:
        if any(fnmatch(entry.name, pattern) for pattern in (".*", *exclude)):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, include, exclude)
        elif entry.is_file() and any(fnmatch(entry.name, pattern) for pattern in include):
            kind = _kind(entry.name, include)
            assert kind is not None
            yield CorpusFile(entry.path, kind, entry.stat().st_size)


def _kind(name: str, include: Sequence[str]) -> str | None:
    for suffix in CONTAINERS:
        if name.endswith(suffix):
            return suffix
    is_text = name.endswith(".txt") or any(fnmatch(name, pattern) for pattern in include)
    return "text" if is_text else None


def pieces(file: CorpusFile, text_key: str) -> Iterator[Piece]:
    """The file in order, cut into pieces; UserError where a compressed one is damaged."""
    if not file.is_stream:
        for start in range(0, file.size, PIECE_BYTES):
            yield Span(file, start, min(file.size, start + PIECE_BYTES))
    elif file.kind == ".parquet":
        yield from _parquet_rows(file, text_key)
    else:
        yield from _compressed_lines(file)


def _compressed_lines(file: CorpusFile) -> Iterator[Block]:
    import pyarrow

    line, read_bytes = 1, 0
    rest: list[bytes] = []  # the beginning of a line that goes on in the next read
    try:
        with (
            open(file.path, "rb") as raw,
            pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), CODECS[file.kind]) as stream,
        ):
            while data := stream.read(PIECE_BYTES):
                end = data.rfind(b"\n") + 1
                if end:
                    lines = b"".join([*rest, data[:end]])
                    yield Block(file.path, line, lines, raw.tell() - read_bytes)
                    line, read_bytes, rest = line + lines.count(b"\n"), raw.tell(), []
                rest.append(data[end:])
                if sum(map(len, rest)) > LONGEST_LINE_BYTES:
                    raise too_long(f"{file.path}:{line}")
    except OSError as error:
        raise UserError(f"cannot read {file.path}, the file is damaged: {error}") from None
    if any(rest):
        yield Block(file.path, line, b"".join(rest), file.size - read_bytes)


def _parquet_rows(file: CorpusFile, text_key: str) -> Iterator[Rows]:
    import pyarrow
    from pyarrow import parquet

    first, texts, size = 0, [], 0
    try:
        with parquet.ParquetFile(file.path, buffer_size=PIECE_BYTES) as table:
            _check_column(file.path, table.schema_arrow, text_key)
            disk_bytes_per_row = file.size / max(1, table.metadata.num_rows)
            for batch in table.iter_batches(64, columns=[text_key], use_threads=False):
                column = batch.column(0).cast(pyarrow.large_string())
                values = column.cast(pyarrow.large_binary()).to_pylist()
                texts += values
                size += sum(len(value or b"") for value in values)
                if size >= PIECE_BYTES:
                    yield Rows(file.path, first, texts, round(len(texts) * disk_bytes_per_row))
                    first, texts, size = first + len(texts), [], 0
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"cannot read {file.path}, the file is damaged: {reason}") from None
    if texts:
        yield Rows(file.path, first, texts, round(len(texts) * disk_bytes_per_row))


def _check_column(path: str, schema: object, text_key: str) -> None:
    import pyarrow

    assert isinstance(schema, pyarrow.Schema)
    if schema.names.count(text_key) != 1:
        raise UserError(
            f"{path} has no column {text_key!r}; its columns are {', '.join(schema.names)}: set "
            "text_key to the one that holds the text"
        )
    kind = schema.field(text_key).type
    inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(inner) or pyarrow.types.is_large_string(inner)):
        raise UserError(
            f"{path}: column {text_key!r} holds {kind}, not text; set text_key to a column of "
            "strings"
        )


def too_long(where: str) -> UserError:
    return UserError(
        f"{where}: the line is longer than {LONGEST_LINE_BYTES >> 20} MiB; .jsonl files hold one "
        "JSON object a line"
    )


def sample(
    files: Iterable[CorpusFile], text_key: str, limit_bytes: int, text_bytes: int, seed: int
) -> Iterator[Piece]:
    """All pieces where they fit `limit_bytes`, else random ones of about 3/4 of that.

    `text_bytes` is the corpus' size by `estimate_text_bytes`. Every piece has the same chance;
    only of large files that must be read from their beginning, what lies far behind has none.
    """
    rng = random.Random(seed)
    share = 1.0 if text_bytes <= limit_bytes else 0.75 * limit_bytes / text_bytes
    for file in files:
        keep = max(share, _STREAM_KEEP) if file.is_stream else share
        reach, position = file.size * share / keep, 0  # bytes to look at, so as to keep some
        if reach < min(file.size, _LEAST_REACH_BYTES):  # too few: all of some files instead
            if rng.random() >= share / keep:
                continue
            reach = file.size
        for piece in pieces(file, text_key):
            if rng.random() < keep:
                yield piece
            position += piece.disk_bytes
            if position > reach:
                break


def estimate_text_bytes(files: Iterable[CorpusFile]) -> int:
    return sum(file.size * (_TEXT_PER_DISK_BYTE if file.is_stream else 1) for file in files)
