"""What a run directory holds for the report, read and checked.

Only config.yaml and metrics.jsonl must be there; evaluation.json, submodels/*/submodel.json and
samples.json are None or empty until their commands have run. Losses are nats per token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from math import nan
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from matformer_dist.config import Config
from matformer_dist.config_file import load_config
from matformer_dist.errors import UserError
from matformer_dist.nesting import Nesting


def _finite_or_nan(value: Any) -> Any:
    return nan if value is None else value


def _whole_characters(value: Any) -> Any:
    return re.sub("[\ud800-\udfff]", "\ufffd", value) if isinstance(value, str) else value


# JSON has no NaN: a writer may leave the bare word or null where a number was not finite.
Number = Annotated[float, BeforeValidator(_finite_or_nan)]
# JSON can spell half a surrogate pair (a prompt of undecodable bytes), which no file can hold.
Text = Annotated[str, BeforeValidator(_whole_characters)]
PerName = Annotated[dict[str, Number], Field(default_factory=dict)]  # key: submodel


class Entry(BaseModel):
    # pydantic reserves model_*, which is how a metric of ours begins
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class MetricsLine(Entry):
    step: int
    tokens: int
    train_loss: PerName  # objective sampled: only what ran in this step
    val_loss: PerName
    val_agreement: PerName
    grad_norm: Number = nan
    learning_rate: Number = nan
    tokens_per_second: Number = nan
    model_tflops_per_second: Number = nan
    mfu: Number = nan
    step_ms: Number = nan
    peak_memory_bytes: Number = nan


class Evaluated(Entry):
    submodel: str
    kind: Literal["uniform", "heuristic", "mix"]
    parameters: int
    non_embedding_parameters: int
    flops_per_token: int  # forward
    loss: Number
    agreement: Number  # share of tokens where its first choice is XL's, given the same prefix


class Evaluation(Entry):
    step: int
    tokens: int
    submodels: list[Evaluated]

    def uniform(self, name: str) -> Evaluated | None:
        return next((item for item in self.submodels if item.submodel == name), None)


class Extracted(Entry):
    submodel: str
    widths: list[int]
    parameters: int
    non_embedding_parameters: int
    format: str
    step: int
    run: str
    bytes: int  # of the weight files
    loss: Number = nan


class Sample(Entry):
    submodel: Text
    prompt: Text
    text: Text
    seconds: Number = nan
    tokens_per_second: Number = nan


@dataclass(frozen=True)
class Run:
    """Everything the page shows of one run."""

    directory: Path
    config: Config
    metrics: list[MetricsLine]  # steps strictly increasing, at least one
    evaluation: Evaluation | None
    extracted: list[tuple[Path, Extracted]]  # with their directories
    samples: list[Sample]

    @cached_property
    def nesting(self) -> Nesting:
        return self.config.granularities

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
    evaluation = directory / "evaluation.json"
    samples = directory / "samples.json"
    return Run(
        directory=directory,
        config=load_config(directory / "config.yaml"),
        metrics=read_metrics(directory / "metrics.jsonl"),
        evaluation=_read_json(evaluation, Evaluation) if evaluation.exists() else None,
        extracted=[
            (path.parent, _read_json(path, Extracted))
            for path in sorted(directory.glob("submodels/*/submodel.json"))
        ],
        samples=_read_json(samples, list[Sample]) if samples.exists() else [],
    )


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
                "be one JSON object with step and tokens)"
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


def _read_json(path: Path, shape: Any) -> Any:
    try:
        return TypeAdapter(shape).validate_python(json.loads(_read_bytes(path)))
    except ValueError as error:  # ValidationError, JSONDecodeError, UnicodeDecodeError
        raise UserError(
            f"{path}: {_explain(error)}; write it again with the command that made it, or delete it"
        ) from None


def _explain(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
