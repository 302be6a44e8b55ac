"""Evaluation and search of a vision encoder of random weights, on images of random pixels."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

from matformer_dist.cli import app
from matformer_dist.config_file import load_config
from matformer_dist.counting import flops_per_unit
from matformer_dist.data.images.classes import load_class_names
from matformer_dist.evaluation.validation import open_validation
from matformer_dist.models.matvit import MatViT
from matformer_dist.search.picture import _axis
from matformer_dist.submodels.slices import read_slices
from tests.unit.submodels.synthetic_vision_run import (
    CLASSES,
    NESTING,
    random_vit,
    vision_config,
    write_vision_run,
)

OF_EACH = 6  # images of a class


@pytest.fixture
def vit() -> MatViT:
    return random_vit(vision_config())


@pytest.fixture
def run(tmp_path: Path, vit: MatViT) -> Path:
    generator = torch.Generator().manual_seed(4)
    for name in CLASSES.names:
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for i in range(OF_EACH):
            pixels = torch.randint(0, 256, (12, 12, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    data = {"train": str(tmp_path / "pictures"), "validation": str(tmp_path / "pictures")}
    return write_vision_run(tmp_path / "run", vit, data=data)


def test_losses_and_accuracies_match_the_logits(run: Path, vit: MatViT) -> None:
    count = OF_EACH * len(CLASSES)
    for words in (["evaluate", str(run)], ["search", str(run), "--points", "3"]):
        shown = CliRunner().invoke(app, [*words, "--device", "cpu"])
        assert shown.exit_code == 0, shown.output
        assert f"{count} validation images" in shown.output or f"on {count} images" in shown.output
        assert "accuracy" in shown.output
        assert "token" not in shown.output and "perplexity" not in shown.output
    written = json.loads((run / "evaluation.json").read_text())
    slices = read_slices(run)
    assert slices is not None and (slices.unit, slices.units) == ("images", count)
    assert written["images"] == count and "tokens" not in written
    of_search = {one.submodel: one for one in slices.measured}
    config = load_config(run / "config.yaml")
    batches = list(
        open_validation(config, load_class_names(run), None).micro_batches(torch.device("cpu"))
    )
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert len(images) == count
    for entry in written["submodels"]:
        submodel = NESTING.parse(entry["submodel"], 3)
        with torch.no_grad():
            logits = vit.logits(images, submodel)
        loss = float(F.cross_entropy(logits.double(), labels.flatten()))
        accuracy = float((logits.argmax(-1) == labels.flatten()).double().mean())
        flops = flops_per_unit(config.model, len(CLASSES), submodel, config.sample)
        found = of_search[entry["submodel"]]
        for one in (entry, found.model_dump()):
            assert one["loss"] == pytest.approx(loss, rel=1e-5)
            assert one["accuracy"] == pytest.approx(accuracy)
            assert one["flops"] == flops
            low, high = one["accuracy_interval"]
            assert low - 1e-9 <= accuracy <= high + 1e-9
        assert "perplexity" not in entry and "bits_per_byte" not in entry
    assert len({entry["accuracy"] for entry in written["submodels"]}) > 1
    rows = list(csv.DictReader((run / "slices.csv").open()))
    for row, one in zip(rows, slices.slices, strict=True):
        assert (int(row["flops"]), float(row["accuracy"])) == (one.flops, one.accuracy)
        assert (float(row["accuracy_low"]), float(row["accuracy_high"])) == one.accuracy_interval
        assert (float(row["gain_low"]), float(row["gain_high"])) == one.gain_interval


def test_axes_of_the_picture_are_of_the_unit() -> None:
    assert _axis("flops", "images") == "FLOPs an image, forward"
    assert _axis("flops", "tokens") == "FLOPs a token, forward"
    assert _axis("latency", "images") == "ms a pass"
    assert "cache" in _axis("memory", "tokens") and "cache" not in _axis("memory", "images")
