"""Speculative decoding within one set of weights: a submodel drafts, a larger one verifies.

Legend: B rows, k drafted tokens, V vocabulary, p the verifier's distribution, q the draft's.

A round: the draft goes on from each row by k tokens, one after another; one pass of the verifier
over all of them gives p behind each. A drafted token x is accepted with probability
min(1, p(x) / q(x)); in place of the first that is not, one is drawn from max(0, p - q), and where
all are, one more from p (Leviathan et al., arXiv 2211.17192, algorithm 1). So output follows
p exactly, whatever the draft: greedy output is the verifier's own, token for token.

Every neuron of the draft is one of the verifier's: no second copy of weights. The cache may be one,
too (paper C.1). `shared`: the draft reads the verifier's keys and values and writes its own behind
them, which the verifier's pass overwrites; there is no cache to fill from the prompt. `own`: the
draft sees what it would see alone.

Rows accept different numbers of tokens; each goes on from its own position. With a fixed k, what is
random of a row does not depend on the others; with `auto`, k does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan
from typing import Literal

import torch
from torch import Tensor

from matformer_dist.counting import count_parameters
from matformer_dist.errors import UserError
from matformer_dist.inference.batch import New, Rows, read
from matformer_dist.inference.sampling import DRAFT, DRAW, VERDICT, Sampling, draw
from matformer_dist.models.cache import KeyValueCache
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Submodel

MOST_DRAFTED = 16  # by "auto"
_MEMORY = 64  # verdicts that the running acceptance looks back on, about


@dataclass(frozen=True)
class Drafting:
    """How a smaller submodel drafts. UserError for numbers or caches that there are not."""

    submodel: Submodel
    tokens: int | Literal["auto"] = 4
    cache: Literal["own", "shared"] = "shared"

    def __post_init__(self) -> None:
        if self.cache not in ("own", "shared"):
            raise UserError(f"a draft's cache {self.cache!r} must be own or shared")
        is_number = isinstance(self.tokens, int) and not isinstance(self.tokens, bool)
        if not (self.tokens == "auto" or (is_number and int(self.tokens) >= 1)):
            raise UserError(f"draft tokens {self.tokens!r} must be a number from 1 on, or auto")


@dataclass
class Statistics:
    """Sums over the rows: a pass of the verifier over B rows counts as B verifies.

    `verified` are the tokens that came of verifies: all new ones but the first of each row. What
    was drafted behind the end of a document counts nowhere.
    """

    drafted: int = 0
    accepted: int = 0
    verifies: int = 0
    verified: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted; NaN where none was drafted."""
        return self.accepted / self.drafted if self.drafted else nan

    @property
    def tokens_per_verify(self) -> float:
        return self.verified / self.verifies if self.verifies else nan


def check_draft(draft: Submodel, verifier: Submodel) -> None:
    """UserError where the draft is wider than the verifier somewhere. Both are of one model."""
    if any(
        drafts > verifies for drafts, verifies in zip(draft.widths, verifier.widths, strict=True)
    ):
        raise UserError(
            f"submodel {draft} cannot draft for {verifier}: it is wider in some layer, so it would "
            "cost more; choose a draft that is nowhere wider"
        )


class DraftLength:
    """How many tokens to draft: fixed, or by the acceptance seen.

    With acceptance a of a token, k drafted ones bring (1 - a^(k+1)) / (1 - a) tokens a round, which
    costs 1 + k c passes of the verifier, where c is the share of its weights that the draft reads:
    a token at a time, a pass takes the time that reading its weights takes. k is where their ratio
    is largest, at least 1, or nothing more would be seen. a is a mean over about the last 64
    verdicts, begun with one accepted and one rejected. Nothing is timed: a run again is the same.
    """

    def __init__(self, model: MatLM, drafting: Drafting, verifiers: Sequence[Submodel]) -> None:
        self.fixed = None if drafting.tokens == "auto" else int(drafting.tokens)
        reads = [_weights_read(model, submodel) for submodel in verifiers]
        self.cost = _weights_read(model, drafting.submodel) * len(reads) / sum(reads)
        self._accepted, self._verdicts = 1.0, 2.0

    @property
    def most(self) -> int:
        return self.fixed or MOST_DRAFTED

    def choose(self) -> int:
        if self.fixed:
            return self.fixed
        a, c = self._accepted / self._verdicts, self.cost

        def tokens_per_cost(k: int) -> float:
            return sum(a**i for i in range(k + 1)) / (1 + k * c)

        return max(range(1, MOST_DRAFTED + 1), key=tokens_per_cost)

    def saw(self, accepted: int, verdicts: int) -> None:
        """Verdicts end with the first rejection of a row."""
        kept = (1 - 1 / _MEMORY) ** verdicts
        self._accepted = self._accepted * kept + accepted
        self._verdicts = self._verdicts * kept + verdicts


def _weights_read(model: MatLM, submodel: Submodel) -> int:
    """Of a pass over one token: all but the embedding's other rows."""
    count = count_parameters(model.model, model.vocab_size, submodel)
    return count.non_embedding + model.vocab_size * model.model.d_model


