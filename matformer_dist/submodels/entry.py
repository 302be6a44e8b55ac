"""submodel.json: what an extracted model is, and out of which run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matformer_dist.counting import count_parameters
from matformer_dist.errors import UserError
from matformer_dist.submodels.formats import FORMATS
from matformer_dist.submodels.parts import Export, Source

ENTRY = "submodel.json"


def describe(source: Source, export: Export, run_dir: Path, format: str) -> dict[str, Any]:
    """submodel.json. Losses are nats per token; parameters are those of the exact widths.

    UserError where the run's evaluation.json cannot be read.
    """
    universal, submodel = source.universal, source.submodel
    count = count_parameters(universal.model, universal.vocab_size, submodel)
    is_fp32 = universal.checkpoint.manifest.precision == "fp32"
    nesting = universal.nesting
    return {
        "submodel": str(submodel),
        "widths": list(submodel.widths),
        "parameters": count.total,
        "non_embedding_parameters": count.non_embedding,
        "format": format,
        "sparse": export.sparse,
        "dtype": source.dtype,
        "step": universal.checkpoint.step,
        "run": str(run_dir),
        "bytes": export.weights.bytes,
        "trained": "fp32 weights" if is_fp32 else "fp32 master weights",
        "loss": _measured_loss(run_dir, universal.checkpoint.step, str(submodel)),
        "padded_width": export.padded_width,
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
