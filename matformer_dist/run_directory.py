"""A run directory's files, and its complete checkpoints. No torch here.

```
config.yaml       the resolved configuration        checkpoints/step-N/   one folder a checkpoint
metrics.jsonl     one line of measurements a time   evaluation.json       losses of submodels
tokenizer.*       a copy of data.tokenizer          submodels/NAME/       extracted models
classes.json      names of classes, of images       retrieval.json        neighbours of encoders
tensorboard/      the metrics, for TensorBoard      samples.json          generated text
report.html       the report page                   .lock                 held while a run writes
speculative.json  speeds of drafts
evaluation-parts/ of `evaluate --part`              .evaluation.lock      held while they are joined
```
A checkpoint's manifest is written last, and holds the SHA-256 of every file and of itself: a
folder without one, or with files that differ from it in size, is not a checkpoint. What differs in
content only is found by reading all of it (checkpoints/verify.py).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from matformer_dist.config_file import AnyModelConfig
from matformer_dist.errors import UserError
from matformer_dist.nesting import Nesting

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 2
TOKENIZER_FILES = (  # those that data.tokenizer has
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
CLASSES_FILE = "classes.json"
LABEL_FILES = (*TOKENIZER_FILES, CLASSES_FILE)  # what a model's outputs mean
ENTRY = "submodel.json"  # of an extracted model
_STEP = re.compile(r"step-(\d+)")
_SHOWN_FAULTS = 3  # of one checkpoint, in a message about something else
_UNSEALED = "0" * 64
_SEAL = re.compile(rb'("manifest_sha256": ")([0-9a-f]{64})(")')


class Layout(BaseModel):
    """What the files of a checkpoint depend on: ranks by kind, ZeRO's stage and its options.

    `universal` files, which hold every weight whole, depend on neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: int
    data: int
    zero_stage: int
    zero_options: dict[str, Any] = {}
    files: Literal["ranks", "universal"] = "ranks"

    def __str__(self) -> str:
        if self.files == "universal":
            return "whole weights"
        return f"TP {self.tensor} x DP {self.data}, ZeRO {self.zero_stage}"


UNIVERSAL = Layout(tensor=1, data=1, zero_stage=0, files="universal")


class SavedFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint holds: manifest.json.

    `outputs`: rows of the head, and `labels_sha256` what they mean: tokens of a tokenizer, or named
    classes. `random_states` are those of the generators of each rank, by kind, in base64.
    `skipped_steps` are those that changed nothing, because a loss or gradient was not finite.
    `metrics_line` is what was measured up to this step where a line of metrics is due: it is
    written behind the checkpoint, by the run that goes on if it must be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = MANIFEST_FORMAT
    step: int
    samples: int  # trained on: sequences, or images
    units: int  # the same in tokens, or images
    layout: Layout
    model: AnyModelConfig
    nesting: Nesting
    outputs: int = Field(gt=0)
    precision: str
    labels_sha256: str
    data_sha256: str | None = None  # see training/task.py; None: it is not known
    config_sha256: str
    versions: dict[str, str]
    skipped_steps: int = 0
    skips_in_a_row: int = 0  # the last of them
    began_from: str | None = None  # the checkpoint of another run that this one began from
    has_optimizer: bool = True  # else weights only: training begins with fresh moments
    random_states: list[dict[str, str]] = []
    loss_sums: list[list[float]] = []  # of each granularity since the last line of metrics
    metrics_line: dict[str, Any] | None = None
    probe_loss: float | None = None  # see training/continuity.py; null if not finite
    files: dict[str, SavedFile]
    manifest_sha256: str = _UNSEALED  # of this file, with zeros in its place

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        if self.nesting.d_ff != self.model.d_ff:
            raise ValueError(
                f"nesting ends at {self.nesting.d_ff}, model.d_ff is {self.model.d_ff}"
            )
        return self

    def sealed(self) -> str:
        """The text of manifest.json, with its own SHA-256."""
        return seal(self.model_dump_json(indent=1).encode()).decode()


def seal(text: bytes) -> bytes:
    """A manifest's text with the SHA-256 of itself, in which zeros stand in its place."""
    unsealed = _SEAL.sub(rb"\g<1>" + _UNSEALED.encode() + rb"\g<3>", text)
    digest = hashlib.sha256(unsealed).hexdigest()
    return _SEAL.sub(rb"\g<1>" + digest.encode() + rb"\g<3>", unsealed)


def lock(run_dir: Path) -> IO[bytes]:
    """Hold the run directory until this process ends, or the file that is returned is closed.

    UserError where another process holds it.
    """
    file = (run_dir / ".lock").open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise UserError(
            f"another job is writing to {run_dir}; wait for its end, or choose another run.dir"
        ) from None
    return file


class UnknownStateError(UserError):
    """A checkpoint of another version, or out of reach: not damaged, and not to be passed over."""


