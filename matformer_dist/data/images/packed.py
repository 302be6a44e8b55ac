"""Many short texts in little memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class PackedTexts:
    """A sequence of byte strings as two arrays.

    Forked processes share arrays. Of a list they would come to own a copy, since counting a
    reference writes to the object.
    """

    def __init__(self, texts: Iterable[bytes]) -> None:
        texts = list(texts)
        self._bytes = np.frombuffer(b"".join(texts), np.uint8)
        self._stops = np.cumsum([len(text) for text in texts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._stops)

    def __getitem__(self, index: int) -> bytes:
        start = self._stops[index - 1] if index else 0
        return self._bytes[start : self._stops[index]].tobytes()
