"""A row of each data set of the paper's tasks, in its columns, for tests without a network."""

from __future__ import annotations

from typing import Any

import datasets

_NLI = {"premise": "It rains.", "hypothesis": "It is wet", "label": 0}
_CHOICES = {"text": ["a cat", "two dogs", "a tree", "the sea"], "label": ["A", "B", "C", "D"]}
_SCIENCE = {"question": "What barks?", "question_stem": "What barks", "choices": _CHOICES,
            "answerKey": "B"}  # fmt: skip
_PROBLEM = {"question": "Who ran?", "answer": "C", "options": ["Al", "Bo", "Cy", "Di"]}
_SUPER_GLUE: dict[str, dict[str, Any]] = {
    "boolq": {"passage": "Cats sleep.", "question": "do cats sleep", "label": 1},
    "cb": _NLI,
    "copa": {"premise": "He fell.", "question": "cause", "choice1": "He slipped.",
             "choice2": "He sat.", "label": 0},
    "multirc": {"paragraph": "Al ran.", "question": "Who ran?", "answer": "Al", "label": 1},
    "record": {"passage": "Al met Bo.\n@highlight\nThey ran", "query": "@placeholder ran",
               "entities": ["Al", "Bo"], "answers": ["Al"]},
    "rte": _NLI,
    "wic": {"sentence1": "A bank.", "sentence2": "The bank.", "start1": 2, "end1": 6, "label": 0},
    "wsc.fixed": {"text": "Al met Bo and he ran.", "span1_text": "Al", "span2_text": "he",
                  "span1_index": 0, "span2_index": 4, "label": 1},
}  # fmt: skip
_ROWS: dict[str, dict[str, Any]] = {
    "mandarjoshi/trivia_qa": {"question": "Who", "answer": {"aliases": ["Al", "Alan"]}},
    "google-research-datasets/nq_open": {"question": "who ran", "answer": ["Al"]},
    "stanfordnlp/web_questions": {"question": "who ran?", "answers": ["Al", "Bo"]},
    "EleutherAI/lambada_openai": {"text": "Al saw Bo and Bo saw Al"},
    "Rowan/hellaswag": {"ctx_a": "He sits.", "ctx_b": "then he", "activity_label": "Sitting",
                        "endings": ["stands.", "sits.", "is.", "was."], "label": "0"},
    "allenai/winogrande": {"sentence": "Al met Bo and _ ran.", "option1": "Al", "option2": "Bo",
                           "answer": "1"},
    "lighteval/winograd_wsc": {"text": "Al met Bo. He ran.", "options": ["Al", "Bo"], "label": 0,
                               "pronoun": "He", "pronoun_loc": 11},
    "EleutherAI/race": {"article": "They ran.", "problems": repr([_PROBLEM])},
    "ehovy/race": {"article": "They ran.", **_PROBLEM},
    "baber/piqa": {"goal": "Sit", "sol1": "Use a chair.", "sol2": "Fly.", "label": 0},
    "allenai/ai2_arc": _SCIENCE,
    "allenai/openbookqa": _SCIENCE,
    "facebook/anli": _NLI,
}  # fmt: skip
_SPLITS = ("train", "validation", "test", *(f"{s}_r{r}" for s in ("train", "dev", "test")
           for r in (1, 2, 3)))  # fmt: skip


def load_dataset(path: str, name: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """In place of datasets.load_dataset: three rows in each split, told apart by `id`."""
    row = _SUPER_GLUE[str(name)] if path == "aps/super_glue" else _ROWS[path]
    return {
        split: datasets.Dataset.from_list([{**row, "id": i, **_another(row, i)} for i in range(3)])
        for split in _SPLITS
    }


def _another(row: dict[str, Any], number: int) -> dict[str, Any]:
    """RACE's rows of one article would become one."""
    return {"article": f"They ran {number}."} if "article" in row else {}
