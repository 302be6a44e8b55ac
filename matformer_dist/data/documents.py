"""Documents out of pieces of a corpus; every mistake in them is named by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Literal

from matformer_dist.data.corpus import (
    LONGEST_LINE_BYTES,
    PIECE_BYTES,
    Block,
    Piece,
    Rows,
    Span,
    too_long,
)
from matformer_dist.errors import UserError

_BOM = b"\xef\xbb\xbf"
InvalidText = Literal["error", "replace"]


@dataclass(frozen=True)
class DocumentReader:
    """How documents are taken out of pieces.

    text_key  the key or column that holds the text; a null under it is an empty document
    invalid   what to do with bytes that are not UTF-8: UserError, or put U+FFFD for them
    """

    text_key: str = "text"
    invalid: InvalidText = "error"

    def read(self, piece: Piece) -> Iterator[str]:
        """The documents that begin in `piece`, in order; empty ones too, but not empty lines."""
        try:
            if isinstance(piece, Rows):
                yield from self._read_rows(piece)
            elif isinstance(piece, Block):
                yield from self._read_block(piece)
            elif piece.file.kind == "text":
                yield self._read_text(piece)
            else:
                yield from self._read_lines(piece)
        except OSError as error:
            path = piece.file.path if isinstance(piece, Span) else piece.path
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None

    def _read_text(self, span: Span) -> str:
        with open(span.file.path, "rb") as file:
            start = _cut(file, span.start, span.file.size)
            stop = _cut(file, span.stop, span.file.size)
            file.seek(start)
            data = file.read(stop - start)
        if start == 0:
            data = data.removeprefix(_BOM)
        return self._decode(data, lambda: span.file.path, start)

    def _read_lines(self, span: Span) -> Iterator[str]:
        path = span.file.path
        with open(path, "rb") as file:
            position = _first_line_start(file, span.start)
            while position < span.stop:
                line = file.readline(LONGEST_LINE_BYTES + 1)
                if len(line) > LONGEST_LINE_BYTES:
                    raise too_long(_line_at(path, position))
                if not line:  # the file became shorter meanwhile
                    break
                begin = position
                position += len(line)
                text = line.removeprefix(_BOM) if begin == 0 else line
                if not text.isspace():
                    yield self._parse(text, partial(_line_at, path, begin))

    def _read_block(self, block: Block) -> Iterator[str]:
        lines = block.lines.split(b"\n")
        if block.first_line == 1:
            lines[0] = lines[0].removeprefix(_BOM)
        for i, line in enumerate(lines, block.first_line):
            if line and not line.isspace():
                yield self._parse(line, partial("{}:{}".format, block.path, i))

    def _read_rows(self, rows: Rows) -> Iterator[str]:
        for i, value in enumerate(rows.texts, rows.first_row):
            yield self._decode(value or b"", partial("{}: row {}".format, rows.path, i))

    def _parse(self, line: bytes, where: Callable[[], str]) -> str:
        """The text in one line of JSON."""
        try:
            value = json.loads(self._decode(line, where))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where()}: not valid JSON ({error}); every line must be an object such as "
                f'{{"{self.text_key}": "..."}}'
            ) from None
        if not isinstance(value, dict) or self.text_key not in value:
            found = f"its keys are {', '.join(value)}" if isinstance(value, dict) else "no object"
            raise UserError(
                f"{where()}: no key {self.text_key!r} ({found}); set text_key to the key that "
                "holds the text"
            )
        value = value[self.text_key]
        if not isinstance(value, str | None):
            raise UserError(
                f"{where()}: {self.text_key!r} holds {json.dumps(value)[:40]}, not text; set "
                "text_key to the key that holds the text"
            )
        return self._mend_surrogates(value or "", where)

    def _decode(self, data: bytes, where: Callable[[], str], start: int = 0) -> str:
        try:
            return data.decode(errors="strict" if self.invalid == "error" else "replace")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where()}: byte 0x{data[error.start]:02X} at offset {start + error.start} is not "
                "UTF-8; convert or exclude the file, or set invalid_text to replace"
            ) from None

    def _mend_surrogates(self, text: str, where: Callable[[], str]) -> str:
        """JSON can spell half a surrogate pair, which no encoding of Unicode can hold."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if self.invalid == "error":
                raise UserError(
                    f"{where()}: character {error.start} of the text is a lone surrogate; mend "
                    "the file, or set invalid_text to replace"
                ) from None
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text


def _cut(file: BinaryIO, position: int, size: int) -> int:
    """Where a text file is cut near `position`: behind the next line end, if one is near.

    Else at `position` or just behind it, between two characters. Always before
    position + PIECE_BYTES, so that cuts keep their order.
    """
    if position <= 0 or position >= size:
        return max(0, min(position, size))
    file.seek(position - 1)
    window = file.read(PIECE_BYTES)
    line_end = window.find(b"\n")
    if line_end >= 0:
        return position + line_end
    while position < size and window[1:2] and 0x80 <= window[1] < 0xC0:
        position, window = position + 1, window[1:]
    return position


def _first_line_start(file: BinaryIO, position: int) -> int:
    """Go to the first line that begins at or behind `position`."""
    if position > 0:
        file.seek(position - 1)
        while (part := file.readline(PIECE_BYTES)) and not part.endswith(b"\n"):
            pass
    return file.tell()


def _line_at(path: str, position: int) -> str:
    """FILE:LINE of a byte offset."""
    line, left = 1, position
    with open(path, "rb") as file:
        while left > 0 and (part := file.read(min(left, PIECE_BYTES))):
            line += part.count(b"\n")
            left -= len(part)
    return f"{path}:{line}"
