"""From a corpus to a tokenizer and the indexed files that training reads.

```
inputs -> pieces of ~1 MiB -> worker processes -> documents, token ids -> in order, PREFIX.bin/.idx
          corpus.py           workers.py          documents.py, tokenizer.py  indexed_files.py
```
Only a few pieces a process are in memory at a time. The files do not depend on the number of
processes. PREFIX.json says what made them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from matformer_dist.data import corpus
from matformer_dist.data.corpus import CorpusFile, Piece, Span
from matformer_dist.data.documents import DocumentReader, InvalidText
from matformer_dist.data.indexed_files import IndexedWriter, token_dtype
from matformer_dist.data.progress import Progress, megabytes
from matformer_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.data.workers import Workers
from matformer_dist.errors import UserError

FORMAT = 1
_SAMPLE_BYTES = 32 << 20  # SentencePiece takes about 15 times as much memory
_SAMPLE_SEED = 1234


@dataclass(frozen=True)
class PreparedData:
    """What was written: PREFIX.bin, PREFIX.idx and PREFIX.json, and where the tokenizer is."""

    prefix: Path
    tokenizer: Path
    documents: int
    empty_documents: int  # left out
    tokens: int  # with one end-of-document id a document
    text_bytes: int
    seconds: float


@dataclass(frozen=True)
class _Corpus:
    """The inputs, listed anew each time: a list of them could be larger than memory."""

    inputs: tuple[str, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    reader: DocumentReader

    def files(self) -> Iterator[CorpusFile]:
        return corpus.find_files(self.inputs, self.include, self.exclude)

    def units(self) -> Iterator[list[Piece]]:
        """Pieces by turns of about a megabyte, so that small files share one."""
        unit: list[Piece] = []
        size = 0
        for file in self.files():
            for piece in corpus.pieces(file, self.reader.text_key):
                if not isinstance(piece, Span):
                    yield [piece]
                    continue
                unit.append(piece)
                size += piece.disk_bytes
                if size >= corpus.PIECE_BYTES:
                    yield unit
                    unit, size = [], 0
        if unit:
            yield unit


@dataclass(frozen=True)
class _Encoded:
    tokens: bytes
    lengths: NDArray[Any]  # int32 [documents]
    empty_documents: int
    text_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class _Encoder:
    """Turns pieces into token ids; runs in the worker processes."""

    tokenizer: Tokenizer
    reader: DocumentReader

    def __call__(self, unit: list[Piece]) -> _Encoded:
        eod = np.array([self.tokenizer.eod], np.int32)
        arrays, lengths, empty, text_bytes = [], [], 0, 0
        for piece in unit:
            for text in self.reader.read(piece):
                if not text:
                    empty += 1
                    continue
                ids = self.tokenizer.encode_array(text)
                arrays += [ids, eod]
                lengths.append(len(ids) + 1)
                text_bytes += len(text.encode())
        tokens = np.concatenate(arrays) if arrays else eod[:0]
        return _Encoded(
            tokens.astype(token_dtype(self.tokenizer.vocab_size)).tobytes(),
            np.array(lengths, np.int32),
            empty,
            text_bytes,
            sum(piece.disk_bytes for piece in unit),
        )


@dataclass(frozen=True)
class _Training:
    """Trains a tokenizer on a sample; runs in a process of its own, to be stoppable."""

    corpus: _Corpus
    sample_bytes: int

    def __call__(self, vocab_size: int) -> bytes:
        return train_tokenizer(self._sample(), vocab_size).model

    def _sample(self) -> Iterator[str]:
        left = self.sample_bytes
        key = self.corpus.reader.text_key
        whole = corpus.estimate_text_bytes(self.corpus.files())
        for piece in corpus.sample(
            self.corpus.files(), key, self.sample_bytes, whole, _SAMPLE_SEED
        ):
            for text in self.corpus.reader.read(piece):
                yield text[:left]  # characters, of at least a byte each
                left -= len(text.encode())
                if left <= 0:
                    return


def prepare_data(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = 32000,
    workers: int = 0,
    text_key: str = "text",
    include: Sequence[str] = corpus.INCLUDE,
    exclude: Sequence[str] = (),
    invalid_text: InvalidText = "error",
    force: bool = False,
) -> PreparedData:
    """Write `output`.bin and .idx (and .json) from the corpus `inputs`; show how it gets on.

    inputs        files and folders, see corpus.py; `include`, `exclude`: patterns in folders
    tokenizer     one to use, see load_tokenizer; else one of `vocab_size` pieces is trained on a
                  random sample of at most 32 MiB, and written to `output`.model
    workers       processes; 0: one for every core that this process may use
    invalid_text  bytes that are not UTF-8: "error", or "replace" them by U+FFFD
    force         replace an older data set of this name

    Memory does not grow with the corpus, only with its longest document. Nothing that training
    would take for a data set exists before all is written. UserError for bad input, see the
    modules above.
    """
    started = time.monotonic()
    if workers < 0:
        raise UserError(f"workers {workers} must be 0 (one a core) or more")
    source = _Corpus(
        tuple(map(str, inputs)),
        tuple(include),
        tuple(exclude),
        DocumentReader(text_key, invalid_text),
    )
    disk_bytes = sum(file.size for file in source.files())
    prefix = Path(output)
    if not prefix.name or prefix.is_dir():
        raise UserError(
            f"the output {output} is a folder; give a prefix of files in it, for example "
            f"{prefix / 'corpus'}"
        )
    given = load_tokenizer(tokenizer) if tokenizer is not None else None
    dtype = token_dtype(given.vocab_size if given else vocab_size)
    suffixes = (".json",) if given else (".model", ".json")
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        writer = IndexedWriter(prefix, dtype, suffixes=suffixes, force=force)
        try:
            used = given or _train(source, vocab_size, console)
            with Progress(console, disk_bytes) as progress:
                text_bytes, empty = _encode(source, used, workers or _cores(), writer, progress)
            if isinstance(used, SentencePieceTokenizer) and not given:
                writer.write_file(".model", used.model)
            writer.write_file(".json", _describe(source, used, writer, text_bytes))
            writer.publish()
        finally:
            writer.close()
    except OSError as error:
        raise UserError(f"cannot prepare the data set {prefix}: {error}") from None
    result = PreparedData(
        prefix=prefix,
        tokenizer=Path(given.source) if given else Path(f"{prefix}.model"),
        documents=writer.documents,
        empty_documents=empty,
        tokens=writer.tokens,
        text_bytes=text_bytes,
        seconds=time.monotonic() - started,
    )
    console.print(
        f"{prefix}: {result.tokens:,} tokens of {result.documents:,} documents, "
        f"{megabytes(text_bytes)} of text, in {result.seconds:.0f} s; tokenizer {result.tokenizer}"
    )
    return result


def _train(source: _Corpus, vocab_size: int, console: Console) -> SentencePieceTokenizer:
    console.print(f"training a tokenizer of {vocab_size} pieces")
    with Workers(1, _Training(source, _SAMPLE_BYTES)) as workers:
        return SentencePieceTokenizer.of(next(workers.map([vocab_size])), "just trained")


def _encode(
    source: _Corpus, tokenizer: Tokenizer, processes: int, writer: IndexedWriter, progress: Progress
) -> tuple[int, int]:
    """Encode all of `source` into `writer`; bytes of text, and number of empty documents."""
    text_bytes = empty = 0
    with Workers(processes, _Encoder(tokenizer, source.reader)) as workers:
        for encoded in workers.map(source.units()):
            writer.add(encoded.tokens, encoded.lengths)
            text_bytes += encoded.text_bytes
            empty += encoded.empty_documents
            tokens = int(encoded.lengths.sum())
            progress.advance(encoded.disk_bytes, encoded.text_bytes, tokens)
    if writer.documents == 0:
        raise UserError(
            f"the corpus {', '.join(source.inputs)} is empty: no document holds any text"
        )
    return text_bytes, empty


def _describe(
    source: _Corpus, tokenizer: Tokenizer, writer: IndexedWriter, text_bytes: int
) -> bytes:
    """PREFIX.json: nothing in it depends on when, or by how many processes, it was made."""
    described = {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "documents": writer.documents,
        "tokens": writer.tokens,
        "text_bytes": text_bytes,
        "inputs": source.inputs,
        "include": source.include,
        "exclude": source.exclude,
        **asdict(source.reader),
    }
    return (json.dumps(described, indent=1, ensure_ascii=False) + "\n").encode()


def _cores() -> int:
    return len(os.sched_getaffinity(0))
