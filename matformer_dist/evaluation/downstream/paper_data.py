"""Data of those of the paper's tasks that lm-eval has no definition for that runs."""

from __future__ import annotations

import csv
import re
import string
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from datasets import Dataset

from matformer_dist.errors import UserError

_STORYCLOZE = {"validation": "cloze_test_val*.csv", "test": "cloze_test_test*.csv"}
_COLUMNS = (
    *(f"InputSentence{i}" for i in range(1, 5)),
    "RandomFifthSentenceQuiz1",
    "RandomFifthSentenceQuiz2",
    "AnswerRightEnding",
)


def group_by_article(questions: Dataset) -> Dataset:
    """RACE's questions as rows of `article` and `problems`, the text of a list, as lm-eval's
    functions for `race` read them.
    """
    rows = []
    for article, asked in groupby(questions, key=lambda row: row["article"]):
        problems = [{key: row[key] for key in ("question", "answer", "options")} for row in asked]
        rows.append({"article": article, "problems": repr(problems)})
    return Dataset.from_list(rows)


def storycloze(storycloze_dir: str = "", **_: Any) -> dict[str, Dataset]:
    """Story Cloze 2016 out of its two CSV files; UserError where they are not there."""
    found = {}
    for split, pattern in _STORYCLOZE.items():
        files = sorted(Path(storycloze_dir).glob(pattern)) if storycloze_dir else []
        if len(files) != 1:
            raise UserError(
                "StoryCloze's data come on request from cs.rochester.edu/nlp/rocstories; give the "
                f"folder with the files {' and '.join(_STORYCLOZE.values())} by --storycloze"
            )
        with files[0].open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or any(row.get(column) is None for row in rows for column in _COLUMNS):
            raise UserError(
                f"{files[0]} is no file of Story Cloze 2016: it must have the columns "
                f"{', '.join(_COLUMNS)}; give another folder by --storycloze"
            )
        found[split] = Dataset.from_list([{key: row[key] for key in _COLUMNS} for row in rows])
    return found


def first_answer(doc: Mapping[str, Any]) -> str:
    """Of WebQuestions, as an example shows it."""
    return str(sorted(doc["answers"])[0])


def distinct_entities(passages: Dataset) -> Dataset:
    """ReCoRD's entities and answers, each once."""
    return passages.map(
        lambda doc: {key: sorted({*doc[key]}) for key in ("entities", "answers")},
        load_from_cache_file=False,
    )


def record_text(doc: Mapping[str, Any]) -> str:
    passage, *highlights = doc["passage"].strip().split("\n@highlight\n")
    return passage + "\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def record_target(doc: Mapping[str, Any]) -> str:
    return _filled(doc, doc["answers"][0])


def record_choices(doc: Mapping[str, Any]) -> list[str]:
    return [_filled(doc, entity) for entity in doc["entities"]]


def record_match(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Whether the likeliest entity is an answer, by the words of both."""
    best = max(range(len(results)), key=lambda i: results[i][0])
    chosen = _words(doc["entities"][best])
    return {"em": float(chosen in map(_words, doc["answers"]))}


def _filled(doc: Mapping[str, Any], entity: str) -> str:
    return "  - " + doc["query"].replace("@placeholder", entity)


def _words(text: str) -> list[str]:
    """In lower case, without punctuation and articles, as SQuAD compares answers."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
