"""A language model in memory: texts from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from matformer_dist.inference.decoding import decode
from matformer_dist.inference.held import LoadedModel
from matformer_dist.inference.sampling import Sampling
from matformer_dist.inference.speculative import Drafting, Statistics
from matformer_dist.inference.texts import Piece, as_text, encode_prompts
from matformer_dist.models.matlm import MatLM


@dataclass(frozen=True)
class LoadedLanguageModel(LoadedModel):
    model: MatLM

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """UserError where its files are gone."""
        return load_tokenizer(self.directory)

    def generate(
        self,
        prompts: Sequence[str],
        submodels: Sequence[str | Sequence[str]] | str | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        seed: int = 0,
        draft: str | None = None,
        draft_tokens: int | Literal["auto"] = 4,
        draft_cache: Literal["own", "shared"] = "shared",
        statistics: Statistics | None = None,
    ) -> list[str]:
        """The texts that follow the prompts, without them, each up to the end of its document.

        All in one batch. submodels: none (the largest), one for all prompts, or one for each; as
        `parse` reads them. draft: a smaller one that drafts for all of them, exactly
        (speculative.py). UserError for what does not fit.
        """
        texts = [""] * len(prompts)
        pieces = self.stream(
            prompts,
            submodels,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
            drafting=(None if draft is None else self.drafting(draft, draft_tokens, draft_cache)),
            statistics=statistics,
        )
        for piece in pieces:
            texts[piece.prompt] += piece.text
        return texts

    def drafting(
        self,
        draft: str,
        tokens: int | Literal["auto"] = 4,
        cache: Literal["own", "shared"] = "shared",
    ) -> Drafting:
        """Of the submodel that `parse` reads."""
        return Drafting(self.parse(draft), tokens, cache)

    def stream(
        self,
        prompts: Sequence[str],
        submodels: Sequence[str | Sequence[str]] | str | None = None,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        drafting: Drafting | None = None,
        statistics: Statistics | None = None,
    ) -> Iterator[Piece]:
        """The same in pieces, as they come; what does not fit is said at once."""
        ids = encode_prompts(self.tokenizer, prompts)
        notations = [submodels] if isinstance(submodels, str) else submodels or ()
        chosen = [self.parse(notation) for notation in notations] or [self.submodel]
        if drafting is not None and drafting.submodel in chosen:
            raise UserError(
                f"submodel {drafting.submodel} cannot draft for itself; choose a draft that is "
                "narrower somewhere, and nowhere wider"
            )
        passes = decode(
            self.model,
            chosen,
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            eod=self.tokenizer.eod,
            drafting=drafting,
            statistics=statistics,
        )
        return as_text(passes, ids, self.tokenizer)
