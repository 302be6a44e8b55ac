"""Models in memory, for one process: a run's universal model, or an extracted one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from matformer_dist.checkpoints.universal import load_universal
from matformer_dist.checkpoints.verify import BackgroundCheck
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from matformer_dist.inference.decoding import decode
from matformer_dist.inference.held import HoldsSubmodels
from matformer_dist.inference.sampling import Sampling
from matformer_dist.inference.speculative import Drafting, Statistics
from matformer_dist.inference.texts import Piece, as_text, encode_prompts
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Submodel
from matformer_dist.parallel.layers import Initializer
from matformer_dist.run_directory import find_checkpoint
from matformer_dist.submodels.entry import is_extracted
from matformer_dist.submodels.native import read_native_config
from matformer_dist.submodels.safetensors_files import read_weights


@dataclass(frozen=True)
class LoadedModel(HoldsSubmodels):
    model: MatLM
    submodel: Submodel
    directory: Path
    step: int | None = None  # of the run
    checkpoint_sha256: str | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """UserError where its files are gone."""
        return load_tokenizer(self.directory)

    def run_pass(self, tokens: Tensor, targets: Tensor, plan: Pass) -> Tensor:
        """Statistics of a pass over tokens, targets [b, s]; see MatLM.forward."""
        statistics: Tensor = self.model(tokens, targets, plan)[1]
        return statistics

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


def load_model(
    source: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LoadedModel:
    """RUN[@STEP] or a checkpoint, all of it; or a directory that `extract` wrote as `native`.

    `dtype` None keeps the stored one, which is fp32 for runs. UserError for anything else, and
    where files are damaged: all of a checkpoint is compared with its SHA-256.
    """
    if is_extracted(Path(source)):
        return load_native(Path(source), dtype, device)
    checkpoint = find_checkpoint(source)
    universal = load_universal(checkpoint)
    with BackgroundCheck(checkpoint):
        model = universal.build()
    largest = universal.nesting.uniform(universal.nesting.largest, universal.model.n_layers)
    directory = checkpoint.path.parent.parent
    model.to(device=device, dtype=dtype or torch.float32)
    sha256 = checkpoint.manifest.manifest_sha256
    return LoadedModel(model.eval(), largest, directory, checkpoint.step, sha256)


def load_native(
    directory: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Load a `native` directory; `dtype` None keeps the stored one. UserError if it is damaged."""
    described = read_native_config(directory)
    init = Initializer(seed=None)
    model = MatLM(described.model, described.nestings, described.vocab_size, init)
    missing = dict(model.named_parameters())
    for name, weight in read_weights(directory):
        parameter = missing.pop(name, None)
        if parameter is None or parameter.shape != weight.shape:
            raise UserError(
                f"{directory} holds a weight {name} {list(weight.shape)} that its config.json "
                "does not describe; extract the model again"
            )
        parameter.data = weight.to(device, dtype or weight.dtype)
    if missing:
        raise UserError(
            f"{directory} lacks the weights {', '.join(sorted(missing))}; extract the model again"
        )
    return LoadedModel(model.eval(), described.submodel, directory)
