"""Directories that appear whole, under their name, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from matformer_dist.checkpoints.files import sync_directory
from matformer_dist.errors import UserError

_NAME_BYTES = 255  # of one name, on the file systems of today
_KEPT_CHARS = 40  # of the name, in the temporary one


def is_free(place: Path) -> bool:
    """Whether nothing is at `place`; an empty folder is nothing."""
    return not place.exists() or (place.is_dir() and not any(place.iterdir()))


def must_be_free(place: Path) -> None:
    """UserError where something is at `place`."""
    if not is_free(place):
        raise UserError(f"{place} exists and is not an empty folder; choose another output")


class NewDirectory:
    """`path`, beside `place`, is written to while the `with` block runs; `publish` renames it.

    What is not published when the block ends is deleted, with the parents made for it. A `place`
    that is a link stands for what it leads to. `check` raises a UserError where what is at `place`
    may not be replaced: it is asked at once, and again before that happens, since hours may lie
    between. OSError where the directory cannot be made.
    """

    def __init__(self, place: Path, check: Callable[[Path], None] = must_be_free) -> None:
        if not place.name or place.name == "..":
            raise UserError(
                f"the output {place} has no name of its own; give the name of a new folder, for "
                "example ./new"
            )
        if len(place.name.encode(errors="surrogateescape")) > _NAME_BYTES:
            raise UserError(
                f"the output's name {place.name[:40]}... is longer than {_NAME_BYTES} bytes; "
                "choose a shorter one"
            )
        try:
            self.place = place.resolve()
            check(self.place)
        except (OSError, RuntimeError) as error:  # a part of it is a file; a link to itself
            raise UserError(f"cannot write {place}: {error}; choose another output") from None
        if self.place.is_mount():
            raise UserError(
                f"the output {place} is a mount point, which nothing can be renamed to; give the "
                f"name of a new folder in it, for example {place / 'new'}"
            )
        there = _existing(self.place.parent)
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(
                f"cannot write {place}: {there} is no folder that can be written to; choose "
                "another output"
            )
        for parent in self.place.parents:
            if parent.name == "checkpoints" and (parent.parent / "config.yaml").exists():
                raise UserError(
                    f"the output {place} lies among the checkpoints of {parent.parent}, which are "
                    "deleted as newer ones come; choose another output"
                )
        self._check = check
        self._made: list[Path] = []  # parents, the innermost first
        token = secrets.token_hex(4)
        self.path = self.place.with_name(f"{self.place.name[:_KEPT_CHARS]}.{token}.incomplete")

    def __enter__(self) -> NewDirectory:
        parents = (self.place.parent, *self.place.parent.parents)
        self._made = [parent for parent in parents if not parent.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in self._made:
            with suppress(OSError):  # it holds what was published
                parent.rmdir()

    def publish(self) -> None:
        """Rename to `place`; what is replaced goes aside first, and away last."""
        self._check(self.place)
        aside = self.path.with_suffix(".replaced")
        if not is_free(self.place):
            self.place.rename(aside)
        try:
            self.path.rename(self.place)  # never onto what is there: a folder must be empty
        except OSError:
            if aside.exists():
                aside.rename(self.place)
            raise
        sync_directory(self.place.parent)
        shutil.rmtree(aside, ignore_errors=True)


def check_space(place: Path, needed_bytes: int) -> None:
    """UserError where the disk of `place` has no room for so much, beside what it may replace."""
    there = _existing(place.resolve())
    free = shutil.disk_usage(there).free
    if needed_bytes > free:
        raise UserError(
            f"{place} needs {needed_bytes / 1e9:,.2f} GB, the disk of {there} has "
            f"{free / 1e9:,.2f} GB free; choose another output, or make room"
        )


def _existing(place: Path) -> Path:
    """`place`, or the first of its parents that is there."""
    return next(path for path in (place, *place.parents) if path.exists())
