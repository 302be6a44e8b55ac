"""A run directory's files, and its complete checkpoints. No torch here.

```
config.yaml       the resolved configuration        checkpoints/step-N/   one folder a checkpoint
metrics.jsonl     one line of measurements a time   evaluation.json       losses of submodels
tensorboard/      the same, for TensorBoard         submodels/NAME/       extracted models
report.html       the report page                   samples.json          generated text
```
A checkpoint's manifest is written last: a folder without one, or with files that differ from it
in size, is not a checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matformer_dist.errors import UserError

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`; UserError where it is missing, incomplete or cut short."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not a complete checkpoint: it has no readable {MANIFEST}; choose another"
        ) from None
    for name, entry in files.items():
        file = path / name
        size = file.stat().st_size if file.exists() else None
        if size != entry["bytes"]:
            raise UserError(
                f"the checkpoint {path} is damaged: {name} has {size} bytes, its manifest says "
                f"{entry['bytes']}; choose another"
            )
    return Checkpoint(path, manifest)


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Complete checkpoints of a run, oldest first."""
    found = []
    for path in (run_dir / "checkpoints").glob("step-*"):
        if _STEP.fullmatch(path.name):
            try:
                found.append(read_checkpoint(path))
            except UserError:
                continue
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_checkpoint(run: str | Path) -> Checkpoint:
    """Read RUN, RUN@STEP or a checkpoint's own path; the newest of a run where no step is named."""
    path = Path(run)
    if (path / MANIFEST).exists():
        return read_checkpoint(path)
    name, at, step = str(run).rpartition("@")
    if at and not path.exists():
        if not step.isdigit():
            raise UserError(f"{run}: the step behind @ must be a number, as in {name}@1000")
        return read_checkpoint(Path(name) / "checkpoints" / f"step-{step}")
    if not path.is_dir():
        raise UserError(f"there is no run directory {run}; give the run.dir of a training run")
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise UserError(f"the run {run} has no complete checkpoint yet")
    return checkpoints[-1]
