from __future__ import annotations

import random
from pathlib import Path

import pytest

from matformer_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer

_WORDS = [
    "def",
    "return",
    "self",
    "value",
    "index",
    "for",
    "in",
    "range",
    "if",
    "else",
    "import",
    "text",
    "data",
    "none",
    "10",
    "42",
    "(x)",
    "ok",
]


def make_texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Lines of words, some of other scripts, indented as code is."""
    rng = random.Random(seed)
    odd = ["é", "中文", "😀", "naïve", "\t", "  ", "\n", "\n\n", "    "]
    return [
        " ".join(
            rng.choice(odd) if rng.random() < 0.2 else rng.choice(_WORDS) for _ in range(words)
        )
        + f" #{i}\n"
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def tokenizer() -> SentencePieceTokenizer:
    return train_tokenizer(make_texts(200), 400)


@pytest.fixture(scope="session")
def tokenizer_path(
    tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer.model)
    return path
