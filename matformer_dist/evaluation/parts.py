"""An evaluation that several processes share: each has every N-th submodel, the last joins them.

Parts lie in RUN/evaluation-parts/ until then, under the name of what they are parts of.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from matformer_dist.checkpoints.files import replace_file
from matformer_dist.errors import UserError
from matformer_dist.nesting import Submodel

FOLDER = "evaluation-parts"


class Part(NamedTuple):
    """One of `of` parts; `number` counts from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read I/N; UserError where that is no part."""
        number, _, of = text.partition("/")
        is_short = re.fullmatch(r"\d{1,9}/\d{1,9}", text, re.ASCII)
        if is_short and 1 <= int(number) <= int(of):
            return cls(int(number), int(of))
        raise UserError(f"--part {text!r} must be I/N, I of 1 to N, such as 1/4 for the first of 4")

    def take(self, chosen: Mapping[Submodel, str]) -> dict[Submodel, str]:
        """This part of the submodels; UserError where some part would be left with none."""
        if self.of > len(chosen):
            raise UserError(
                f"--part {self.number}/{self.of}: there are {len(chosen)} submodels to evaluate; "
                f"share them among {len(chosen)} parts at most, or choose more"
            )
        return dict(list(chosen.items())[self.number - 1 :: self.of])


def join(
    run: Path, part: Part, whole: Mapping[str, Any], results: list[dict[str, Any]]
) -> list[dict[str, Any]] | None:
    """Add the results of one part to those that are there: all of them where that was the last.

    whole: all that the parts must agree in. Processes that end together take turns.
    """
    name = hashlib.sha256(json.dumps([whole, part.of]).encode()).hexdigest()[:16]
    folder = run / FOLDER
    files = [folder / f"{name}-{number}-of-{part.of}.json" for number in range(1, part.of + 1)]
    with _turn(run):
        folder.mkdir(exist_ok=True)
        replace_file(files[part.number - 1], json.dumps(results).encode())
        if not all(file.exists() for file in files):
            return None
        joined = [entry for file in files for entry in _read(file)]
        for file in files:
            file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    return joined


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(file.read_bytes())
        return found
    except ValueError as error:
        raise UserError(
            f"{file} is damaged ({error}); delete it, and run the part that it is of again"
        ) from None


@contextmanager
def _turn(run: Path) -> Iterator[None]:
    with (run / ".evaluation.lock").open("ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
