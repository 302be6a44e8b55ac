"""Texts and ids from models: runs, and what was extracted of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from matformer_dist.errors import UserError
from matformer_dist.inference.decoding import decode
from matformer_dist.inference.device import choose_device
from matformer_dist.inference.language import LoadedLanguageModel
from matformer_dist.inference.loading import load_language_model
from matformer_dist.inference.sampling import Sampling
from matformer_dist.inference.speculative import Drafting, Statistics
from matformer_dist.inference.texts import in_order
from matformer_dist.inference.transformers_model import TransformersModel
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Submodel
from matformer_dist.run_directory import ENTRY, MANIFEST
from matformer_dist.submodels.entry import is_extracted, read_entry

__all__ = ["Drafting", "GeneratedText", "Sampling", "generate", "sample", "speak"]


def generate(
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
) -> list[list[int]]:
    """New ids of each prompt, up to the end of its document `eod`, which is left out.

    All prompts, which may differ in length, are answered in one batch: by one submodel, or each by
    its own. Each gets what it would get alone. UserError as `batch.Request` says.
    """
    results: list[list[int]] = [[] for _ in prompts]
    passes = decode(
        model,
        submodels,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        eod=eod,
        drafting=drafting,
        statistics=statistics,
    )
    for news in passes:
        for new in news:
            results[new.prompt] += new.ids
    return results


@dataclass(frozen=True)
class GeneratedText:
    text: str  # without the prompt
    tokens: int  # drawn, the end of the document included
    seconds: float  # of generation, prompt included, loading not


def sample(
    source: Path | str,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    device: str | None = None,
    on_text: Callable[[str], None] = lambda text: None,
) -> GeneratedText:
    """Go on from `prompt` with a run, or an extracted model, until its document ends.

    An empty prompt begins a document. `on_text` gets the text in parts as they come, the prompt
    first, once all is known to be well. `device` as for `load_speaker`. UserError for a source, a
    prompt or sampling options that do not fit.
    """
    sampling = Sampling(temperature, top_k, top_p)
    model = load_speaker(source, device)
    begun = time.monotonic()
    pieces = model.stream([prompt], max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
    if prompt:
        on_text(prompt)
    parts, tokens = [], 0
    for piece in pieces:
        tokens += piece.tokens
        if piece.text:
            parts.append(piece.text)
            on_text(piece.text)
    return GeneratedText("".join(parts), tokens, time.monotonic() - begun)


def speak(
    source: Path | str,
    prompts: Sequence[str],
    submodels: Sequence[str] = (),
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    draft: str | None = None,
    draft_tokens: int | Literal["auto"] = 4,
    draft_cache: Literal["own", "shared"] = "shared",
    device: str | None = None,
    on_text: Callable[[str], None],
) -> Statistics | None:
    """Go on from all prompts in one batch; `on_text` gets their texts, one after another.

    Above each of several stands the submodel that speaks. submodels and draft: as `generate` of a
    LoadedLanguageModel takes them. What the drafts were worth, if there were any. UserError for
    what does not fit, before any text.
    """
    model = load_speaker(source, device)
    statistics = None
    if isinstance(model, LoadedLanguageModel):
        drafting = None
        if draft is not None:
            drafting, statistics = model.drafting(draft, draft_tokens, draft_cache), Statistics()
        pieces = model.stream(
            prompts, submodels, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed,
            drafting=drafting, statistics=statistics,
        )  # fmt: skip
    elif draft is not None:
        raise UserError(
            f"{source} is in format hf, of which nothing drafts here; leave --draft {draft} out, "
            "or give the run or a native model"
        )
    else:
        pieces = model.stream(
            prompts, submodels, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed
        )
    names = [str(model.parse(notation)) for notation in submodels] or [str(model.submodel)]
    names = names * len(prompts) if len(names) == 1 else names
    heads = list(prompts)
    if len(prompts) > 1:
        heads = [f"--- {name}\n{prompt}" for name, prompt in zip(names, prompts, strict=True)]
    on_text(heads[0])
    shown = 0
    for piece in in_order(pieces):
        if piece.prompt > shown:
            shown = piece.prompt
            on_text(f"\n{heads[shown]}")
        on_text(piece.text)
    return statistics


def load_speaker(
    source: Path | str, device: str | None = None
) -> LoadedLanguageModel | TransformersModel:
    """Whatever text can be had of: RUN[@STEP], a checkpoint, or an extracted model, native or hf.

    `device` defaults to the GPU, if there is one; on a CPU the arithmetic is fp32. UserError for
    anything else, and where files are damaged.
    """
    where = choose_device(device)
    dtype = torch.float32 if where.type == "cpu" else None
    directory = Path(source)
    if not is_extracted(directory):
        if directory.is_dir() and not _is_run(directory):
            raise UserError(
                f"{directory} is not an extracted model, and no run: it has neither {ENTRY} nor "
                "checkpoints; give a directory that `matformer extract` or training wrote"
            )
        return load_language_model(source, dtype, where)
    entry = read_entry(directory)
    if entry["format"] == "gguf":
        raise UserError(
            f"{directory} is in format gguf, which llama.cpp runs (see its README.md); extract "
            "with --format native or hf to generate here"
        )
    if entry["format"] == "hf":
        return TransformersModel(directory, dtype, where)
    return load_language_model(directory, dtype, where)


def _is_run(directory: Path) -> bool:
    """Or a checkpoint of one."""
    return any((directory / name).exists() for name in ("checkpoints", MANIFEST))
