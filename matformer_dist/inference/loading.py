"""Extracted models back in memory, for one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from matformer_dist.errors import UserError
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Submodel
from matformer_dist.parallel.layers import Initializer
from matformer_dist.submodels.native import read_native_config
from matformer_dist.submodels.safetensors_files import read_weights


@dataclass(frozen=True)
class LoadedModel:
    """`submodel` is all of `model`; submodels that are nowhere wider run on it too."""

    model: MatLM
    submodel: Submodel
    eod: int


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
    return LoadedModel(model.eval(), described.submodel, described.eod)


def load_transformers(
    directory: Path, dtype: torch.dtype | None, device: torch.device, sparse: bool = False
) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Load an `hf` directory by transformers. A `sparse` one is loaded by the code of this package,
    of which it carries a copy: no code of the directory runs.

    Returns its context in tokens, and a function that takes ids [1, n], which follow those of
    earlier calls, to the logits [1, V] of the token behind the last. UserError where transformers
    is not installed, or cannot load the directory.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from matformer_dist.submodels.shipped_code.modeling_nemotron_nas import DeciLMForCausalLM
    except ImportError:
        raise UserError(
            f"{directory} is in format hf, which needs transformers; install it by "
            "`pip install matformer-dist[export]`, or extract with --format native"
        ) from None
    has_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the text is what a user wants to see
    try:
        loader = DeciLMForCausalLM if sparse else AutoModelForCausalLM
        model = loader.from_pretrained(directory, dtype=dtype or "auto", local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"transformers cannot load {directory} ({error}); extract the model again"
        ) from None
    finally:
        if has_bar:
            logging.enable_progress_bar()
    model.to(device).eval()
    cache: Any = None

    def step(tokens: Tensor) -> Tensor:
        nonlocal cache
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        return out.logits[:, -1]

    return model.config.max_position_embeddings, step