@torch.no_grad()
def speculate(
    model: MatLM,
    rows: Rows,
    submodels: Sequence[Submodel],
    drafting: Drafting,
    statistics: Statistics,
) -> Iterator[list[New]]:
    """What each round adds to the rows. submodels: of each prompt, the one to verify."""
    length = DraftLength(model, drafting, submodels)
    sampling = rows.request.sampling
    # Rows near their end are drafted for, too, as long as others are not.
    capacity = rows.request.capacity + min(length.most, rows.request.max_new_tokens)
    cache = model.new_cache(len(rows), capacity)
    is_shared = drafting.cache == "shared"
    draft_cache = cache if is_shared else model.new_cache(len(rows), capacity)
    caches = [cache] if is_shared else [cache, draft_cache]

    def add(new: Sequence[Sequence[int]]) -> list[New]:
        news, staying = rows.add(new)
        for one in caches if staying else []:
            one.keep(staying)
            one.cut([len(tokens) - 1 for tokens in rows.tokens])  # the last was not read yet
        return news

    def verify(tokens: list[list[int]], last: int) -> Tensor:
        return read(model, [submodels[i] for i in rows.prompts], tokens, cache, last)

    logits = verify(rows.tokens, 1)[:, 0]
    ids = sampling.draw(logits, rows.uniforms(DRAW))
    yield add([[token] for token in ids.tolist()])
    while rows:
        # Of the tokens that a row still gets, the last is the verifier's.
        k = min(length.choose(), max(rows.remaining) - 1)
        useful = [min(k, remaining - 1) for remaining in rows.remaining]
        before = list(cache.lengths)
        drafted, q = _draft(model, rows, drafting.submodel, draft_cache, k)
        cache.cut(before)
        tokens = [[*own, *more] for own, more in zip(rows.tokens, drafted, strict=True)]
        logits = verify(tokens, k + 1)
        accepted, final = _judge(sampling, rows, drafted, useful, q, logits)
        verdicts = [min(a + 1, u) for a, u in zip(accepted, useful, strict=True)]
        length.saw(sum(accepted), sum(verdicts))
        new = [[*more[:a], last] for more, a, last in zip(drafted, accepted, final, strict=True)]
        news = add(new)
        for one, u, a in zip(news, useful, accepted, strict=True):
            ended = one.tokens <= a  # within what was drafted
            statistics.drafted += one.tokens if ended else u
            statistics.accepted += min(a, one.tokens)
        statistics.verifies += len(news)
        statistics.verified += sum(one.tokens for one in news)
        yield news


def _draft(
    model: MatLM, rows: Rows, draft: Submodel, cache: KeyValueCache, k: int
) -> tuple[list[list[int]], Tensor | None]:
    """k tokens behind each row, [B][k], and what they were drawn with, q [B, k, V].

    None in place of q: greedily.
    """
    sampling = rows.request.sampling
    drafted: list[list[int]] = [[] for _ in range(len(rows))]
    drawn_with = []
    for i in range(k):
        tokens = [[*own, *more] for own, more in zip(rows.tokens, drafted, strict=True)]
        logits = read(model, [draft] * len(rows), tokens, cache)[:, 0]
        if sampling.is_greedy:
            ids = logits.argmax(dim=-1)
        else:
            drawn_with.append(sampling.probabilities(logits))
            ids = draw(drawn_with[-1], rows.uniforms(DRAFT, i))
        for more, token in zip(drafted, ids.tolist(), strict=True):
            more.append(token)
    return drafted, torch.stack(drawn_with, dim=1) if drawn_with else None


def _judge(
    sampling: Sampling,
    rows: Rows,
    drafted: list[list[int]],
    useful: list[int],
    q: Tensor | None,
    logits: Tensor,
) -> tuple[list[int], list[int]]:
    """How many of a row's first `useful` drafted tokens are accepted, and the token behind them.

    drafted [B][k], q [B, k, V], logits [B, k + 1, V] of the verifier.
    """
    k = logits.shape[1] - 1
    ids = torch.tensor(drafted, dtype=torch.long, device=logits.device)
    counts = torch.tensor(useful, device=logits.device)
    counted = torch.arange(k, device=logits.device) < counts[:, None]
    every = torch.arange(len(useful), device=logits.device)
    if sampling.is_greedy:
        chosen = logits.argmax(dim=-1)
        accepted = (counted & (ids == chosen[:, :k])).long().cumprod(dim=1).sum(dim=1)
        return accepted.tolist(), chosen[every, accepted].tolist()
    p = sampling.probabilities(logits)
    # Behind the last that counts nothing was drafted: q is zero there, and what is left of p is p.
    rest = torch.zeros_like(p)
    if q is not None:
        rest[:, :k] = q * counted.unsqueeze(-1)
    at = ids.unsqueeze(-1)
    p_of, q_of = p[:, :k].gather(-1, at).squeeze(-1), rest[:, :k].gather(-1, at).squeeze(-1)
    verdicts = [rows.uniforms(VERDICT, i) for i in range(k)]
    passes = torch.stack(verdicts, dim=1) * q_of < p_of if k else counted
    accepted = (counted & passes).long().cumprod(dim=1).sum(dim=1)
    p, rest = p[every, accepted], rest[every, accepted]
    left = (p - rest).clamp(min=0)
    # Where p and q are equal but for rounding, nothing is left, and nothing is rejected but by it.
    left = torch.where(left.sum(dim=-1, keepdim=True) > 0, left, p)
    last = torch.stack([rows.uniforms(DRAW, i) for i in range(k + 1)], dim=1)
    return accepted.tolist(), draw(left, last[every, accepted]).tolist()
