"""What a run directory holds for the report, read and checked.

Only config.yaml and metrics.jsonl must be there; all else is None or empty until its command has
run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from matformer_dist.config import Config
from matformer_dist.config_file import load_config
from matformer_dist.config_vision import VisionConfig
from matformer_dist.errors import UserError
from matformer_dist.nesting import Nesting
from matformer_dist.report.shapes import (
    Downstream,
    Evaluation,
    Extracted,
    MetricsLine,
    Sample,
    Speculative,
)
from matformer_dist.run_directory import CLASSES_FILE
from matformer_dist.submodels.retrieval_results import RetrievalResult, read_retrieval
from matformer_dist.submodels.slices import Slices, read_slices
from matformer_dist.units import one_of


@dataclass(frozen=True)
class Run:
    """Everything the page shows of one run."""

    directory: Path
    config: Config
    outputs: int | None  # tokens or classes, where files say how many
    metrics: list[MetricsLine]  # steps strictly increasing, at least one
    evaluation: Evaluation | None
    slices: Slices | None
    retrieval: RetrievalResult | None
    speculative: Speculative | None
    downstream: Downstream | None
    extracted: list[tuple[Path, Extracted]]  # with their directories
    samples: list[Sample]

    @cached_property
    def nesting(self) -> Nesting:
        return self.config.granularities

    @property
    def is_vision(self) -> bool:
        """Else it is a language model's."""
        return isinstance(self.config, VisionConfig)

    @property
    def units(self) -> str:
        """tokens or images"""
        return self.config.unit

    @property
    def unit(self) -> str:
        return self.units.removesuffix("s")

    @property
    def one_unit(self) -> str:
        """ "a token" or "an image" """
        return one_of(self.units)

    @property
    def last(self) -> MetricsLine:
        return self.metrics[-1]

    @cached_property
    def last_validated(self) -> MetricsLine | None:
        return next((line for line in reversed(self.metrics) if line.val_loss), None)


def read_run(directory: Path) -> Run:
    """Read a run directory; UserError where a file is missing, broken or of another shape."""
    if not directory.is_dir():
        raise UserError(
            f"there is no run directory {directory}; give the run.dir of a training run"
        )
    config = load_config(directory / "config.yaml")
    return Run(
        directory=directory,
        config=config,
        outputs=_outputs(config, directory / CLASSES_FILE),
        metrics=read_metrics(directory / "metrics.jsonl"),
        evaluation=_read_json_if_there(directory / "evaluation.json", Evaluation),
        slices=read_slices(directory),
        retrieval=read_retrieval(directory),
        speculative=_read_json_if_there(directory / "speculative.json", Speculative),
        downstream=_read_json_if_there(directory / "downstream.json", Downstream),
        extracted=[
            (path.parent, _read_json(path, Extracted))
            for path in sorted(directory.glob("submodels/*/submodel.json"))
        ],
        samples=_read_json_if_there(directory / "samples.json", list[Sample]) or [],
    )


def _outputs(config: Config, classes: Path) -> int | None:
    """Where the settings do not say it, only a vision encoder's run holds it as plain text."""
    known = config.model.known_outputs
    is_told = known is None and isinstance(config, VisionConfig) and classes.exists()
    return _count_names(classes) if is_told else known


def _count_names(path: Path) -> int:
    try:
        return len(TypeAdapter(list[str]).validate_python(json.loads(_read_bytes(path))))
    except (ValueError, RecursionError):
        raise UserError(
            f"{path} does not hold class names, which are a JSON list of texts; copy it again from "
            "where the run was trained"
        ) from None


def read_metrics(path: Path) -> list[MetricsLine]:
    """Lines of metrics.jsonl with strictly increasing steps.

    A step that comes again was trained again after a resume: it replaces the old line, and the
    lines behind it belong to the abandoned part of the run. A last line without its newline that
    does not parse is still being written, and is left out.
    """
    texts = _read_bytes(path).split(b"\n")
    lines: list[MetricsLine] = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = MetricsLine.model_validate_json(text)
        except ValidationError as error:
            if number == len(texts) and error.errors()[0]["type"] == "json_invalid":
                break
            raise UserError(
                f"{path}:{number}: {_explain(error)}; mend or delete this line (each line must "
                "be one JSON object with step and tokens or images)"
            ) from None
        while lines and lines[-1].step >= line.step:
            lines.pop()
        lines.append(line)
    if not lines:
        raise UserError(
            f"{path} holds no complete line yet; the first one comes after logging.every steps "
            "of training"
        )
    return lines


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; a run directory gets this file from training"
        ) from None


def _read_json_if_there(path: Path, shape: Any) -> Any:
    return _read_json(path, shape) if path.exists() else None


def _read_json(path: Path, shape: Any) -> Any:
    try:
        return TypeAdapter(shape).validate_python(json.loads(_read_bytes(path)))
    except (ValueError, RecursionError) as error:  # of pydantic, of JSON, of UTF-8; too deep
        raise UserError(
            f"{path}: {_explain(error)}; write it again with the command that made it, or delete it"
        ) from None


def _explain(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
