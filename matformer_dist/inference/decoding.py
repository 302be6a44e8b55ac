"""Tokens as they come, of prompts that are answered together; by one submodel or two.

Rows of equal submodels are neighbours, so that each submodel is one segment of a pass, as in
training. What a row gets is what its prompt gets alone, to rounding: rows see each other nowhere,
and what is random belongs to the prompt (see sampling.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from matformer_dist.errors import UserError
from matformer_dist.inference.batch import New, Request, Rows, read
from matformer_dist.inference.sampling import DRAW, Sampling
from matformer_dist.inference.speculative import Drafting, Statistics, check_draft, speculate
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Submodel


def decode(
    model: MatLM,
    submodels: Sequence[Submodel] | Submodel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    eod: int | None = None,
    drafting: Drafting | None = None,
    statistics: Statistics | None = None,
) -> Iterator[list[New]]:
    """What each pass adds to the prompts' texts; UserError at once for what does not fit.

    submodels: one for all prompts, or one for each. drafting: by a smaller submodel
    (speculative.py), of which `statistics` then tell.
    """
    request = Request(prompts, max_new_tokens, sampling, seed, eod, model.model.max_seq_len)
    given = [submodels] if isinstance(submodels, Submodel) else submodels
    chosen = one_each(given, len(prompts))
    kinds = list(dict.fromkeys(chosen))
    for submodel in [*kinds, *([drafting.submodel] if drafting else [])]:
        _check_layers(model, submodel)
    _check_ids(model, prompts)
    order = sorted(range(len(prompts)), key=lambda i: kinds.index(chosen[i]))
    rows = Rows(request, order, model.embedding.weight.device)
    if drafting is None:
        return _plain(model, rows, chosen)
    for submodel in kinds:
        check_draft(drafting.submodel, submodel)
    return speculate(model, rows, chosen, drafting, statistics or Statistics())


def one_each(submodels: Sequence[Submodel], prompts: int) -> list[Submodel]:
    """The submodel of each prompt, where one for all or one for each is given; else UserError."""
    if len(submodels) not in (1, prompts):
        raise UserError(
            f"{len(submodels)} submodels were given for {prompts} prompts; give one for all, or "
            "one for each"
        )
    return list(submodels) * (prompts // len(submodels))


def _check_layers(model: MatLM, submodel: Submodel) -> None:
    if len(submodel) != len(model.layers):
        raise UserError(
            f"submodel {submodel} is of {len(submodel)} layers, the model has "
            f"{len(model.layers)}; parse its notation for this model"
        )


def _check_ids(model: MatLM, prompts: Sequence[Sequence[int]]) -> None:
    """Here, since a GPU would end the whole process for one that the embedding has not."""
    for i, prompt in enumerate(prompts):
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            bad = next(token for token in prompt if not 0 <= token < model.vocab_size)
            raise UserError(
                f"prompt {i} (from 0) holds the id {bad}; ids of this model are from 0 to "
                f"{model.vocab_size - 1}: encode prompts with its own tokenizer"
            )


def _plain(model: MatLM, rows: Rows, submodels: Sequence[Submodel]) -> Iterator[list[New]]:
    cache = model.new_cache(len(rows), rows.request.capacity)

    def next_logits() -> Tensor:
        return read(model, [submodels[i] for i in rows.prompts], rows.tokens, cache)[:, 0]

    return one_by_one(rows, next_logits, cache.keep)


@torch.no_grad()
def one_by_one(
    rows: Rows, next_logits: Callable[[], Tensor], keep: Callable[[Sequence[int]], None]
) -> Iterator[list[New]]:
    """A token of each row a pass. next_logits: [B, V] of the rows; `keep` is told who stays."""
    while rows:
        ids = rows.request.sampling.draw(next_logits(), rows.uniforms(DRAW))
        news, staying = rows.add([[token] for token in ids.tolist()])
        yield news
        if staying:
            keep(staying)
