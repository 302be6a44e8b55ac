"""The run directory that an import leaves: what a training run would, at step 0.

```
config.yaml              the model's settings; data.train is left for the user to set
tokenizer.*              an id for every row of the embedding; of an image classifier
classes.json             the names of its classes
checkpoints/step-0/      whole weights as in DeepSpeed's universal checkpoints, and the manifest
```
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from matformer_dist.checkpoints.files import replace_file, sync_directory, write_file
from matformer_dist.checkpoints.universal_files import value_path
from matformer_dist.importing.source import Source
from matformer_dist.models.building import build_model
from matformer_dist.parallel.layers import Initializer
from matformer_dist.run_directory import MANIFEST, UNIVERSAL, Manifest, SavedFile

STEP = "step-0"
_PACKAGES = ("matformer_dist", "torch")


def config_text(source: Source) -> str:
    """config.yaml, whose data.train stands for none: OmegaConf asks for what is ???."""
    tree: dict[str, Any] = source.config.model_dump(mode="json")
    tree["data"]["train"] = "???"
    return source.note + yaml.safe_dump(tree, sort_keys=False)


def write_run(
    directory: Path,
    source: Source,
    weights: Iterable[tuple[str, Tensor]],
    progress: Callable[[int, int], None],
) -> None:
    """Write all files, the manifest last, onto disk; OSError where they cannot be.

    `weights` are the model's, by name, in canonical order, each once; they are written as they
    come. `progress` is told of how many are written, of how many.
    """
    checkpoint = directory / "checkpoints" / STEP
    checkpoint.mkdir(parents=True)
    expected = _expected(source)
    total = len(expected)
    progress(0, total)
    files: dict[str, SavedFile] = {}
    for name, weight in weights:
        shape = expected.pop(name)
        assert weight.shape == shape, f"{name} is {weight.shape}, not {shape}"
        path = value_path(checkpoint, name, "fp32")
        files[path.relative_to(checkpoint).as_posix()] = _write_weight(path, weight)
        del weight  # before the next is made
        progress(len(files), total)
    assert not expected, f"not written: {sorted(expected)}"
    text = config_text(source)
    for name, content in source.labels.files.items():
        replace_file(directory / name, content)
    replace_file(directory / "config.yaml", text.encode())
    manifest = _manifest(source, text, files)
    replace_file(checkpoint / MANIFEST, manifest.sealed().encode())
    for folder in (checkpoint / "zero", checkpoint, checkpoint.parent, directory):
        sync_directory(folder)


def _expected(source: Source) -> dict[str, torch.Size]:
    """Shapes of the whole model's weights by name, without memory."""
    config = source.config
    layers = [config.granularities] * config.model.n_layers
    with torch.device("meta"):
        model = build_model(config.model, layers, source.outputs, Initializer(seed=None))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _write_weight(path: Path, weight: Tensor) -> SavedFile:
    path.parent.mkdir(parents=True)
    saved = write_file(path, lambda stream: torch.save({"param": weight}, stream))  # type: ignore[arg-type]
    sync_directory(path.parent)
    return saved


def _manifest(source: Source, text: str, files: dict[str, SavedFile]) -> Manifest:
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return Manifest(
        step=0,
        samples=0,
        units=0,
        layout=UNIVERSAL,
        model=source.config.model,  # type: ignore[arg-type]  # of one of the tasks
        nesting=source.config.granularities,
        outputs=source.outputs,
        precision=source.config.training.precision,
        labels_sha256=source.labels.digest,
        config_sha256=hashlib.sha256(text.encode()).hexdigest(),
        versions={**packages, "python": platform.python_version()},
        has_optimizer=False,
        files=dict(sorted(files.items())),
    )
