"""retrieval.json with plausible numbers, for a run of conftest.write_run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matformer_dist.config_file import load_config
from matformer_dist.nesting import Submodel, mix_n_match

KS = (1, 5, 10)


def _measure(value: float | None, half: float = 0.012) -> dict[str, Any]:
    ends = [None, None] if value is None else [value - half, value + half]
    return {"value": value, "interval": ends}


def entry(
    name: str,
    accuracy: float,
    flops: int,
    *,
    kind: str = "uniform",
    encoder: str = "nested",
    gallery: str = "XL",
    best: float = 0.77,
    likeness: float = 0.97,
) -> dict[str, Any]:
    """One of an encoder whose distances correlate by `likeness` with the reference's."""
    recall = {k: 1 - (1 - accuracy) / k**0.5 for k in KS}
    found: dict[str, Any] = {
        "encoder": encoder,
        "submodel": name,
        "kind": kind,
        "gallery": gallery,
        "query_flops": flops,
        "parameters": flops // 400,
        "knn_accuracy": {str(k): _measure(accuracy + k / 1000 - 0.001) for k in KS},
        "accuracy_lost": {str(k): _measure(best - accuracy, 0.004) for k in KS},
        "recall": {str(k): _measure(recall[k]) for k in KS},
        "neighbour_agreement": {str(k): _measure(0.8 * likeness) for k in KS},
        "pearson": _measure(likeness, 0.001),
        "spearman": _measure(likeness - 0.01, 0.001),
    }
    if gallery != "own":
        found["own_image_similarity"] = _measure(0.9 * likeness)
        found["own_image_found"] = _measure(max(0.0, likeness - 0.002))
    return found


def accuracy_of(submodel: Submodel) -> float:
    width = sum(submodel.widths) / len(submodel) / submodel.nesting.d_ff
    return 0.78 - 0.01 * width**-0.8


def write_retrieval(run: Path, *, apart: bool = True, step: int = 300) -> dict[str, Any]:
    config = load_config(run / "config.yaml")
    nesting, layers = config.granularities, config.model.n_layers
    largest = nesting.names[-1]
    entries = []
    for one in mix_n_match(nesting, layers):
        flops = 2_000_000_000 + 3_000_000 * sum(one.widths)
        kind = "uniform" if one.is_uniform else "heuristic"
        accuracy = accuracy_of(one)
        entries.append(entry(str(one), accuracy, flops, kind=kind, gallery=largest))
        if one.is_uniform and str(one) != largest:
            entries.append(entry(str(one), accuracy - 0.002, flops, gallery="own"))
        if one.is_uniform and apart:
            alone: dict[str, Any] = {"encoder": f"vit-{one}"}
            entries.append(entry(largest, accuracy + 0.001, flops, gallery="own", **alone))
            alone |= {"gallery": largest, "likeness": 0.002}
            entries.append(entry(largest, 0.009, flops, **alone))
    if layers > 1 and len(nesting) > 1:
        mix = nesting.parse(f"{largest}:1,{nesting.names[0]}:{layers - 1}", layers)
        flops = 2_000_000_000 + 3_000_000 * sum(mix.widths)
        entries.append(entry(str(mix), accuracy_of(mix), flops, kind="mix", gallery=largest))
    written = {
        "format": 1,
        "step": step,
        "checkpoint_sha256": "0" * 64,
        "data": "10,000 test images",
        "largest": largest,
        "gallery": 50_000,
        "queries": 10_000,
        "leave_one_out": False,
        "ks": list(KS),
        "backend": "faiss",
        "pairs": 200_000,
        "chance": {
            "accuracy": 0.01,
            "majority": 0.012,
            "recall": {"1": 0.01, "5": 0.049, "10": 0.096},
            "neighbour_agreement": {str(k): k / 50_000 for k in KS},
            "own_image_found": 0.0001,
        },
        "notes": [],
        "entries": sorted(entries, key=lambda one: one["query_flops"]),
    }
    (run / "retrieval.json").write_text(json.dumps(written))
    return written
