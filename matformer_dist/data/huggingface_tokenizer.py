"""tokenizer.json of Hugging Face, as byte-level BPE models such as Llama 3 have it.

Which token ends a document is not in it: tokenizer_config.json beside it names `eos_token`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from matformer_dist.data.tokenizer import Tokenizer, lone_surrogate, read_tokenizer_file
from matformer_dist.errors import UserError

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MORE = ("chat_template.jinja",)  # goes with it where it is there


class HuggingFaceTokenizer(Tokenizer):
    """Through the tokenizers package. Documents end with `eos_token`, and begin with nothing: the
    tokens that the file puts around a text (<|begin_of_text|>, say) are for prompts alone.
    """

    def __init__(self, files: Mapping[str, bytes], source: str) -> None:
        super().__init__(files, source)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(files[FILE])
        except Exception as error:  # the package raises nothing narrower
            raise UserError(
                f"the tokenizer {source} cannot be read ({error}); give the tokenizer.json of a "
                "Hugging Face model, or a SentencePiece .model file"
            ) from None
        self._check_ids()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._eos = _eos_token(files[CONFIG], Path(source).with_name(CONFIG))
        eod = self._tokenizer.token_to_id(self._eos)
        if eod is None:
            raise UserError(
                f"{Path(source).with_name(CONFIG)} names the eos_token {self._eos!r}, which "
                f"{source} does not hold; name one that it holds"
            )
        self._eod = int(eod)

    @classmethod
    def load(cls, path: Path) -> HuggingFaceTokenizer:
        """Read `path` and tokenizer_config.json beside it; UserError where one is missing."""
        files = {FILE: read_tokenizer_file(path)}
        files[CONFIG] = read_tokenizer_file(path.with_name(CONFIG))
        for name in _MORE:
            if path.with_name(name).exists():
                files[name] = read_tokenizer_file(path.with_name(name))
        return cls(files, str(path))

    @property
    def tokens(self) -> set[str]:
        """All tokens, special ones too, as the file writes them."""
        return set(self._tokenizer.get_vocab(with_added_tokens=True))

    def _decisive(self) -> bytes:
        return b"\0".join([self.files[FILE], self._eos.encode()])

    def _check_ids(self) -> None:
        """The package counts added tokens on from the others, whatever ids the file gives them."""
        for token in json.loads(self.files[FILE])["added_tokens"]:
            found = self._tokenizer.token_to_id(token["content"])
            if found != token["id"]:
                raise UserError(
                    f"the tokenizer {self.source} leaves out ids: it gives {token['content']!r} "
                    f"the id {token['id']}, which Hugging Face's own reader makes {found}; give a "
                    "tokenizer without gaps"
                )

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def eod(self) -> int:
        return self._eod

    @property
    def begin(self) -> int:
        """The bos_token that tokenizer_config.json may name, else the end of a document."""
        token = json.loads(self.files[CONFIG]).get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        found = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        return self._eod if found is None else int(found)

    def encode_array(self, text: str) -> NDArray[Any]:
        return np.array(self._encode(text, around=False), np.int32)

    def encode_prompt(self, text: str) -> list[int]:
        return self._encode(text, around=True) or [self.eod]

    def _token_bytes(self) -> list[int]:
        """In a byte-level vocabulary a character stands for a byte; in others U+2581 for a space,
        and <0x0A> for a byte.
        """
        described = json.loads(self.files[FILE])
        added = {token["id"]: token for token in described["added_tokens"]}
        is_byte_level = '"ByteLevel"' in json.dumps(described.get("decoder"))
        counts = [0] * self.vocab_size
        for piece, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in added:
                counts[i] = 0 if added[i]["special"] else len(piece.encode())
            elif is_byte_level:
                counts[i] = len(piece)
            elif not _BYTE.fullmatch(piece):
                counts[i] = len(piece.replace("\u2581", " ").encode())
            else:
                counts[i] = 1
        return counts

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _encode(self, text: str, around: bool) -> list[int]:
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=around).ids)
        except (UnicodeEncodeError, TypeError):
            raise lone_surrogate(text) from None


def _eos_token(config: bytes, path: Path) -> str:
    """tokenizer_config.json's, which may be a text or an object with its settings."""
    try:
        token = json.loads(config)["eos_token"]
        token = token["content"] if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
        found = f"eos_token {token!r}"
    except (ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise UserError(
        f"{path} does not name the eos_token, which ends documents ({found}); name it there, for "
        'example "eos_token": "<|end_of_text|>"'
    )
