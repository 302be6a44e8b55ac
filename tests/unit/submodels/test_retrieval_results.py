"""retrieval.json: what is written is what is read, and broken files are named."""

from __future__ import annotations

import json
from math import isnan, nan
from pathlib import Path
from typing import Any

import pytest

from matformer_dist.checkpoints.files import json_text, replace_json
from matformer_dist.errors import UserError
from matformer_dist.submodels.retrieval_results import (
    RETRIEVAL,
    RetrievalMeasures,
    RetrievalResult,
    read_retrieval,
)

WHERE: dict[str, Any] = {"step": 7, "checkpoint_sha256": "0" * 64, "data": "images"}


def by_k(value: float) -> dict[str, Any]:
    return {k: {"value": value, "interval": [value - 0.1, None]} for k in ("1", "10")}


def content() -> dict[str, Any]:
    entry = {
        "encoder": "nested",
        "submodel": "XL",
        "kind": "uniform",
        "gallery": "XL",
        "query_flops": 10,
        "parameters": 5,
        "knn_accuracy": by_k(0.8),
        "accuracy_lost": by_k(0.0),
        "recall": by_k(0.9),
        "neighbour_agreement": by_k(1.0),
        "pearson": {"value": None, "interval": [None, None]},
        "spearman": {"value": 1.0, "interval": [1.0, 1.0]},
    }
    return {
        "format": 1,
        **WHERE,
        "largest": "XL",
        "gallery": 50,
        "queries": 20,
        "leave_one_out": False,
        "ks": [1, 10],
        "backend": "faiss",
        "pairs": 1000,
        "chance": {
            "accuracy": 0.1,
            "majority": 0.2,
            "recall": {"1": 0.1, "10": 0.6},
            "neighbour_agreement": {"1": 0.02, "10": 0.2},
            "own_image_found": 0.05,
        },
        "notes": [],
        "entries": [entry, {**entry, "submodel": "S"}],
    }


def write(run: Path, found: Any) -> Path:
    path = run / RETRIEVAL
    path.write_text(json.dumps(found))
    return path


def test_a_written_result_is_read_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, content())
    found = read_retrieval(tmp_path)
    assert found is not None and isnan(found.entries[0].pearson.value)
    assert found.entries[0].knn_accuracy[10].value == 0.8
    low, high = found.entries[0].recall[1].interval
    assert low == pytest.approx(0.8) and isnan(high)
    assert found.reference == found.entries[0]
    replace_json(tmp_path / RETRIEVAL, found.model_dump())
    assert "NaN" not in (tmp_path / RETRIEVAL).read_text()
    again = read_retrieval(tmp_path)
    assert again is not None and json_text(again.model_dump()) == json_text(found.model_dump())


def test_a_result_is_what_was_measured_and_where() -> None:
    whole = RetrievalResult.model_validate(content())
    rest = {key: value for key, value in content().items() if key not in ("format", *WHERE)}
    measured = RetrievalMeasures.model_validate(rest)
    assert repr(RetrievalResult.of(measured, **WHERE)) == repr(whole)


def test_a_run_without_a_result_has_none(tmp_path: Path) -> None:
    assert read_retrieval(tmp_path) is read_retrieval(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format: Input should be 1"),
        ({"entries": [{"submodel": "S"}]}, "entries.0.encoder: Field required"),
        ({"entries": []}, "entries: List should have at least 1 item"),
        ({"extra": 1}, "extra: Extra inputs"),
        ({"ks": [10]}, "must hold 1"),
        ({"ks": [1, 5]}, "entries.0.knn_accuracy must have the keys of ks"),
        ({"step": nan}, "step: "),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = write(tmp_path, content() | change)
    with pytest.raises(UserError) as caught:
        read_retrieval(tmp_path)
    assert str(caught.value).startswith(f"cannot read {path} (") and said in str(caught.value)
    assert str(caught.value).endswith("); delete it and run `matformer retrieve` again")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_what_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / RETRIEVAL).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*retrieval\.json"):
        read_retrieval(tmp_path)


def test_chances_lack_no_k(tmp_path: Path) -> None:
    found = content()
    del found["chance"]["recall"]["10"]
    write(tmp_path, found)
    with pytest.raises(UserError, match=r"chance\.recall must have the keys of ks"):
        read_retrieval(tmp_path)