class DamagedError(UserError):
    """A folder that is no whole checkpoint: `faults` is everything that is wrong with it."""

    def __init__(self, path: Path, *faults: str) -> None:
        shown = "; ".join(faults[:_SHOWN_FAULTS])
        more = f"; and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
        super().__init__(f"{path} is not a whole checkpoint: {shown}{more}")
        self.path, self.faults = path, list(faults)

    def __reduce__(self) -> tuple[Any, ...]:  # it is sent between ranks
        return type(self), (self.path, *self.faults)


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
    """The checkpoint at `path`; DamagedError where it is missing, incomplete or cut short."""
    try:
        text = (path / MANIFEST).read_bytes()
        raw = json.loads(text)
        written = raw["format"]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamagedError(path, f"it has no {MANIFEST}") from None
    except OSError as error:
        raise _out_of_reach(path, error) from None
    except (ValueError, KeyError, TypeError):
        raise DamagedError(path, f"its {MANIFEST} is not one") from None
    if not _SEAL.search(text) or seal(text) != text:
        raise DamagedError(path, f"its {MANIFEST} is not as it was written (its SHA-256 differs)")
    raw = _of_today(raw)
    if raw["format"] != MANIFEST_FORMAT:
        raise UnknownStateError(
            f"the checkpoint {path} has format {written!r}, this version of matformer_dist reads "
            f"format {MANIFEST_FORMAT}; use the version that saved the checkpoint"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DamagedError(path, f"in its {MANIFEST}, {key} is wrong ({first['msg']})") from None
    faults = []
    if (folder := _STEP.fullmatch(path.name)) and int(folder[1]) != manifest.step:
        faults.append(f"its {MANIFEST} is that of step {manifest.step}")
    for name, entry in manifest.files.items():
        size = _size(path, name)
        if size is None:
            faults.append(f"{name} is missing")
        elif size != entry.bytes:
            faults.append(f"{name} has {size} bytes, {MANIFEST} says {entry.bytes}")
    if faults:
        raise DamagedError(path, *faults)
    return Checkpoint(path, manifest)


def _of_today(raw: dict[str, Any]) -> dict[str, Any]:
    """A manifest of format 1, which knew language models alone, under the names of today."""
    if raw["format"] != 1:
        return raw
    names = {"consumed_sequences": "samples", "tokens": "units", "vocab_size": "outputs",
             "tokenizer_sha256": "labels_sha256"}  # fmt: skip
    return {**{names.get(key, key): value for key, value in raw.items()}, "format": 2}


def _size(path: Path, name: str) -> int | None:
    try:
        return (path / name).stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _out_of_reach(path, error) from None


def _out_of_reach(path: Path, error: OSError) -> UnknownStateError:
    return UnknownStateError(
        f"the checkpoint {path} cannot be read ({error.filename}: {error.strerror}); make it "
        "readable, or move it away"
    )


def read_checkpoints(run_dir: Path) -> Checkpoints:
    """Every checkpoint of a run, whole or damaged; UnknownStateError for one that may be either."""
    found = Checkpoints([], {})
    for step, path in _step_folders(run_dir).items():
        try:
            found.complete.append(read_checkpoint(path))
        except DamagedError as error:
            found.damaged[step] = str(error)
    found.complete.sort(key=lambda checkpoint: checkpoint.step)
    return found


def _step_folders(run_dir: Path) -> dict[int, Path]:
    """Whole or not, by step, the oldest first; OSError where the folder of all cannot be read."""
    folder = run_dir / "checkpoints"
    try:
        names = os.listdir(folder)  # glob would take what it may not read for nothing
    except FileNotFoundError:
        return {}
    found = {int(m[1]): folder / name for name in names if (m := _STEP.fullmatch(name))}
    return dict(sorted(found.items()))


def find_checkpoint(run: str | Path) -> Checkpoint:
    """Read RUN, RUN@STEP or a checkpoint's own path; the newest of a run where no step is named.

    A damaged newest checkpoint is an error, not a reason to take an older one unasked.
    """
    path = Path(run)
    if (path / MANIFEST).exists():
        return _read_chosen(path.resolve())  # a link to it is in no run directory
    name, at, step = str(run).rpartition("@")
    if at and not path.exists():
        if not step.isdigit():
            raise UserError(f"{run}: the step behind @ must be a number, as in {name}@1000")
        chosen = Path(name) / "checkpoints" / f"step-{step}"
        if not chosen.exists() and Path(name).is_dir():
            there = ", ".join(f"{name}@{number}" for number in _step_folders(Path(name)))
            raise UserError(f"{run} is not there; checkpoints are: {there or 'none yet'}")
        return _read_chosen(chosen)
    if not path.is_dir():
        raise UserError(f"there is no run directory {run}; give the run.dir of a training run")
    if (path / ENTRY).exists():
        raise UserError(
            f"{run} is an extracted model, which has no checkpoint; give the run.dir of a training "
            "run"
        )
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


def checkpoint_paths(run: str) -> list[Path]:
    """Folders of all checkpoints of RUN, oldest first, or of the one that is named.

    Whole or not; UserError where there is none.
    """
    name, at, step = run.rpartition("@")
    path = Path(run).absolute()
    if at and step.isdigit() and not path.exists():
        path = Path(name) / "checkpoints" / f"step-{step}"
    if path.is_dir() and _STEP.fullmatch(path.name):
        return [path]
    found = _step_folders(path)
    if not found:
        raise UserError(
            f"{run} holds no checkpoint; give a run directory, RUN@STEP or a checkpoint's folder"
        )
    return list(found.values())


def _read_chosen(path: Path) -> Checkpoint:
    try:
        return read_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}; choose another") from None
