"""Prompts that are answered together: what is asked of them, and those that still go on.

Legend: B rows of a batch, n new tokens, V vocabulary.

Prompts keep their numbers in the caller's list; a row leaves when its prompt is answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from matformer_dist.errors import UserError
from matformer_dist.inference.sampling import Sampling, uniforms
from matformer_dist.models.cache import KeyValueCache
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Segment, Submodel


@dataclass(frozen=True)
class Request:
    """Prompts as ids, and how they are gone on from.

    eod: the id at which a text ends, which is no part of it. `context`: of the model, in tokens.
    UserError where there is no prompt, or one is empty or does not fit the context with
    `max_new_tokens`.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    eod: int | None
    context: int

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError("there is no prompt; give at least one")
        for i, prompt in enumerate(self.prompts):
            if not len(prompt):
                raise UserError(
                    f"prompt {i} of {len(self.prompts)} (from 0) is empty; give each at least one "
                    "token, such as the end of the document before it"
                )
            check_context(len(prompt), self.max_new_tokens, self.context)

    @property
    def capacity(self) -> int:
        """Tokens of the longest prompt and what follows it."""
        return max(map(len, self.prompts)) + self.max_new_tokens


def check_context(prompt: int, new: int, context: int) -> None:
    """UserError unless so many tokens of prompt and continuation fit."""
    if new < 1 or prompt + new > context:
        raise UserError(
            f"a prompt of {prompt} tokens and {new} new tokens do not fit: there must be at least "
            f"1 new token, and both together at most {context}, the model's context"
        )


class New(NamedTuple):
    """What a pass added to the text of a prompt."""

    prompt: int  # its number in the caller's list
    ids: list[int]  # without the end of the document
    tokens: int  # with it
    done: bool


class Rows:
    """The prompts that still go on, a row each; `tokens` of each are its prompt and all new."""

    def __init__(self, request: Request, prompts: Sequence[int], device: torch.device) -> None:
        """A row each of these prompts, in this order."""
        self.request = request
        self.prompts = list(prompts)
        self.tokens = [list(request.prompts[i]) for i in prompts]
        self._uniforms: Tensor | None = None
        if not request.sampling.is_greedy:
            self._uniforms = uniforms(request.seed, prompts, request.max_new_tokens, device)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def made(self) -> list[int]:
        """New tokens of each row so far."""
        lengths = zip(self.tokens, self.prompts, strict=True)
        return [len(tokens) - len(self.request.prompts[i]) for tokens, i in lengths]

    @property
    def remaining(self) -> list[int]:
        """New tokens that each row may still get."""
        return [self.request.max_new_tokens - made for made in self.made]

    def uniforms(self, kind: int, ahead: int = 0) -> Tensor:
        """[B]: that of each row's next token, or of the one `ahead` of it, where there is one."""
        if self._uniforms is None:
            return torch.zeros(len(self))  # nothing is random
        last = self.request.max_new_tokens - 1
        numbers = [min(made + ahead, last) for made in self.made]
        return self._uniforms[range(len(self)), numbers, kind]

    def add(self, new: Sequence[Sequence[int]]) -> tuple[list[New], list[int]]:
        """Add tokens to each row, up to the end of its document; those that end leave.

        What is new, and the rows, as they were counted, that stay.
        """
        news, staying = [], []
        eod = self.request.eod
        for row, (prompt, room) in enumerate(zip(self.prompts, self.remaining, strict=True)):
            ids = list(new[row])
            ended = eod is not None and eod in ids
            kept = ids[: ids.index(eod)] if eod is not None and ended else ids
            self.tokens[row] += kept
            done = ended or len(kept) == room
            news.append(New(prompt, kept, len(kept) + ended, done))
            if not done:
                staying.append(row)
        self.prompts = [self.prompts[row] for row in staying]
        self.tokens = [self.tokens[row] for row in staying]
        if self._uniforms is not None and len(staying) < len(news):
            self._uniforms = self._uniforms[staying]
        return news, staying


def read(
    model: MatLM,
    submodels: Sequence[Submodel],
    tokens: Sequence[Sequence[int]],
    cache: KeyValueCache,
    last: int = 1,
) -> Tensor:
    """Run each row by its submodel, from where the cache ends: logits [B, last, V].

    tokens: of each row, from its beginning; the logits are of what follows its last ones, so at
    least `last` of them are not in the cache yet. Rows may have different numbers of new tokens.
    UserError where a model answers with what is no number.
    """
    new = [row[start:] for row, start in zip(tokens, cache.lengths, strict=True)]
    longest = max(map(len, new))
    padded = [[*row, *[0] * (longest - len(row))] for row in new]
    device = model.embedding.weight.device
    segments = [Segment(submodel, len(list(run))) for submodel, run in groupby(submodels)]
    hidden = model.hidden(torch.tensor(padded, device=device), segments, cache=cache)
    cache.cut([len(row) for row in tokens])
    hidden = hidden.view(len(new), longest, -1)
    if any(len(row) != last for row in new):
        ends = torch.tensor([len(row) for row in new], device=device)
        chosen = ends[:, None] + torch.arange(-last, 0, device=device)
        hidden = hidden[torch.arange(len(new), device=device)[:, None], chosen]
    logits = model.head.logits(hidden.flatten(0, 1), model.tied_weight).view(len(new), last, -1)
    if bool(logits.isnan().any()):  # a GPU waits for it here instead of for the ids
        raise UserError(
            "the model's logits are not numbers: its weights are not finite, or overflow in "
            f"{logits.dtype}; take an earlier checkpoint, or another dtype"
        )
    return logits
