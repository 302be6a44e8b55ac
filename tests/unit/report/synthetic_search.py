"""slices.json and its like with plausible numbers, for a run of conftest.write_run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from matformer_dist.config import Config
from matformer_dist.config_file import load_config
from matformer_dist.counting import count_parameters, flops_per_unit
from matformer_dist.nesting import Submodel, mix_n_match
from tests.unit.report.conftest import OUTPUTS, accuracy_at, agreement_at, loss_at

COSTS = {
    "params": "parameters",
    "flops": "flops",
    "memory": "memory_bytes",
    "latency": "latency_ms",
}


def measured(config: Config, submodel: Submodel, tokens: int, latency: bool) -> dict[str, Any]:
    """Wide last layers help a little, and so does what nobody can foretell."""
    parameters = count_parameters(config.model, OUTPUTS[config.task], submodel)
    chance = random.Random(str(submodel))
    late = sum(i * width for i, width in enumerate(submodel.widths)) / len(submodel)
    late -= sum(submodel.widths) * (len(submodel) - 1) / 2 / len(submodel)
    bend = 0.0 if submodel.is_uniform else chance.uniform(-0.02, 0.03)
    loss = loss_at(submodel, tokens) + bend - 0.01 * late / submodel.nesting.d_ff
    # Memory and latency order submodels otherwise than parameters do, so that kinds differ.
    latency_ms = 0.2 + sum(0.01 * width**0.5 for width in submodel.widths)
    accuracy = accuracy_at(submodel, tokens) + chance.uniform(-0.01, 0.01)
    return {
        "submodel": str(submodel),
        "widths": list(submodel.widths),
        "parameters": parameters.total,
        "non_embedding_parameters": parameters.non_embedding,
        "flops": flops_per_unit(config.model, OUTPUTS[config.task], submodel, config.sample),
        "memory_bytes": 4 * parameters.total + 4096 * max(submodel.widths),
        "latency_ms": latency_ms if latency else None,
        "loss": loss,
        "loss_interval": [loss - 0.012, loss + 0.012],
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.02, accuracy + 0.02],
        "agreement": agreement_at(submodel, tokens),
        "kl": 2 * (1 - agreement_at(submodel, tokens)) ** 2,
    }


def best_within(found: list[dict[str, Any]], cost: str, budget: float) -> dict[str, Any]:
    """The lowest loss that the budget pays for; the cheapest of equals. Looks at everything."""
    affordable = [one for one in found if one[cost] is not None and one[cost] <= budget]
    affordable = [one for one in affordable if one["loss"] == one["loss"]]
    return min(affordable, key=lambda one: (one["loss"], one[cost]))


def write_search(
    run: Path, *, mixes: int = 60, latency: bool = True, step: int | None = None, units: int = 0
) -> dict[str, Any]:
    """slices.json of all heuristic submodels and as many random ones as are asked for."""
    config = load_config(run / "config.yaml")
    evaluation = json.loads((run / "evaluation.json").read_text())
    step = evaluation["step"] if step is None else step
    nesting, layers = config.granularities, config.model.n_layers
    chance = random.Random(11)
    chosen = dict.fromkeys(mix_n_match(nesting, layers))
    for _ in range(mixes):
        layers_of = tuple(chance.randrange(len(nesting)) for _ in range(layers))
        chosen[Submodel(nesting, layers_of)] = None
    heuristic = {str(submodel) for submodel in mix_n_match(nesting, layers)}
    found = [measured(config, submodel, evaluation[config.unit], latency) for submodel in chosen]
    found.sort(key=lambda one: one["parameters"])
    written = {
        "step": step,
        "checkpoint_sha256": "0" * 64,
        "seq_len": 256,
        "unit": config.unit,
        "units": units or evaluation[config.unit],
        "dtype": "fp32",
        "latency_on": "a machine of these tests, 2 threads" if latency else "",
        "slices": _slices(found, heuristic, latency),
        "measured": found,
    }
    (run / "slices.json").write_text(json.dumps(written))
    return written


def _slices(
    found: list[dict[str, Any]], heuristic: set[str], latency: bool
) -> list[dict[str, Any]]:
    slices = []
    for kind, cost in COSTS.items():
        if kind == "latency" and not latency:
            continue
        low, high = (end([one[cost] for one in found]) for end in (min, max))
        for share in (0.1, 0.25, 0.5, 0.75, 1.0):
            budget = low + share * (high - low)
            best = best_within(found, cost, budget)
            rivals = [one for one in found if one["submodel"] in heuristic]
            rival = best_within(rivals, cost, budget)
            gain = rival["loss"] - best["loss"]
            by = "search" if best["submodel"] not in heuristic else "heuristic"
            slices.append(
                best
                | {
                    "name": f"{budget:.3g}{kind}",
                    "kind": kind,
                    "budget": budget,
                    "found_by": by if ":" in best["submodel"] else "uniform",
                    "heuristic": rival["submodel"],
                    "gain": gain,
                    "gain_interval": [gain - 0.003, gain + 0.003],
                }
            )
    return slices


def write_speculative(run: Path) -> None:
    drafts = [
        {
            "draft": draft,
            "cache": cache,
            "draft_tokens": drafted,
            "acceptance": acceptance,
            "tokens_per_verify": 1 + 3 * acceptance,
            "tokens_per_second": 60 * speedup,
            "speedup": speedup,
        }
        for draft, cache, drafted, acceptance, speedup in (
            ("S", "own", 4, 0.81, 1.42),
            ("S", "shared", "auto", 0.84, 1.57),
            ("M", "own", 4, 0.9, 0.93),
        )
    ]
    written = {
        "step": 300,
        "verifier": "XL",
        "prompts": 8,
        "new_tokens": 128,
        "temperature": 0.0,
        "plain_tokens_per_second": 60.0,
        "drafts": drafts,
    }
    (run / "speculative.json").write_text(json.dumps(written))


def write_downstream(run: Path) -> None:
    cloze = {
        name: {"acc": {"value": 0.4 + i / 20, "stderr": 0.013}}
        for i, name in enumerate(("XL", "S"))
    }
    mean = {name: {"mean": {"value": 0.5, "stderr": None}} for name in ("XL", "S")}
    written = {
        "step": 300,
        "limit": None,
        "submodels": ["XL", "S"],
        "tasks": {"stdlib_cloze": {"num_fewshot": 1, "results": cloze}},
        "groups": {"matformer_paper": {"results": mean}},
    }
    (run / "downstream.json").write_text(json.dumps(written))
