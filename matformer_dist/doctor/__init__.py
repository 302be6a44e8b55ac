"""`matformer doctor`: what is installed and built, what this machine offers, and what will not do.

The first thing to paste into a bug report. Nothing here needs a GPU, a cluster or root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from matformer_dist.doctor.finding import Finding, failure, note


def examine(directory: Path) -> Iterator[Finding]:
    """All findings, one after another; `directory` is where a run is, or is to be, written."""
    yield from _looked_at("system", lambda: _part("machine").system())
    yield from _looked_at("packages", lambda: _part("packages").packages())
    yield from _looked_at("GPUs", lambda: _part("devices").accelerator())
    yield from _looked_at("operators", lambda: _part("devices").operators())
    yield from _looked_at("network", lambda: _part("network").network())
    yield from _looked_at("disk", lambda: _part("machine").disk(directory))
    yield from _looked_at("limits", lambda: _part("machine").limits())
    yield from _looked_at("2 ranks", lambda: _part("two_ranks").tests())


def _part(name: str) -> Any:
    """Imported where it is used: torch may be what is broken."""
    return import_module(f"{__name__}.{name}")


def _looked_at(what: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What `look` finds, up to where it fails; that is a finding too, and the others still come."""
    try:
        yield from look()
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        kind = failure if isinstance(error, ImportError) else note
        yield kind(what, f"could not be looked at: {said}", f"{what}: {said}")
