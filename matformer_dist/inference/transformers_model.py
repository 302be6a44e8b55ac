"""Text from an `hf` directory, by transformers: one prompt after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from matformer_dist.inference.batch import New, Request, Rows
from matformer_dist.inference.decoding import one_by_one, one_each
from matformer_dist.inference.held import HoldsSubmodels
from matformer_dist.inference.sampling import Sampling
from matformer_dist.inference.texts import Piece, as_text, encode_prompts
from matformer_dist.nesting import Nesting, Submodel
from matformer_dist.submodels.entry import read_entry


class TransformersModel(HoldsSubmodels):
    """One that `load_transformers` loads, and what its directory says of it.

    UserError where the directory's submodel.json or its model cannot be read.
    """

    def __init__(self, directory: Path, dtype: torch.dtype | None, device: torch.device) -> None:
        entry = read_entry(directory)
        nesting = Nesting.from_widths(entry["nesting"]["widths"], entry["nesting"]["names"])
        self.submodel = nesting.parse(entry["submodel"], len(entry["widths"]))
        self.nested = bool(entry["nested"])
        self.directory = directory
        self.device = device
        self.labels = self.tokenizer = load_tokenizer(directory)
        self.model = load_transformers(directory, dtype, device)

    def choose(self, submodel: Submodel) -> None:
        """Run it from now on; it is one that the model holds."""
        if self.nested:
            self.model.set_submodel(str(submodel))

    def logits(self, tokens: Tensor, submodel: Submodel) -> Tensor:
        """tokens [b, s] -> next-token logits [b, s, V]."""
        self.choose(submodel)
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits

    def stream(
        self,
        prompts: Sequence[str],
        submodels: Sequence[str] = (),
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
    ) -> Iterator[Piece]:
        """As that of LoadedModel."""
        ids = encode_prompts(self.tokenizer, prompts)
        chosen = [self.parse(notation) for notation in submodels] or [self.submodel]
        chosen = one_each(chosen, len(prompts))
        eod, context = self.tokenizer.eod, self.model.config.max_position_embeddings
        request = Request(ids, max_new_tokens, sampling, seed, eod, context)
        return as_text(self._passes(request, chosen), ids, self.tokenizer)

    def _passes(self, request: Request, submodels: Sequence[Submodel]) -> Iterator[list[New]]:
        for i, submodel in enumerate(submodels):
            yield from self._text(Rows(request, [i], self.device), submodel)

    def _text(self, rows: Rows, submodel: Submodel) -> Iterator[list[New]]:
        """rows: of one prompt. What it has read lies in transformers' cache."""
        cache: Any = None
        held = 0  # tokens in it

        def next_logits() -> Tensor:
            nonlocal cache, held
            self.choose(submodel)
            new = torch.tensor([tokens[held:] for tokens in rows.tokens], device=self.device)
            out = self.model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, held = out.past_key_values, held + new.shape[1]
            logits: Tensor = out.logits[:, -1]
            return logits

        return one_by_one(rows, next_logits, lambda _: None)


def load_transformers(directory: Path, dtype: torch.dtype | None, device: torch.device) -> Any:
    """Load an `hf` directory by transformers. One that carries code is loaded by the code of this
    package, of which that is a copy: no code of the directory runs.

    UserError where transformers is not installed, or cannot load the directory.
    """
    try:
        from transformers import AutoModelForCausalLM, PreTrainedConfig
        from transformers.utils import logging

        from matformer_dist.submodels.shipped_code.modeling_matformer import (
            MatformerLlamaForCausalLM,
            MatformerStarcoder2ForCausalLM,
        )
        from matformer_dist.submodels.shipped_code.modeling_nemotron_nas import DeciLMForCausalLM
    except ImportError:
        raise UserError(
            f"{directory} is in format hf, which needs transformers; install it by "
            "`pip install matformer-dist[export]`, or extract with --format native"
        ) from None
    ours = {
        loader.config_class.model_type: loader
        for loader in (DeciLMForCausalLM, MatformerLlamaForCausalLM, MatformerStarcoder2ForCausalLM)
    }
    has_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the text is what a user wants to see
    try:
        config, _ = PreTrainedConfig.get_config_dict(directory, local_files_only=True)
        loader = ours.get(config.get("model_type"), AutoModelForCausalLM)
        model = loader.from_pretrained(
            directory, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"transformers cannot load {directory} ({error}); extract the model again"
        ) from None
    finally:
        if has_bar:
            logging.enable_progress_bar()
    return model.to(device).eval()
