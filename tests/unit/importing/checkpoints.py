"""Tiny Llamas as transformers makes and saves them, with a SentencePiece tokenizer beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matformer_dist.checkpoints.universal import load_universal
from matformer_dist.models.matlm import MatLM
from matformer_dist.run_directory import find_checkpoint
from tests.unit.submodels.synthetic_run import TEXT, VOCAB, small_tokenizer

transformers = pytest.importorskip("transformers")

CALIBRATION = TEXT * 6


def random_llama(seed: int = 5, **changes: Any) -> Any:
    """Weights of all kinds random, norms too, or an import that forgets them goes unnoticed."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 48, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(seed)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **changes}))
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return llama.eval()


def save(llama: Any, directory: Path, shard_size: str = "50KB") -> Path:
    """A checkpoint in shards, as downloaded."""
    llama.save_pretrained(directory, max_shard_size=shard_size)
    (directory / "tokenizer.model").write_bytes(small_tokenizer().model)
    (directory / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of config.json; a value of ... takes a key out."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def some_tokens(vocab_size: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab_size, (2, 19), generator=torch.Generator().manual_seed(1))


def load(run: Path) -> MatLM:
    """The imported universal model, in memory."""
    model = load_universal(find_checkpoint(str(run))).build().eval()
    assert isinstance(model, MatLM)
    return model


@torch.no_grad()
def xl_logits(run: Path, tokens: Tensor) -> Tensor:
    lm = load(run)
    nesting = load_universal(find_checkpoint(str(run))).nesting
    return lm.logits(tokens, nesting.uniform(nesting.largest, lm.model.n_layers))
