"""What all tokenizers do, whichever files they come from, and how they are found."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matformer_dist.errors import UserError


class Tokenizer(ABC):
    """Text to ids and back.

    `files` are its files by name, so that a copy of it stands anywhere; `source` is the path of
    the first, for messages.
    """

    def __init__(self, files: Mapping[str, bytes], source: str) -> None:
        self.files = files
        self.source = source

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.files, self.source)

    @property
    def file_name(self) -> str:
        """Name of the file that a tokenizer is loaded by."""
        return next(iter(self.files))

    @cached_property
    def digest(self) -> str:
        """Equal digests mean equal ids."""
        return hashlib.sha256(self._decisive()).hexdigest()

    @abstractmethod
    def _decisive(self) -> bytes:
        """All that decides which ids a text gets, and which id ends a document."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Ids are below it."""

    @property
    @abstractmethod
    def eod(self) -> int:
        """Id that ends every document."""

    @property
    def begin(self) -> int:
        """Id to predict the first of a text from, where nothing stands before it."""
        return self.eod

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """What Megatron-Core names cached indices by."""
        return OrderedDict({"class": type(self).__name__, "sha256": self.digest})

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone; what reads like a special token in it is text.

        UserError for text that is not valid Unicode.
        """
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    @abstractmethod
    def encode_array(self, text: str) -> NDArray[Any]:
        """The same as an int32 array [tokens]."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model is to go on from; never none."""
        return self.encode(text) or [self.eod]

    @cached_property
    def token_bytes(self) -> NDArray[Any]:
        """UTF-8 bytes of text that each id stands for, int64 [vocab_size]; special tokens have 0.

        Of a text's ids they sum to its length, but for what a tokenizer changes (a space put
        before it, characters it makes others).
        """
        return np.array(self._token_bytes(), np.int64)

    @abstractmethod
    def _token_bytes(self) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""


def lone_surrogate(text: str) -> UserError:
    return UserError(
        f"the text {text[:40]!a} holds a lone surrogate, which is not valid Unicode; remove it"
    )


def read_tokenizer_file(path: Path) -> bytes:
    """UserError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
