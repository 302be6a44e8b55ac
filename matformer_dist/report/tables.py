"""The tables of submodels: evaluated, named by a search, as drafts, on downstream tasks."""

from __future__ import annotations

from math import isfinite, nan
from typing import Any

from matformer_dist.report import curves, series, text
from matformer_dist.report.commands import extract_command
from matformer_dist.report.inputs import Run
from matformer_dist.report.points import cost_kinds
from matformer_dist.report.shapes import Evaluated, Score

TABLED_MIXES = 400  # rows that are no granularity; the rest stays in evaluation.json


def submodel_table(run: Run) -> dict[str, Any]:
    """Evaluated submodels by size, with their loss above XL's and the command that takes them."""
    if run.evaluation is None:
        return {"rows": [], "of": 0, "has": {}}
    found = sorted(run.evaluation.submodels, key=lambda item: item.parameters)
    widest = run.evaluation.uniform(run.nesting.names[-1])
    reference = widest.loss if widest else nan
    rows = [
        {
            "item": item,
            "difference": nan if item is widest else item.loss - reference,
            "color": {
                "uniform": curves.color(run, item.submodel),
                "heuristic": "var(--heuristic)",
                "mix": "var(--mix)",
            }[item.kind],
            "command": extract_command(run, item.submodel),
        }
        for item in _some(found)
    ]
    has = {
        "interval": any(isfinite(item.loss_interval[0]) for item in found),
        "kl": any(isfinite(item.kl) for item in found),
        "bits": any(isfinite(item.bits_per_byte) for item in found),
    }
    return {"rows": rows, "of": len(found), "has": has}


def _some(found: list[Evaluated]) -> list[Evaluated]:
    """All granularities, and at most TABLED_MIXES evenly chosen others."""
    mixes = [(i, 0.0) for i, item in enumerate(found) if item.kind != "uniform"]
    kept = {i for i, _ in series.thin(mixes, TABLED_MIXES)}
    return [item for i, item in enumerate(found) if item.kind == "uniform" or i in kept]


def slice_rows(run: Run) -> list[dict[str, Any]]:
    """The named slices of a search, by kind of cost and budget."""
    names = {kind: title for kind, title, _ in cost_kinds(run)}
    return [
        {
            "slice": one,
            "kind": names[one.kind],
            "cost": {
                "params": text.compact(one.parameters),
                "flops": text.compact(one.flops, billion="G"),
                "memory": text.file_size(one.memory_bytes),
                "latency": text.milliseconds(nan if one.latency_ms is None else one.latency_ms),
            }[one.kind],
        }
        for one in (run.slices.slices if run.slices else [])
    ]


def speculative_rows(run: Run) -> list[dict[str, Any]]:
    """Every draft, and how its speed compares with plain decoding, in words that cannot mislead."""
    rows = []
    for draft in run.speculative.drafts if run.speculative else []:
        said = text.fixed(draft.speedup, 2)
        if isfinite(draft.speedup):
            said += " ×" + (", slower" if draft.speedup < 1 else "")
        rows.append({"draft": draft, "color": curves.color(run, draft.draft), "speedup": said})
    return rows


def downstream_table(run: Run) -> dict[str, Any]:
    """One row for each task and metric, one column for each submodel, the smallest first."""
    if run.downstream is None:
        return {"submodels": [], "rows": []}
    found = run.downstream
    sizes: dict[str, int] = {}
    if run.slices:
        sizes |= {one.submodel: one.parameters for one in run.slices.measured}
    if run.evaluation:
        sizes |= {one.submodel: one.parameters for one in run.evaluation.submodels}
    submodels = sorted(found.submodels, key=lambda name: sizes.get(name, 0))
    rows = []
    for name, task in [*found.tasks.items(), *found.groups.items()]:
        metrics = dict.fromkeys(metric for scores in task.results.values() for metric in scores)
        shots = f", {task.num_fewshot}-shot" if task.num_fewshot else ""
        for metric in metrics:
            scores = [task.results.get(submodel, {}).get(metric) for submodel in submodels]
            rows.append((f"{name}{shots}", metric, [_shown(score) for score in scores]))
    return {"submodels": submodels, "rows": rows}


def _shown(score: Score | None) -> str:
    """ "0.512 ± 0.014"; without the error where there is none."""
    if score is None:
        return text.fixed(nan)
    said = text.fixed(score.value, 3)
    return f"{said} ± {text.fixed(score.stderr, 3)}" if isfinite(score.stderr) else said
