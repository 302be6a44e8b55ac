"""SentencePiece tokenizers that give every text back exactly, and their training.

What we train is BPE with byte fallback and without any normalisation: code, odd Unicode and all
white space round-trip. transformers' LlamaTokenizer gives the same ids from the same file with
add_prefix_space=False and add_bos_token=False (its own reading of literal "</s>" aside).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2

from matformer_dist.data.tokenizer import Tokenizer, lone_surrogate, read_tokenizer_file
from matformer_dist.errors import UserError

FILE = "tokenizer.model"
_SPACE = "▁"  # U+2581, which stands for a space inside pieces
_PART_CHARS = 8192  # long strings encode up to twice as fast, and in bounded memory, in parts
_LONGEST_PART_CHARS = 1 << 20
_SENTENCE_CHARS = 4096
_PROBE = " a\n\t  b "


class SentencePieceTokenizer(Tokenizer):
    """Documents end with </s>."""

    def __init__(self, files: Mapping[str, bytes], source: str) -> None:
        super().__init__(files, source)
        try:
            self._read()
        except (RuntimeError, UnicodeError):
            raise UserError(
                f"the tokenizer {source} is not a SentencePiece model; give a .model file that "
                "SentencePiece or `matformer prepare-data` made, or a tokenizer.json"
            ) from None
        if self.eod < 0:
            raise UserError(
                f"the tokenizer {source} has no end-of-document piece </s>; train it with one"
            )

    def _read(self) -> None:
        if not self.model:  # which SentencePiece would take for "load nothing"
            raise RuntimeError
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        self._byte_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()
        ]
        self._is_exact = self._processor.is_byte(self._byte_ids[0]) and self._processor.normalize(
            _PROBE
        ) == _PROBE.replace(" ", _SPACE)
        self._inner_pairs = self._find_inner_pairs() if self._is_exact else set()

    @classmethod
    def of(cls, model: bytes, source: str) -> SentencePieceTokenizer:
        """Of a serialized SentencePiece model."""
        return cls({FILE: model}, source)

    @classmethod
    def load(cls, path: Path) -> SentencePieceTokenizer:
        """Read a .model file; UserError where it is missing or something else."""
        return cls.of(read_tokenizer_file(path), str(path))

    @property
    def model(self) -> bytes:
        return self.files[FILE]

    def proto(self) -> Any:
        """A ModelProto of the model, which its reader may change."""
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(self.model)
        return proto

    def _decisive(self) -> bytes:
        return self.model

    @property
    def vocab_size(self) -> int:
        return int(self._processor.get_piece_size())

    @property
    def eod(self) -> int:
        return int(self._processor.eos_id())

    def encode_array(self, text: str) -> NDArray[Any]:
        arrays = []
        for i, between in enumerate(text.split(_SPACE) if self._is_exact else [text]):
            if i:  # a literal U+2581 would come back as a space: spell it in bytes
                arrays.append(np.array(self._byte_ids, np.int32))
            arrays.extend(map(self._encode_part, self._parts(between)))
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def _token_bytes(self) -> list[int]:
        of = self._processor
        return [
            0 if of.is_control(i) or of.is_unknown(i) or of.is_unused(i)
            else 1 if of.is_byte(i)
            else len(of.id_to_piece(i).replace(_SPACE, " ").encode())
            for i in range(self.vocab_size)
        ]  # fmt: skip

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._processor.decode(list(ids)))

    def _encode_part(self, part: str) -> NDArray[Any]:
        try:
            ids: NDArray[Any] = self._processor.encode(part, out_type="numpy")
        except RuntimeError:
            raise lone_surrogate(part) from None
        return ids

    def _parts(self, text: str) -> Iterator[str]:
        """`text` cut where no piece of the vocabulary can span the cut.

        So encoding the parts gives the ids of the whole. (Unless a million characters offer no
        such place.) A tokenizer that normalises gets its text whole.
        """
        start = 0
        while self._is_exact and len(text) - start > _PART_CHARS:
            cut = start + _PART_CHARS
            limit = min(len(text), start + _LONGEST_PART_CHARS)
            while cut < limit and text[cut - 1 : cut + 1] in self._inner_pairs:
                cut += 1
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _find_inner_pairs(self) -> set[str]:
        """Every two neighbouring characters inside a piece, as they read in a text."""
        pairs: set[str] = set()
        for i in range(self.vocab_size):
            piece = self._processor.id_to_piece(i).replace(_SPACE, " ")
            pairs.update(piece[j : j + 2] for j in range(len(piece) - 1))
        return pairs


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train on `texts` (all are held in memory, at about 15 times their size).

    The same texts in the same order give the same file. UserError where they are empty, or do
    not fit `vocab_size`.
    """
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _SENTENCE_CHARS,  # bytes; none of ours is longer
            num_threads=8,  # is written into the model: fixed, so that the file is the same
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from None
    return SentencePieceTokenizer.of(writer.getvalue(), "just trained")


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _SENTENCE_CHARS):
            yield text[start : start + _SENTENCE_CHARS]


def _explain(message: str, vocab_size: int) -> str:
    """SentencePiece's error in the words of our options."""
    if most := re.search(r"set it to a value <= (\d+)", message):
        return (
            f"the corpus is too small for a vocabulary of {vocab_size} pieces, it gives at most "
            f"{most[1]}; set a smaller vocab_size, or add text"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"a vocabulary of {vocab_size} pieces is too small for this corpus' characters and "
            f"256 bytes; set vocab_size to {least[1]} or more"
        )
    if "sentences_.empty()" in message:
        return "the corpus is empty: there is no text to train a tokenizer on"
    return f"SentencePiece cannot train a tokenizer of {vocab_size} pieces: {message}"
