"""What the doctor says of one thing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    what: str
    text: str
    problem: str = ""  # what is wrong with it and what to do; empty where nothing is
    fails: bool = False  # whether something will not work because of it


def note(what: str, text: str, problem: str) -> Finding:
    """A problem that may do no harm here."""
    return Finding(what, text, problem)


def failure(what: str, text: str, problem: str) -> Finding:
    """A problem because of which something will not work."""
    return Finding(what, text, problem, fails=True)
