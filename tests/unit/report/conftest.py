"""Run directories of both tasks with plausible numbers: losses that fall as a power of tokens, or
images, by size.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from matformer_dist.config import Config
from matformer_dist.config_file import load_config
from matformer_dist.counting import count_parameters, flops_per_unit
from matformer_dist.nesting import Submodel, mix_n_match

MakeRun = Callable[..., Path]
OUTPUTS = {"language": 4096, "vision": 10}
CLASSES = [f"class {i}" for i in range(OUTPUTS["vision"])]
_OF_TASK: dict[str, dict[str, dict[str, Any]]] = {
    "language": {
        "model": {"vocab_size": OUTPUTS["language"], "tied_embeddings": True},
        "data": {"train": [[1.0, "data/stdlib"]], "tokenizer": "data/tokenizer.model"},
        "training": {"seq_len": 256, "global_batch_size": 16},
    },
    "vision": {
        "model": {"image_size": 32, "patch_size": 8},
        "data": {"train": "data/pictures"},
        "training": {"global_batch_size": 4096},
    },
}


def write_config(
    directory: Path,
    fractions: Sequence[float | str],
    steps: int,
    layers: int = 4,
    task: str = "language",
) -> Config:
    own = _OF_TASK[task]
    tree = {
        "task": task,
        "run": {"dir": str(directory)},
        "model": {"d_model": 128, "n_layers": layers, "n_heads": 4, "d_ff": 1024, **own["model"]},
        "nesting": {"fractions": list(fractions)},
        "parallel": {"tensor": 2},
        "data": own["data"],
        "training": {
            "steps": steps,
            "micro_batch_size": 8,
            "precision": "fp32",
            **own["training"],
        },
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(tree))
    return load_config(directory / "config.yaml")


def loss_at(submodel: Submodel, tokens: float) -> float:
    """Nats per token: falls with tokens, and with the mean width of the layers."""
    width = sum(submodel.widths) / len(submodel) / submodel.nesting.d_ff
    return 2.35 + 0.11 * width**-0.33 + 5.6 * (1 + tokens / 4e4) ** -0.62


def agreement_at(submodel: Submodel, tokens: float) -> float:
    width = sum(submodel.widths) / len(submodel) / submodel.nesting.d_ff
    return 1 / (1 + 0.15 * (width**-0.45 - 1) * (1 + 2 * math.exp(-tokens / 1e6)))


def accuracy_at(submodel: Submodel, tokens: float) -> float:
    return 1.18 - 0.2 * loss_at(submodel, tokens)


def metrics_line(
    config: Config, step: int, evaluated: bool, noise: random.Random
) -> dict[str, Any]:
    nesting, layers = config.granularities, config.model.n_layers
    tokens = step * 4096
    models = {name: nesting.uniform(i, layers) for i, name in enumerate(nesting.names)}
    shared = noise.gauss(0, 0.05)
    line: dict[str, Any] = {
        "step": step,
        config.unit: tokens,
        "train_loss": {
            name: loss_at(model, tokens) - 0.04 + shared + noise.gauss(0, 0.02)
            for name, model in models.items()
        },
        "grad_norm": 0.4 + 2.5 * math.exp(-step / 60) + abs(noise.gauss(0, 0.1)),
        "learning_rate": 3e-3 * min(step / 100, 0.5 + 0.5 * math.cos(step / 1500 * 3)),
        f"{config.unit}_per_second": 14_200 * (1 + noise.gauss(0, 0.02)),
        "model_tflops_per_second": 0.092 * (1 + noise.gauss(0, 0.02)),
        "mfu": None,
        "step_ms": 288 * (1 + noise.gauss(0, 0.02)),
        "peak_memory_bytes": 812_000_000,
    }
    if evaluated:
        line["val_loss"] = {name: loss_at(model, tokens) for name, model in models.items()}
        line["val_agreement"] = {name: agreement_at(m, tokens) for name, m in models.items()}
        line["val_accuracy"] = {name: accuracy_at(m, tokens) for name, m in models.items()}
    return line


def evaluated_submodel(
    config: Config, submodel: Submodel, kind: str, tokens: int
) -> dict[str, Any]:
    outputs = OUTPUTS[config.task]
    parameters = count_parameters(config.model, outputs, submodel)
    accuracy = accuracy_at(submodel, tokens)
    bend = 0.0 if kind == "uniform" else 0.004
    return {
        "submodel": str(submodel),
        "kind": kind,
        "parameters": parameters.total,
        "non_embedding_parameters": parameters.non_embedding,
        "flops": flops_per_unit(config.model, outputs, submodel, config.sample),
        "loss": loss_at(submodel, tokens) + bend,
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.011, accuracy + 0.011],
        "agreement": agreement_at(submodel, tokens),
    }


def write_evaluation(directory: Path, config: Config, steps: int) -> None:
    nesting, layers = config.granularities, config.model.n_layers
    found = [
        evaluated_submodel(config, s, "uniform" if s.is_uniform else "heuristic", steps * 4096)
        for s in mix_n_match(nesting, layers)
    ]
    if len(nesting) > 1 and layers > 1:
        names = nesting.names
        odd = nesting.parse(f"{names[-1]}:1,{names[0]}:{layers - 1}", layers)
        found.append(evaluated_submodel(config, odd, "mix", steps * 4096))
    evaluation = {"step": steps, config.unit: steps * 4096, "submodels": found}
    (directory / "evaluation.json").write_text(json.dumps(evaluation))


def write_extracted(directory: Path, config: Config, notation: str, steps: int) -> None:
    submodel = config.granularities.parse(notation, config.model.n_layers)
    item = evaluated_submodel(config, submodel, "uniform", steps * 4096)
    folder = directory / "submodels" / notation.replace(":", "x").replace(",", "-")
    folder.mkdir(parents=True)
    description = {
        "submodel": notation,
        "widths": submodel.widths,
        "parameters": item["parameters"],
        "non_embedding_parameters": item["non_embedding_parameters"],
        "format": "hf",
        "step": steps,
        "run": str(directory),
        "bytes": 4 * item["parameters"] + 4000,
        "loss": item["loss"],
        "accuracy": item["accuracy"],
    }
    (folder / "submodel.json").write_text(json.dumps(description))


PROMPT = "def read_lines(path):\n"
BODIES = {
    "S": '    """Return the path."""\n    return path\n\ndef _get(self, name):\n    return self',
    "M": "    with open(path) as f:\n        for line in f:\n            yield line\n",
    "XL": '    """Yield the lines of a file."""\n    with open(path, "r") as f:\n'
    '        for line in f:\n            yield line.rstrip("\\n")\n\n\ndef main():\n    ' * 3,
}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """make_run(steps=..., ...) writes a run into a fresh directory and returns it."""

    def make(**settings: Any) -> Path:
        directory = tmp_path / "stdlib-demo"
        directory.mkdir()
        return write_run(directory, **settings)

    return make


def write_run(
    directory: Path,
    *,
    steps: int = 300,
    every: int = 10,
    evaluate_every: int = 50,
    fractions: Sequence[float | str] = ("1/8", "1/4", "1/2", 1),
    layers: int = 4,
    complete: bool = True,
    task: str = "language",
) -> Path:
    """A run directory; `complete` adds evaluation, extracted models and, of language, samples."""
    config = write_config(directory, fractions, steps, layers, task)
    if task == "vision":
        (directory / "classes.json").write_text(json.dumps(CLASSES))
    noise = random.Random(5)
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(every, steps + 1, every):
            evaluated = evaluate_every > 0 and (step % evaluate_every == 0 or step == steps)
            print(json.dumps(metrics_line(config, step, evaluated, noise)), file=file)
    if complete:
        write_evaluation(directory, config, steps)
        names = config.granularities.names
        for name in {names[0], names[-1]}:
            write_extracted(directory, config, name, steps)
    if complete and task == "language":
        samples = [
            {"submodel": name, "prompt": PROMPT, "text": PROMPT + body, "seconds": 1.4,
             "tokens_per_second": 91.2}
            for name, body in BODIES.items() if name in names
        ]  # fmt: skip
        (directory / "samples.json").write_text(json.dumps(samples))
    return directory
