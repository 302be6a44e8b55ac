"""A run directory's files, and its complete checkpoints. No torch here.

```
config.yaml       the resolved configuration        checkpoints/step-N/   one folder a checkpoint
metrics.jsonl     one line of measurements a time   evaluation.json       losses of submodels
tokenizer.model   a copy of data.tokenizer          submodels/NAME/       extracted models
tensorboard/      the metrics, for TensorBoard      samples.json          generated text
report.html       the report page
```
A checkpoint's manifest is written last: a folder without one, or with files that differ from it
in size, is not a checkpoint.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from matformer_dist.config import ModelConfig
from matformer_dist.errors import UserError
from matformer_dist.nesting import Nesting

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
TOKENIZER = "tokenizer.model"
_STEP = re.compile(r"step-(\d+)")


class Layout(BaseModel):
    """What the files of a checkpoint depend on: ranks by kind, and the ZeRO stage."""

    model_config = ConfigDict(frozen=True)

    tensor: int
    data: int
    zero_stage: int


class SavedFile(BaseModel):
    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint holds: manifest.json."""

    model_config = ConfigDict(frozen=True)

    format: int = MANIFEST_FORMAT
    step: int
    consumed_sequences: int
    tokens: int  # trained on
    layout: Layout
    model: ModelConfig
    nesting: Nesting
    vocab_size: int
    precision: str
    tokenizer_sha256: str
    config_sha256: str
    versions: dict[str, str]
    files: dict[str, SavedFile]


class UnknownFormatError(UserError):
    """A checkpoint of another version: not damaged, and not to be passed over."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step


class Checkpoints(NamedTuple):
    """What a run's checkpoint folders hold."""

    complete: list[Checkpoint]  # oldest first
    damaged: dict[int, str]  # step of each of the others, and what is wrong with it


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`; UserError where it is missing, incomplete or cut short."""
    try:
        raw = json.loads((path / MANIFEST).read_bytes())
        written = raw["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not a complete checkpoint: it has no readable {MANIFEST}"
        ) from None
    if written != MANIFEST_FORMAT:
        raise UnknownFormatError(
            f"the checkpoint {path} has format {written!r}, this version of matformer_dist reads "
            f"format {MANIFEST_FORMAT}; use the version that saved the checkpoint"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path} is not a complete checkpoint: in its {MANIFEST}, {key} is wrong "
            f"({first['msg']})"
        ) from None
    for name, entry in manifest.files.items():
        file = path / name
        size = file.stat().st_size if file.exists() else None
        if size != entry.bytes:
            raise UserError(
                f"the checkpoint {path} is damaged: {name} has {size} bytes, its manifest says "
                f"{entry.bytes}"
            )
    return Checkpoint(path, manifest)


def read_checkpoints(run_dir: Path) -> Checkpoints:
    """Every checkpoint of a run, whole or damaged; UserError for one of an unknown format."""
    found = Checkpoints([], {})
    for path in (run_dir / "checkpoints").glob("step-*"):
        if name := _STEP.fullmatch(path.name):
            try:
                found.complete.append(read_checkpoint(path))
            except UnknownFormatError:
                raise
            except UserError as error:
                found.damaged[int(name[1])] = str(error)
    found.complete.sort(key=lambda checkpoint: checkpoint.step)
    return found


def find_checkpoint(run: str | Path) -> Checkpoint:
    """Read RUN, RUN@STEP or a checkpoint's own path; the newest of a run where no step is named.

    A damaged newest checkpoint is an error, not a reason to take an older one unasked.
    """
    path = Path(run).absolute() if (Path(run) / MANIFEST).exists() else Path(run)
    if (path / MANIFEST).exists():
        return _read_chosen(path)
    name, at, step = str(run).rpartition("@")
    if at and not path.exists():
        if not step.isdigit():
            raise UserError(f"{run}: the step behind @ must be a number, as in {name}@1000")
        return _read_chosen(Path(name) / "checkpoints" / f"step-{step}")
    if not path.is_dir():
        raise UserError(f"there is no run directory {run}; give the run.dir of a training run")
    found = read_checkpoints(path)
    newest = max(
        [*found.damaged, *(checkpoint.step for checkpoint in found.complete)], default=None
    )
    if newest is None:
        raise UserError(f"the run {run} has no complete checkpoint yet")
    if newest in found.damaged:
        others = ", ".join(f"{run}@{checkpoint.step}" for checkpoint in found.complete)
        raise UserError(f"{found.damaged[newest]}; complete are: {others or 'none'}")
    return found.complete[-1]


def _read_chosen(path: Path) -> Checkpoint:
    try:
        return read_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}; choose another") from None
