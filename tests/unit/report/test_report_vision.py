"""The page of a vision encoder's run: images, accuracy, no words about text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from matformer_dist.config_file import validate_config
from matformer_dist.errors import UserError
from matformer_dist.nesting import mix_n_match
from matformer_dist.report import text, write_report
from matformer_dist.report.inputs import read_run

CLASSES = ["cat", "dog", "crane"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tree = {
        "task": "vision",
        "run": {"dir": str(tmp_path)},
        "model": {"preset": "tiny", "channels": 1},
        "data": {"train": "digits"},
        "training": {"steps": 40, "micro_batch_size": 8, "global_batch_size": 8},
    }
    config = validate_config(tree, "test")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    lines = [_line(step, config.granularities.names) for step in (10, 20, 30, 40)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    submodels = [
        _evaluated(str(one), "uniform" if one.is_uniform else "heuristic", i)
        for i, one in enumerate(mix_n_match(config.granularities, 4))
    ]
    written = {"step": 40, "images": 355, "bytes": None, "submodels": submodels}
    (tmp_path / "evaluation.json").write_text(json.dumps(written))
    return tmp_path


def _line(step: int, names: tuple[str, ...]) -> dict[str, Any]:
    losses = {name: 2 / step + i / 50 for i, name in enumerate(names)}
    return {
        "step": step, "images": 8 * step, "train_loss": losses, "val_loss": losses,
        "val_agreement": dict.fromkeys(names, 0.9),
        "val_accuracy": {name: 0.8137 + i / 50 for i, name in enumerate(names)},
        "images_per_second": 700.0, "images_per_second_per_device": 700.0, "step_ms": 11.0,
    }  # fmt: skip


def _evaluated(name: str, kind: str, place: int) -> dict[str, Any]:
    return {
        "submodel": name, "kind": kind, "parameters": 1000 + 50 * place,
        "non_embedding_parameters": 900 + 50 * place, "flops": 10**6 * (place + 1),
        "loss": 0.5 - place / 100, "loss_interval": [0.1, 0.9], "accuracy": 0.9 + place / 200,
        "accuracy_interval": [0.88, 0.99], "agreement": 0.95, "kl": 0.01,
    }  # fmt: skip


def test_the_page_tells_of_images_and_accuracy(run: Path) -> None:
    page = write_report(run, None).read_text()
    for words in (
        "Loss in nats per image",
        "images seen",
        "images per second",
        "Validation accuracy",
        "Accuracy against FLOPs",
        "FLOPs an image",
        "matformer retrieve",
        "losses and accuracies as a table",
    ):
        assert words in page, words
    shown = page[: page.index("<h2>Configuration</h2>")]
    for words in ("token", "Perplexity", "speculate", "generate", "stdlib", "Samples"):
        assert words not in shown.split("</style>")[1], words
    assert text.percent(0.9) in shown  # of S, as evaluated


def test_classes_are_counted_where_the_settings_do_not_say(run: Path) -> None:
    assert read_run(run).outputs == 3
    (run / "classes.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="does not hold class names"):
        read_run(run)


def test_old_keys_are_read(run: Path) -> None:
    written = json.loads((run / "evaluation.json").read_text())
    for one in written["submodels"]:
        one["flops_per_token"] = one.pop("flops")
    (run / "evaluation.json").write_text(json.dumps(written))
    evaluation = read_run(run).evaluation
    assert evaluation is not None and evaluation.submodels[0].flops == 10**6
