"""Take submodels out of a training run: one directory each, whole or not there at all.

```
config.json                 the architecture: transformers', timm's or ours   native, hf, timm
model[-0000i-of-0000n].safetensors  weights, with an index if several       native, hf, timm
model.gguf                  weights, settings and vocabulary            gguf
tokenizer.model             the SentencePiece tokenizer
tokenizer.json, tokenizer_config.json, generation_config.json           hf
configuration_nemotron_nas.py, modeling_nemotron_nas.py                 hf, sparse
configuration_matformer.py, modeling_matformer.py                       hf, nested
classes.json                names of an image classifier's classes      native
preprocessor_config.json    how images are prepared for it              hf
submodel.json, README.md    see entry.py; the model card
```
Of formats and tasks, `_EXPORTS` has those that belong together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matformer_dist.checkpoints.files import sync_directory, sync_file
from matformer_dist.checkpoints.new_directory import NewDirectory, check_space, is_free
from matformer_dist.checkpoints.universal import UniversalModel, load_universal
from matformer_dist.checkpoints.verify import BackgroundCheck
from matformer_dist.config import ModelConfig
from matformer_dist.config_file import UNREAD_DATA, load_config
from matformer_dist.config_vision import VisionConfig, VisionModelConfig
from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.data.labels import Labels, load_labels
from matformer_dist.errors import UserError
from matformer_dist.run_directory import ENTRY, LABEL_FILES, find_checkpoint
from matformer_dist.submodels.entry import describe
from matformer_dist.submodels.formats import DTYPES, FORMATS, directory_name
from matformer_dist.submodels.gguf_format import gguf_export
from matformer_dist.submodels.language_card import language_card
from matformer_dist.submodels.native import native_export
from matformer_dist.submodels.nemotron_nas import nemotron_nas_export
from matformer_dist.submodels.nested_transformers import nested_transformers_export
from matformer_dist.submodels.parts import Export, Source, WeightFiles, write_weights
from matformer_dist.submodels.safetensors_files import SHARD_BYTES
from matformer_dist.submodels.slices import find_submodel
from matformer_dist.submodels.timm_format import timm_export
from matformer_dist.submodels.transformers_format import transformers_export
from matformer_dist.submodels.vision_card import vision_card
from matformer_dist.submodels.vit_format import vit_export

_EXPORTS = {  # by task and format
    ("language", "native"): native_export,
    ("language", "hf"): transformers_export,
    ("language", "gguf"): gguf_export,
    ("vision", "native"): native_export,
    ("vision", "hf"): vit_export,
    ("vision", "timm"): timm_export,
}


_OURS = re.compile(  # names that any format writes, or what was measured of the model
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.gguf"
    r"|model\.safetensors\.index\.json|(configuration|modeling)_(nemotron_nas|matformer)\.py"
    r"|preprocessor_config\.json|evaluation\.json|\.evaluation\.lock|downstream\.json"
    rf"|README\.md|{re.escape(ENTRY)}|{'|'.join(map(re.escape, LABEL_FILES))}"
)


@dataclass(frozen=True)
class ExtractedModel:
    """A model that `extract` wrote."""

    path: Path
    submodel: str
    parameters: int
    bytes: int  # of the weights


class _Model(NamedTuple):
    """A model to write."""

    weights: WeightFiles
    files: dict[str, str | bytes]  # the others by name
    entry: dict[str, Any]
    directory: NewDirectory


def extract(
    run: str,
    submodels: Sequence[str],
    *,
    output: Path,
    format: str = "native",
    sparse: bool = False,
    nested: bool = False,
    dtype: str = "fp32",
    force: bool = False,
    verify: bool = True,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[ExtractedModel]:
    """Write each of `submodels` (see find_submodel) of RUN[@STEP] into a directory of its own.

    That is `output`, or for several `output/NAME`; the parent's weights are read once for all, one
    at a time. fp32 is the default because it is what training kept: nothing is lost, and any other
    dtype can be made from it. `sparse` is for format hf: exact widths, for engines that read them;
    `nested` too: every submodel of what is written runs in transformers. `force` replaces a model
    that was extracted before, where nothing else is beside it. `tokenizer`, or a classes.json,
    stands in where the run's copy is gone. UserError for input that does not fit and for a full
    disk, before anything is written; for weights that overflow in fp16 before any model is in
    place, and for a damaged checkpoint: `verify` reads all of it meanwhile, the optimizer's moments
    too.
    """
    _check_format(format, sparse, nested, dtype)
    universal = load_universal(find_checkpoint(run))
    _check_task(universal.model, format, sparse or nested)
    run_dir = universal.checkpoint.path.parent.parent
    labels = _labels(universal, run_dir, tokenizer)
    preprocessing = _preprocessing(universal.model, run_dir)
    chosen = list(
        dict.fromkeys(
            find_submodel(
                notation,
                universal.nesting,
                universal.model.n_layers,
                run_dir,
                universal.checkpoint.manifest.manifest_sha256,
            )
            for notation in submodels
        )
    )
    export = _EXPORTS[universal.model.task, format]
    if sparse or nested:
        export = nemotron_nas_export if sparse else nested_transformers_export
    models = []
    for submodel in chosen:
        target = output if len(chosen) == 1 else output / directory_name(submodel)
        new = NewDirectory(target, _check_replaced if force else _check_free)
        source = Source(universal, submodel, labels, dtype, shard_bytes, preprocessing)
        models.append(_model(source, export(source), new, run_dir, format))
    _check_distinct([model.directory.place for model in models])
    needed = sum(model.weights.bytes + sum(map(len, model.files.values())) for model in models)
    check_space(output, needed)
    widths = [max(of) for of in zip(*(submodel.widths for submodel in chosen), strict=True)]
    try:
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(model.directory)
            with BackgroundCheck(universal.checkpoint) if verify else nullcontext():
                _write(universal, models, widths)
            for model in models:
                model.directory.publish()
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}; choose another output") from None
    return [
        ExtractedModel(
            m.directory.place, m.entry["submodel"], m.entry["parameters"], m.entry["bytes"]
        )
        for m in models
    ]


def _check_format(format: str, sparse: bool, nested: bool, dtype: str) -> None:
    if format not in FORMATS:
        raise UserError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}")
    if sparse and format != "hf":
        raise UserError(
            f"--sparse is for format hf, not {format}, which always has exact widths; leave it out"
        )
    if nested and format != "hf":
        still = ", which is nested as it is" if format == "native" else ""
        raise UserError(f"--nested is for format hf, not {format}{still}; leave it out")
    if sparse and nested:
        raise UserError(
            "--sparse, for engines that run one submodel, and --nested, for transformers to run "
            "any, exclude each other; choose one"
        )
    if dtype not in DTYPES[format]:
        raise UserError(
            f"there is no dtype {dtype!r} in format {format}; choose one of "
            f"{', '.join(DTYPES[format])}"
        )


def _check_task(model: ModelConfig, format: str, by_code: bool) -> None:
    """UserError where a format does not hold models of this task."""
    fits = [kind for task, kind in _EXPORTS if task == model.task]
    if format not in fits:
        raise UserError(
            f"format {format} does not hold a model of task: {model.task}; choose one of "
            f"{', '.join(fits)}"
        )
    if by_code and model.task != "language":
        raise UserError(
            "--sparse and --nested are for language models; leave them out: format native has "
            "exact widths, and is nested"
        )


def _labels(universal: UniversalModel, run_dir: Path, path: Path | None) -> Labels:
    """The tokenizer or class names that the run was trained with: its own copy, if no other is
    named.
    """
    labels = load_labels(path or run_dir, universal.model)
    if labels.digest != universal.checkpoint.manifest.labels_sha256:
        raise UserError(
            f"{labels.source} is not what {universal.checkpoint.path} was trained with (its "
            "SHA-256 differs); give the original file"
        )
    return labels


def _preprocessing(model: ModelConfig, run_dir: Path) -> Preprocessing | None:
    """What the run does to images before its model sees them; of a text nothing."""
    if not isinstance(model, VisionModelConfig):
        return None
    config = load_config(run_dir / "config.yaml", if_open=UNREAD_DATA)
    if not isinstance(config, VisionConfig):
        raise UserError(
            f"{run_dir / 'config.yaml'} is of task: {config.task}, its checkpoint of a vision "
            "encoder; give the run.dir that training has written"
        )
    return Preprocessing.of(config.data, model.image_size, model.channels)


def _check_distinct(places: Sequence[Path]) -> None:
    for place in places:
        if places.count(place) > 1:
            raise UserError(
                f"two of the submodels would be written to {place}; extract them one by one"
            )


def _check_free(target: Path) -> None:
    if not is_free(target):
        raise UserError(f"{target} exists and is not empty; choose another output, or force it")


def _check_replaced(target: Path) -> None:
    """UserError where something would be lost that `extract` did not write."""
    if is_free(target):
        return
    if not (target / ENTRY).exists():
        raise UserError(
            f"{target} holds no extracted model, so it is not replaced; choose another output"
        )
    foreign = sorted(path.name for path in target.iterdir() if not _OURS.fullmatch(path.name))
    if foreign:
        raise UserError(
            f"{target} holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''} beside "
            "an extracted model, which would be lost; move that away, or choose another output"
        )


def _model(
    source: Source, export: Export, directory: NewDirectory, run_dir: Path, format: str
) -> _Model:
    entry = describe(source, export, run_dir, format)
    if source.universal.model.task == "vision":
        card = vision_card(entry, source.vision_model, source.universal.outputs)
    else:
        card = language_card(entry, source.language_model, source.universal.outputs)
    files = {**export.files, ENTRY: json.dumps(entry, indent=2) + "\n", "README.md": card}
    return _Model(export.weights, files, entry, directory)


def _write(universal: UniversalModel, models: Sequence[_Model], widths: Sequence[int]) -> None:
    """Write all files of all models, and put them on disk."""
    write_weights(universal, [(model.weights, model.directory.path) for model in models], widths)
    for model in models:
        for name, content in model.files.items():
            data = content.encode() if isinstance(content, str) else content
            (model.directory.path / name).write_bytes(data)
        for path in model.directory.path.iterdir():
            sync_file(path)
        sync_directory(model.directory.path)
