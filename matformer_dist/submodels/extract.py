"""Take submodels out of a training run: one directory each, whole or not there at all.

```
config.json                 the architecture: transformers' or ours   submodel.json  see `_entry`
model[-0000i-of-0000n].safetensors  weights, with an index if several README.md      model card
tokenizer.model             the SentencePiece tokenizer
tokenizer.json, tokenizer_config.json, generation_config.json         format hf only
```
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matformer_dist.checkpoints.universal import UniversalModel, load_universal
from matformer_dist.counting import count_parameters
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.errors import UserError
from matformer_dist.nesting import Submodel
from matformer_dist.run_directory import TOKENIZER, find_checkpoint
from matformer_dist.submodels.formats import FORMATS, directory_name
from matformer_dist.submodels.model_card import model_card
from matformer_dist.submodels.native import native_config, native_weights
from matformer_dist.submodels.safetensors_files import SHARD_BYTES, write_weights
from matformer_dist.submodels.transformers_format import (
    check_architecture,
    transformers_config,
    transformers_weights,
)
from matformer_dist.submodels.transformers_tokenizer import write_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ENTRY = "submodel.json"


@dataclass(frozen=True)
class ExtractedModel:
    """A model that `extract` wrote."""

    path: Path
    submodel: str
    parameters: int
    bytes: int  # of the weight files


def extract(
    run: str,
    submodels: Sequence[str],
    *,
    output: Path,
    format: str = "native",
    dtype: str = "fp32",
    force: bool = False,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[ExtractedModel]:
    """Write each of `submodels` (see Nesting.parse) of RUN[@STEP] into a directory of its own.

    That is `output`, or for several `output/NAME`. fp32 is the default because it is what
    training kept: nothing is lost, and any other dtype can be made from it. `force` replaces a
    model that was extracted before. `tokenizer` stands in where the run's copy is gone. Memory:
    one shard and one weight. UserError for input that does not fit, before anything is written, and
    for weights that overflow in fp16, before the model they belong to is in place.
    """
    if format not in FORMATS:
        raise UserError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    universal = load_universal(find_checkpoint(run))
    if format == "hf":
        check_architecture(universal.model)
    run_dir = universal.checkpoint.path.parent.parent
    text = _tokenizer(universal, run_dir, tokenizer)
    chosen = list(
        dict.fromkeys(
            universal.nesting.parse(notation, universal.model.n_layers) for notation in submodels
        )
    )
    single = len(chosen) == 1
    targets = [output if single else output / directory_name(submodel) for submodel in chosen]
    for target in targets:
        _check_target(target, force)
    return [
        _write(universal, submodel, target, text, run_dir, format, dtype, shard_bytes)
        for submodel, target in zip(chosen, targets, strict=True)
    ]


def read_entry(directory: Path) -> dict[str, Any]:
    """submodel.json of an extracted model; UserError where the directory is none."""
    try:
        entry: dict[str, Any] = json.loads((directory / ENTRY).read_text())
        if entry["format"] in FORMATS:
            return entry
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{directory} is not an extracted model: it has no readable {ENTRY}; give a directory "
        "that `matformer extract` wrote"
    )


def _tokenizer(universal: UniversalModel, run_dir: Path, path: Path | None) -> Tokenizer:
    """The tokenizer that the run was trained with: its own copy, if no other is named."""
    tokenizer = Tokenizer.load(path or run_dir / TOKENIZER)
    path = Path(tokenizer.source)
    if tokenizer.digest != universal.checkpoint.manifest.tokenizer_sha256:
        raise UserError(
            f"the tokenizer {path} is not the one that {universal.checkpoint.path} was trained "
            "with (its SHA-256 differs); give the original file"
        )
    return tokenizer


def _check_target(target: Path, force: bool) -> None:
    if not target.name or target.name == "..":
        raise UserError(
            f"the output {target} has no name of its own; give the name of a new folder, for "
            "example ./M"
        )
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise UserError(f"{target} exists and is not empty; choose another output, or force it")
    if not (target / ENTRY).exists():
        raise UserError(
            f"{target} holds no extracted model, so it is not replaced; choose another output"
        )


def _write(
    universal: UniversalModel,
    submodel: Submodel,
    target: Path,
    tokenizer: Tokenizer,
    run_dir: Path,
    format: str,
    dtype: str,
    shard_bytes: int,
) -> ExtractedModel:
    """Write under a temporary name beside the target, and rename last."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.incomplete")
    try:
        temporary.mkdir(parents=True)
        if format == "hf":
            config = transformers_config(universal, submodel, tokenizer.eod, DTYPES[dtype])
            weights = transformers_weights(universal, submodel)
            write_tokenizer(temporary, tokenizer, universal.model.max_seq_len)
            generation = {"bos_token_id": tokenizer.eod, "eos_token_id": tokenizer.eod}
            _write_json(temporary / "generation_config.json", generation)
        else:
            config = {**native_config(universal, submodel, tokenizer.eod), "dtype": dtype}
            weights = native_weights(universal, submodel)
        _write_json(temporary / "config.json", config)
        (temporary / "tokenizer.model").write_bytes(tokenizer.model)
        size = write_weights(temporary, weights, DTYPES[dtype], shard_bytes)
        entry = _entry(universal, submodel, run_dir, format, dtype, size)
        _write_json(temporary / ENTRY, entry)
        card = model_card(entry, universal.model, universal.vocab_size)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}; choose another output") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ExtractedModel(target, entry["submodel"], entry["parameters"], size)


def _entry(
    universal: UniversalModel,
    submodel: Submodel,
    run_dir: Path,
    format: str,
    dtype: str,
    size: int,
) -> dict[str, Any]:
    """submodel.json. Losses are nats per token; parameters are those of the exact widths."""
    count = count_parameters(universal.model, universal.vocab_size, submodel)
    widest = max(submodel.widths)
    padded = format == "hf" and not submodel.is_uniform
    is_fp32 = universal.checkpoint.manifest.precision == "fp32"
    nesting = universal.nesting
    return {
        "submodel": str(submodel),
        "widths": list(submodel.widths),
        "parameters": count.total,
        "non_embedding_parameters": count.non_embedding,
        "format": format,
        "dtype": dtype,
        "step": universal.checkpoint.step,
        "run": str(run_dir),
        "bytes": size,
        "trained": "fp32 weights" if is_fp32 else "fp32 master weights",
        "loss": _measured_loss(run_dir, universal.checkpoint.step, str(submodel)),
        "padded_width": widest if padded else None,
        "nesting": {"widths": list(nesting.widths), "names": list(nesting.names)},
    }


def _measured_loss(run_dir: Path, step: int, submodel: str) -> float | None:
    """Validation loss from the run's evaluation.json, if it is of this step and submodel."""
    path = run_dir / "evaluation.json"
    if not path.exists():
        return None
    try:
        evaluation = json.loads(path.read_text())
        if evaluation["step"] != step:
            return None
        losses = {entry["submodel"]: float(entry["loss"]) for entry in evaluation["submodels"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}: {error}); evaluate the run again, or "
            "delete the file"
        ) from None
    return losses.get(submodel)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
