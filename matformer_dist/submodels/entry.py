"""submodel.json: what an extracted model is, and out of which run."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from matformer_dist.counting import count_parameters
from matformer_dist.errors import UserError
from matformer_dist.run_directory import ENTRY, Manifest
from matformer_dist.submodels.formats import FORMATS
from matformer_dist.submodels.parts import Export, Source
from matformer_dist.submodels.slices import read_slices


def describe(source: Source, export: Export, run_dir: Path, format: str) -> dict[str, Any]:
    """submodel.json. Losses are nats per token, or image; parameters are those of the exact widths.
    Of a vision encoder, how images are prepared and the share that is classified rightly, too.

    UserError where the run's evaluation.json or slices.json cannot be read.
    """
    universal, submodel = source.universal, source.submodel
    count = count_parameters(universal.model, universal.outputs, submodel)
    nesting = universal.nesting
    measured = _measured(run_dir, universal.checkpoint.step, str(submodel))
    of_images = {}
    if source.image_preprocessing is not None:
        of_images = {
            "accuracy": measured.accuracy,
            "preprocessing": source.image_preprocessing.to_dict(),
        }
    return {
        "submodel": str(submodel),
        "widths": list(submodel.widths),
        "parameters": count.total,
        "non_embedding_parameters": count.non_embedding,
        "format": format,
        "sparse": export.sparse,
        "nested": export.nested,
        "dtype": source.dtype,
        "step": universal.checkpoint.step,
        "checkpoint_sha256": universal.checkpoint.manifest.manifest_sha256,
        "run": str(run_dir),
        "bytes": export.weights.bytes,
        "trained": _origin(universal.checkpoint.manifest),
        "loss": measured.loss,
        **of_images,
        "padded_width": export.padded_width,
        "nesting": {"widths": list(nesting.widths), "names": list(nesting.names)},
    }


def _origin(manifest: Manifest) -> str:
    """Of what the weights were rounded, in words."""
    if not manifest.has_optimizer:
        return "the weights as imported"
    return "training's fp32 weights" + (" (masters)" if manifest.precision != "fp32" else "")


class _Measured(NamedTuple):
    """On validation data; None where it was not measured, or is not finite."""

    loss: float | None = None
    accuracy: float | None = None


def _measured(run_dir: Path, step: int, submodel: str) -> _Measured:
    """Of the run's evaluation.json or slices.json, if it was measured there at this step, on the
    run's own data.
    """
    evaluated = _evaluated(run_dir / "evaluation.json", step, submodel)
    return evaluated if evaluated.loss is not None else _searched(run_dir, step, submodel)


def _searched(run_dir: Path, step: int, submodel: str) -> _Measured:
    slices = read_slices(run_dir)
    if slices is None or slices.step != step or slices.data:
        return _Measured()
    found = next((one for one in slices.measured if one.submodel == submodel), None)
    return _Measured(_finite(found.loss), _finite(found.accuracy)) if found else _Measured()


def _evaluated(path: Path, step: int, submodel: str) -> _Measured:
    if not path.exists():
        return _Measured()
    try:
        evaluation = json.loads(path.read_text())
        if evaluation["step"] != step or evaluation.get("data"):
            return _Measured()
        entries = {entry["submodel"]: entry for entry in evaluation["submodels"]}
        if (found := entries.get(submodel)) is None:
            return _Measured()
        return _Measured(_finite(found["loss"]), _finite(found.get("accuracy")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}: {error}); evaluate the run again, or "
            "delete the file"
        ) from None


def _finite(value: Any) -> float | None:
    number = None if value is None else float(value)
    return number if number is not None and isfinite(number) else None


def is_extracted(directory: Path) -> bool:
    """Whether `extract` wrote the directory, as far as its files tell."""
    return (directory / ENTRY).exists()


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
