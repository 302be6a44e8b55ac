"""Data of the tasks `stdlib`: what this Python's own library holds under HELD_OUT.

Nothing is shipped or downloaded, so another version of Python gives other texts: results carry the
version, and a SHA-256 of what was asked. The same library always gives the same items.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from matformer_dist.errors import UserError
from matformer_dist.evaluation.downstream.held_out import HELD_OUT

SPLIT = "test"
_CLOZES = {"source": 200, "reference": 100}
_CHOICES = 200
_CONTEXT_CHARS = 360  # about 150 tokens of a small vocabulary
_LEAST_CONTEXT_CHARS = 200
_LEAST_SEEN = 3  # times that a passage holds the word
_MOST_ASKED = 25  # items of one word
_WORD = re.compile(r"([ (])([A-Za-z_]\w+)(?=\W)")
_HEADER_CHARS = (20, 400)
_BODY_CHARS = (60, 240)
_BODY_LINES = (3, 8)
_TRIES = 100


def cloze(**_: Any) -> dict[str, Dataset]:
    """Passages, and the word that comes next, which they hold some times already."""
    source = [*_clozes(_sources())]
    reference = [*_clozes(sorted(_reference().items()))]
    items = _spread(source, _CLOZES["source"]) + _spread(reference, _CLOZES["reference"])
    return {SPLIT: Dataset.from_list(items)}


def choice(**_: Any) -> dict[str, Dataset]:
    """Heads of functions, and the lines of their bodies in four orders, one of them right.

    All four have the same lines, so neither their length nor how rare their words are tells.
    """
    rng = random.Random(0)
    items = []
    for function in (one for name, text in _sources() for one in _functions(name, text)):
        orders = _orders(function.lines, rng)
        if not orders:
            continue
        label = rng.randrange(4)
        orders.insert(label, function.lines)
        items.append(
            {
                "source": function.source,
                "text": function.header,
                "choices": ["".join(f"\n{line}" for line in lines) for lines in orders],
                "label": label,
            }
        )
    return {SPLIT: Dataset.from_list(_spread(items, _CHOICES))}


def _orders(lines: Sequence[str], rng: random.Random) -> list[Sequence[str]]:
    """Three other orders of the lines; none where there are not as many."""
    found: dict[tuple[str, ...], None] = {}
    for _ in range(_TRIES):
        found[tuple(rng.sample(lines, len(lines)))] = None
        found.pop(tuple(lines), None)
        if len(found) == 3:
            return list(found)
    return []


@cache
def _sources() -> list[tuple[str, str]]:
    """Name and text of each held-out module."""
    library = Path(sysconfig.get_paths()["stdlib"])
    try:
        return [
            (name, (library / name).read_text(encoding="utf-8"))
            for name in HELD_OUT
            if name.endswith(".py")
        ]
    except OSError as error:
        raise _no_library(str(error.filename)) from None


@cache
def _reference() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise _no_library("pydoc_data") from None
    return dict(topics)


def _no_library(what: str) -> UserError:
    return UserError(
        f"the tasks stdlib need the source of Python's standard library, which lacks {what} here; "
        "use a Python that has it (Debian, Ubuntu: the package libpython3-stdlib)"
    )


def _spread(items: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` of them, evenly from the first to the last."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _clozes(texts: Iterable[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Passages begin with a line, and do not overlap."""
    asked: Counter[str] = Counter()
    seen = set()
    for name, text in texts:
        free = 0
        for found in _WORD.finditer(text):
            word, end = found[2], found.end(1)
            context = text[max(free, end - _CONTEXT_CHARS) : end].partition("\n")[2].lstrip("\n")
            is_fair = (
                len(context) >= _LEAST_CONTEXT_CHARS
                and len(re.findall(rf"\b{word}\b", context)) >= _LEAST_SEEN
                and asked[word] < _MOST_ASKED
                and context not in seen
            )
            if is_fair:
                # A space belongs to the word, as lm-eval has it.
                target, context = (f" {word}", context[:-1]) if found[1] == " " else (word, context)
                yield {"source": f"{name}:{found.start()}", "text": context, "target": target}
                asked[word] += 1
                seen.add(context)
                free = end


@dataclass(frozen=True)
class _Function:
    source: str
    header: str  # up to the first statement behind the docstring
    lines: list[str]  # the first of its body


def _functions(name: str, text: str) -> Iterator[_Function]:
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        statements = node.body[ast.get_docstring(node, clean=False) is not None :]
        if not statements or statements[0].lineno == node.lineno:
            continue
        first = statements[0].lineno - 1
        header = _dedented(lines[node.lineno - 1 : first], node.col_offset)
        body = _dedented(lines[first : node.end_lineno], node.col_offset).split("\n")
        body = body[: _BODY_LINES[1]]
        while len("\n".join(body)) > _BODY_CHARS[1]:
            body.pop()
        is_fair = _fits(len(header), _HEADER_CHARS) and _fits(len(body), _BODY_LINES)
        if is_fair and _fits(len("\n".join(body)), _BODY_CHARS):
            yield _Function(f"{name}:{node.lineno}", header, body)


def _dedented(lines: Sequence[str], columns: int) -> str:
    """Empty where a line begins further left."""
    if any(line[:columns].strip() for line in lines):
        return ""
    return "\n".join(line[columns:] for line in lines).rstrip()


def _fits(length: int, limits: tuple[int, int]) -> bool:
    return limits[0] <= length <= limits[1]
