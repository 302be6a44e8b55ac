"""Text for text: prompts in, pieces of their continuations out as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.errors import UserError
from matformer_dist.inference.batch import New

_KEPT = 16  # tokens of a text that are decoded again with each new one, at least


class Piece(NamedTuple):
    """Text that follows on a prompt and the pieces before it; empty in a last one, perhaps."""

    prompt: int  # its number in the caller's list
    text: str
    tokens: int  # that it took, the end of the document included
    done: bool  # the last of this prompt


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of each; an empty prompt begins a document. UserError for one text in place of a list."""
    if isinstance(prompts, str):
        raise UserError(f"prompts must be a list of texts, such as [{prompts[:40]!r}]")
    return [tokenizer.encode_prompt(prompt) for prompt in prompts]


def as_text(
    passes: Iterable[list[New]], prompts: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> Iterator[Piece]:
    """What each pass adds to each text, whole characters only."""
    texts = [_Text(prompt, tokenizer) for prompt in prompts]
    for news in passes:
        for new in news:
            text = texts[new.prompt].add(new.ids, new.done)
            yield Piece(new.prompt, text, new.tokens, new.done)


class _Text:
    """A prompt's continuation, of which a part was given out already.

    Only the last tokens are decoded again, not the whole text: `_ids` begin `_KEPT` tokens or more
    before what is new, so that a piece has before it what decides how it reads (a space is dropped
    at the beginning of a text), and `_given` is of them alone.
    """

    def __init__(self, prompt: Sequence[int], tokenizer: Tokenizer) -> None:
        self._ids = list(prompt)
        self._tokenizer = tokenizer
        self._given = len(tokenizer.decode(self._ids))  # characters, the prompt's own at first

    def add(self, ids: Sequence[int], done: bool) -> str:
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        # A character whose last bytes are still to come waits for them.
        ready = text if done else text.rstrip("\ufffd")
        piece = ready[self._given :]
        self._given = max(self._given, len(ready))
        if len(self._ids) > 4 * _KEPT and ready == text:
            self._ids = self._ids[-_KEPT:]
            self._given = len(self._tokenizer.decode(self._ids))
        return piece


def in_order(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same, prompt after prompt: those of later prompts wait until the earlier are done."""
    waiting: dict[int, list[Piece]] = {}
    current = 0
    for piece in pieces:
        waiting.setdefault(piece.prompt, []).append(piece)
        while ready := waiting.pop(current, []):
            yield from ready
            if ready[-1].done:
                current += 1
