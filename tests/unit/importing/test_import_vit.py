"""Imported ViTs of transformers against its own run of the checkpoint, and what import leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from matformer_dist.checkpoints.verify import faults
from matformer_dist.config_file import load_config
from matformer_dist.config_vision import VisionConfig
from matformer_dist.data.images.classes import load_class_names
from matformer_dist.errors import UserError
from matformer_dist.importing.import_model import import_model
from matformer_dist.importing.options import ImportOptions
from matformer_dist.run_directory import UNIVERSAL, find_checkpoint
from matformer_dist.submodels.extract import extract
from tests.unit.importing.vit_checkpoints import (
    CLASSES,
    load,
    random_hf,
    save_hf,
    some_images,
    transformers,
    xl_logits,
)

KINDS: dict[str, dict[str, Any]] = {
    "usual": {},
    "grey": {"num_channels": 1, "image_size": 8, "patch_size": 2, "layer_norm_eps": 1e-3},
    "squares": {"image_size": [12, 12], "patch_size": [4, 4]},
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of class folders of random images."""
    generator = torch.Generator().manual_seed(3)
    for name in ("one", "two"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            pixels = torch.randint(0, 256, (9 + i, 12, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("order", ["none", "magnitude", "activation"])
@pytest.mark.parametrize("kind", KINDS)
def test_xl_matches_transformers_after_a_round_trip(
    tmp_path: Path, images: Path, kind: str, order: str
) -> None:
    vit = random_hf(**KINDS[kind])
    channels = vit.config.num_channels
    half = [0.5] * channels
    source = save_hf(vit, tmp_path / "hf", image_mean=half, image_std=half)
    assert len(list(source.glob("model-*.safetensors"))) > 2
    options = ImportOptions(
        order="none" if order == "none" else "importance",
        calibration=[images] if order == "activation" else (),
    )
    import_model(source, tmp_path / "run", options)
    inputs = some_images(channels, load(tmp_path / "run").model.image_size)
    with torch.no_grad():
        expected = vit(inputs).logits
    assert expected.std() > 0.3
    actual = xl_logits(tmp_path / "run", inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    (back,) = extract(str(tmp_path / "run"), ["XL"], output=tmp_path / "out", format="hf")
    again = transformers.AutoModelForImageClassification.from_pretrained(back.path)
    with torch.no_grad():
        torch.testing.assert_close(again(inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert again.config.id2label == dict(enumerate(CLASSES))
    if order == "none":
        for name, weight in vit.state_dict().items():
            assert again.state_dict()[name].equal(weight), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_kept_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    vit = random_hf().to(dtype)
    import_model(save_hf(vit, tmp_path / "hf"), tmp_path / "run", ImportOptions(order="none"))
    (back,) = extract(str(tmp_path / "run"), ["XL"], output=tmp_path / "out", format="hf")
    again = transformers.AutoModelForImageClassification.from_pretrained(
        back.path, dtype=torch.float32
    )
    for name, weight in vit.state_dict().items():
        assert again.state_dict()[name].equal(weight.float()), name


def test_the_run_directory_is_what_training_would_have_left(tmp_path: Path) -> None:
    source = save_hf(random_hf(), tmp_path / "hf", "1GB", image_std=[0.5, 0.25, 1.0])
    steps: list[tuple[int, int]] = []
    run = tmp_path / "runs" / "mine"
    options = ImportOptions(fractions=["1/4", "1"])
    model = import_model(source, run, options, lambda *step: steps.append(step))
    assert {path.name for path in run.iterdir()} == {"config.yaml", "classes.json", "checkpoints"}
    checkpoint = find_checkpoint(str(run))
    assert faults(checkpoint) == []
    manifest = checkpoint.manifest
    assert (manifest.step, manifest.units, manifest.has_optimizer) == (0, 0, False)
    assert (manifest.layout, manifest.outputs) == (UNIVERSAL, 5)
    assert manifest.nesting.widths == (16, 64)
    assert manifest.labels_sha256 == load_class_names(run).digest
    assert load_class_names(run).names == CLASSES
    assert steps == [(i, 44) for i in range(45)]
    assert model.parameters == sum(p.numel() for p in load(run).parameters())

    with pytest.raises(UserError, match=r"leaves data\.train open"):
        load_config(run / "config.yaml")
    config = load_config(run / "config.yaml", ["data.train=digits"])
    assert isinstance(config, VisionConfig)
    assert (config.model, config.granularities) == (manifest.model, manifest.nesting)
    assert (config.data.mean, config.data.std) == ([0.5, 0.5, 0.5], [0.5, 0.25, 1.0])
    assert config.training.precision == manifest.precision
    text = (run / "config.yaml").read_text()
    assert yaml.safe_load(text)["data"]["train"] == "???" and f"{run}/classes.json" in text


@pytest.mark.parametrize(
    ("processor", "expected", "says"),
    [
        ({}, ([0.5] * 3, [0.5] * 3, 1.0), "resizes the shorter side, and cuts a square of 12"),
        ({"resample": 2}, ([0.5] * 3, [0.5] * 3, 1.0), "does not resize bicubic"),
        (
            {"do_rescale": False, "image_mean": 102.0, "image_std": [51, 51, 25.5]},
            ([0.4] * 3, [0.2, 0.2, 0.1], 1.0),
            "",
        ),
        ({"do_normalize": False}, ([0.0] * 3, [1.0] * 3, 1.0), ""),
        (
            {"size": {"shortest_edge": 14}, "do_center_crop": True,
             "crop_size": {"height": 12, "width": 12}, "resample": 3},
            ([0.5] * 3, [0.5] * 3, 12 / 14),
            None,
        ),
    ],
)  # fmt: skip
def test_images_are_prepared_as_the_checkpoint_has_them(
    tmp_path: Path, processor: dict[str, Any], expected: Any, says: str | None
) -> None:
    source = save_hf(random_hf(), tmp_path / "hf", **processor)
    imported = import_model(source, tmp_path / "run")
    data = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    mean, std, crop_pct = expected
    assert data["mean"] == pytest.approx(mean) and data["std"] == pytest.approx(std)
    assert data["crop_pct"] == pytest.approx(crop_pct)
    if says is None:
        assert imported.notices == []
    else:
        assert any(says in notice for notice in imported.notices)


def test_without_a_preprocessor_the_default_is_said(tmp_path: Path) -> None:
    source = save_hf(random_hf(), tmp_path / "hf")
    (source / "preprocessor_config.json").unlink()
    (notice,) = import_model(source, tmp_path / "run").notices
    assert "data.mean and data.std of the run are 0.5" in notice
    (source / "preprocessor_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"cannot read .*preprocessor_config\.json"):
        import_model(source, tmp_path / "other")


def test_a_backbone_gets_a_fresh_head_for_named_classes(tmp_path: Path) -> None:
    backbone = random_hf(kind="ViTModel")
    source = save_hf(backbone, tmp_path / "hf")
    with pytest.raises(UserError, match=r"without a classifier; .*--classes FILE"):
        import_model(source, tmp_path / "run")
    names = tmp_path / "classes.json"
    names.write_text('["good", "bad"]')
    imported = import_model(source, tmp_path / "run", ImportOptions(classes=names))
    assert any("head of 2 classes is fresh" in notice for notice in imported.notices)
    assert any("pooler.dense.weight are left out" in notice for notice in imported.notices)
    vit = load(tmp_path / "run")
    assert vit.model.classes == 2 and load_class_names(tmp_path / "run").names == ("good", "bad")
    assert 0.1 < vit.head.weight.std() < 0.3 and not vit.head.bias.any()
    nesting = find_checkpoint(str(tmp_path / "run")).manifest.nesting
    with torch.no_grad():
        actual = vit.embed(some_images(), nesting.uniform(nesting.largest, 3))
        expected = backbone(some_images()).last_hidden_state[:, 0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_classes_can_be_named_anew(tmp_path: Path) -> None:
    source = save_hf(random_hf(id2label={i: f"LABEL_{i}" for i in range(5)}), tmp_path / "hf")
    imported = import_model(source, tmp_path / "numbers")
    assert load_class_names(tmp_path / "numbers").names == ("0", "1", "2", "3", "4")
    assert any("names no classes: classes.json numbers them" in one for one in imported.notices)
    names = tmp_path / "classes.json"
    names.write_text(json.dumps(CLASSES[::-1]))
    import_model(source, tmp_path / "named", ImportOptions(classes=names))
    assert load_class_names(tmp_path / "named").names == CLASSES[::-1]
    names.write_text(json.dumps(CLASSES[:3]))
    with pytest.raises(UserError, match=r"names 3 classes, .* has 5; .*checkpoint.initial=RUN"):
        import_model(source, tmp_path / "other", ImportOptions(classes=names))


def test_prefixes_come_out_as_models_of_their_own(tmp_path: Path, images: Path) -> None:
    options = ImportOptions(widths=[6, 30, 64], names=["a", "b", "c"], calibration=[images])
    import_model(save_hf(random_hf(), tmp_path / "hf"), tmp_path / "run", options)
    nesting = find_checkpoint(str(tmp_path / "run")).manifest.nesting
    (one,) = extract(str(tmp_path / "run"), ["a:2,b:1"], output=tmp_path / "out", format="hf")
    hf = transformers.AutoModelForImageClassification.from_pretrained(one.path)
    with torch.no_grad():
        actual = hf(some_images()).logits
        expected = load(tmp_path / "run").logits(some_images(), nesting.parse("a:2,b:1", 3))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
