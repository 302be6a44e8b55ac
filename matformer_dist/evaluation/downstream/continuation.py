"""Texts for lm-eval's generate_until: its settings, and generation until a stop sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from matformer_dist.errors import UserError
from matformer_dist.inference.generation import Sampling, generate
from matformer_dist.inference.language import LoadedLanguageModel
from matformer_dist.nesting import Submodel

DEFAULT_NEW_TOKENS = 256  # as lm-eval's `hf` model has it
_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
_FIRST_PIECE = 16  # tokens, after which stop sequences are looked for; doubled each time


@dataclass(frozen=True)
class Continuation:
    until: tuple[str, ...]  # the text ends before the first of them
    max_new_tokens: int
    sampling: Sampling

    @classmethod
    def of(cls, settings: Mapping[str, Any], context: int) -> Continuation:
        """From a task's generation_kwargs; UserError where they ask for what there is not, or
        leave a model of `context` tokens no room for a prompt.
        """
        if not isinstance(settings, Mapping):
            raise UserError(f"generation_kwargs {settings!r} must hold keys: {', '.join(_KNOWN)}")
        given = normalize_gen_kwargs(dict(settings), DEFAULT_NEW_TOKENS)
        if unknown := sorted(set(given) - set(_KNOWN)):
            raise UserError(
                f"generation_kwargs {', '.join(unknown)} are unknown here; what can be set is "
                f"{', '.join(_KNOWN)}"
            )
        new = given["max_gen_toks"]
        if not 0 < new < context:
            raise UserError(
                f"generation of max_gen_toks {new} tokens leaves no room for a prompt in the "
                f"model's context of {context}; set less in the task, or leave it out"
            )
        temperature = float(given.get("temperature", 1.0)) if given["do_sample"] else 0.0
        sampling = Sampling(temperature, given.get("top_k") or 0, given.get("top_p") or 1.0)
        return cls(tuple(filter(None, handle_stop_sequences(given["until"], None))), new, sampling)


def continue_prompts(
    loaded: LoadedLanguageModel,
    submodel: Submodel,
    prompts: Sequence[Sequence[int]],
    how: Continuation,
    seed: int,
) -> list[str]:
    """The text behind each prompt, stop sequences and what follows them not yet cut off.

    Pieces grow, so that most prompts need but one, and what is read again is less than what is new.
    """
    found: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    done, piece = 0, _FIRST_PIECE
    while going and done < how.max_new_tokens:
        piece = min(piece, how.max_new_tokens - done)
        begun = [[*prompts[i], *found[i]] for i in going]
        new = generate(
            loaded.model,
            submodel,
            begun,
            max_new_tokens=piece,
            sampling=how.sampling,
            seed=seed + done,
            eod=loaded.tokenizer.eod,
        )
        for i, ids in zip(going, new, strict=True):
            found[i] += ids
        done += piece
        going = [i for i in going if len(found[i]) == done and not _stops(loaded, found[i], how)]
        piece *= 2
    return [loaded.tokenizer.decode(ids) for ids in found]


def _stops(loaded: LoadedLanguageModel, ids: Sequence[int], how: Continuation) -> bool:
    text = loaded.tokenizer.decode(ids)
    return any(stop in text for stop in how.until)
