"""Models in memory, for one process: a run's universal model, or an extracted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from matformer_dist.checkpoints.universal import load_universal
from matformer_dist.checkpoints.verify import BackgroundCheck
from matformer_dist.errors import UserError
from matformer_dist.inference.held import LoadedModel
from matformer_dist.inference.language import LoadedLanguageModel
from matformer_dist.inference.vision import LoadedVisionModel
from matformer_dist.models.building import build_model
from matformer_dist.models.matformer import MatFormer
from matformer_dist.models.matlm import MatLM
from matformer_dist.models.matvit import MatViT
from matformer_dist.parallel.layers import Initializer
from matformer_dist.run_directory import find_checkpoint
from matformer_dist.submodels.entry import is_extracted
from matformer_dist.submodels.native import read_native_config
from matformer_dist.submodels.safetensors_files import read_weights


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
    return _loaded(model.eval(), largest, directory, checkpoint.step, sha256)


def load_native(
    directory: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Load a `native` directory; `dtype` None keeps the stored one. UserError if it is damaged."""
    described = read_native_config(directory)
    init = Initializer(seed=None)
    model = build_model(described.model, described.nestings, described.outputs, init)
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
    model.to(device)  # what is no weight, too: fixed positions
    return _loaded(model.eval(), described.submodel, directory)


def load_language_model(
    source: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LoadedLanguageModel:
    """The same, of task language; UserError for another."""
    loaded = load_model(source, dtype, device)
    if isinstance(loaded, LoadedLanguageModel):
        return loaded
    raise UserError(f"{source} is a vision encoder, which reads no text; give a language model")


def load_vision_model(
    source: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LoadedVisionModel:
    """The same, of task vision; UserError for another."""
    loaded = load_model(source, dtype, device)
    if isinstance(loaded, LoadedVisionModel):
        return loaded
    raise UserError(f"{source} is a language model, which reads no images; give a vision encoder")


def _loaded(model: MatFormer, *arguments: Any) -> LoadedModel:
    if isinstance(model, MatViT):
        return LoadedVisionModel(model, *arguments)
    assert isinstance(model, MatLM)
    return LoadedLanguageModel(model, *arguments)
