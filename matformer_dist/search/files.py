"""slices.json and slices.csv of a run, each written whole or not at all."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from matformer_dist.checkpoints.files import replace_file
from matformer_dist.submodels.slices import SLICES, Slices

_COLUMNS = (
    "name", "submodel", "kind", "budget", "parameters", "non_embedding_parameters",
    "flops", "memory_bytes", "latency_ms", "loss", "loss_low", "loss_high", "accuracy",
    "accuracy_low", "accuracy_high", "agreement", "kl", "found_by", "heuristic", "gain", "gain_low",
    "gain_high",
)  # fmt: skip
_WITH_INTERVALS = ("loss", "accuracy", "gain")


def write_slices(run_dir: Path, slices: Slices) -> None:
    """The slices, and in the JSON file all else that was measured."""
    content = slices.model_dump_json(indent=1, exclude_none=True) + "\n"
    replace_file(run_dir / SLICES, content.encode())
    replace_file((run_dir / SLICES).with_suffix(".csv"), _csv(slices).encode())


def _csv(slices: Slices) -> str:
    """A line a slice; the widths of its layers come last."""
    text = io.StringIO()
    layers = range(len(slices.slices[0].widths))
    writer = csv.DictWriter(text, [*_COLUMNS, *(f"width_{i}" for i in layers)], lineterminator="\n")
    writer.writeheader()
    for one in slices.slices:
        row = one.model_dump(exclude={"widths", *(f"{name}_interval" for name in _WITH_INTERVALS)})
        for name in _WITH_INTERVALS:
            row[f"{name}_low"], row[f"{name}_high"] = getattr(one, f"{name}_interval")
        writer.writerow(row | {f"width_{i}": one.widths[i] for i in layers})
    return text.getvalue()
