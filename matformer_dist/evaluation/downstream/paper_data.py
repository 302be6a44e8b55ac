"""Data of the two of the paper's tasks that lm-eval has no definition for that runs."""

from __future__ import annotations

import csv
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
