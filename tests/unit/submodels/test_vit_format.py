"""`hf` exports of vision encoders against the universal model run in place at the same submodel."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.errors import UserError
from matformer_dist.submodels.extract import extract
from matformer_dist.submodels.safetensors_files import read_weights
from tests.unit.submodels.synthetic_vision_run import (
    CLASSES,
    NESTING,
    random_images,
    random_vit,
    some_images,
    vision_config,
    write_vision_run,
)
from tests.with_timm import mend_torchvision

mend_torchvision()
transformers = pytest.importorskip("transformers")

SUBMODELS = ["S", "M", "XL", "S:2,L:1", "XL:1,S:2"]


def load(directory: Path, **options: Any) -> Any:
    model = transformers.AutoModelForImageClassification.from_pretrained(
        directory, local_files_only=True, **options
    )
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "sincos"},
        {"channels": 1, "image_size": 8, "patch_size": 2, "norm_eps": 1e-3},
    ],
    ids=["learned", "sincos", "grey"],
)
def test_hf_logits_match_universal_model_in_place(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = vision_config(**changes)
    vit = random_vit(model)
    run = write_vision_run(tmp_path / "run", vit, tensor=2)
    images = some_images(model)
    for one in extract(str(run), SUBMODELS, output=tmp_path / "out", format="hf"):
        with torch.no_grad():
            expected = vit.logits(images, NESTING.parse(one.submodel, model.n_layers))
            actual = load(one.path)(images).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_transformers_reads_every_weight_and_setting(tmp_path: Path) -> None:
    run = write_vision_run(tmp_path / "run", random_vit(vision_config()))
    (one,) = extract(str(run), ["M"], output=tmp_path / "out", format="hf", dtype="bf16")
    hf, info = transformers.AutoModelForImageClassification.from_pretrained(
        one.path, local_files_only=True, output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(hf).__name__ == "ViTForImageClassification" and hf.dtype == torch.bfloat16
    assert hf.config.intermediate_size == 16
    assert [hf.config.id2label[i] for i in range(5)] == [*CLASSES.names]
    assert hf.config.label2id["dög"] == 3
    assert sum(p.numel() for p in hf.parameters()) == one.parameters
    hf.save_pretrained(tmp_path / "theirs")
    ours, theirs = (dict(read_weights(path)) for path in (one.path, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_is_the_rounded_weight(tmp_path: Path, dtype: str) -> None:
    run = write_vision_run(tmp_path / "run", random_vit(vision_config()))
    whole, low = (
        load(
            extract(str(run), ["S:2,L:1"], output=tmp_path / name, format="hf", dtype=name)[0].path
        )
        for name in ("fp32", dtype)
    )
    for expected, actual in zip(whole.parameters(), low.parameters(), strict=True):
        assert actual.equal(expected.to(actual.dtype)) and actual.dtype != torch.float32


def test_narrow_layers_are_padded_and_said_to_be(tmp_path: Path) -> None:
    run = write_vision_run(tmp_path / "run", random_vit(vision_config()))
    (mixed,) = extract(str(run), ["S:2,L:1"], output=tmp_path / "mixed", format="hf")
    entry = json.loads((mixed.path / "submodel.json").read_text())
    assert (entry["widths"], entry["padded_width"]) == ([8, 8, 40], 40)
    assert "padded to 40" in (mixed.path / "README.md").read_text()
    weights = dict(read_weights(mixed.path))
    layer = "vit.encoder.layer.0."
    assert not weights[f"{layer}intermediate.dense.bias"][8:].any()
    assert not weights[f"{layer}output.dense.weight"][:, 8:].any()


@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_prepared_as_in_validation(
    tmp_path: Path, channels: int, crop_pct: float
) -> None:
    """But that transformers rounds half a pixel of the margin down: there its square begins one
    pixel before ours.
    """
    ours = Preprocessing(28, channels, (0.3,) * channels, (0.2, 0.3, 0.4)[:channels], crop_pct)
    data = {"mean": list(ours.mean), "std": list(ours.std), "crop_pct": crop_pct}
    model = vision_config(channels=channels, image_size=28, patch_size=7)
    run = write_vision_run(tmp_path / "run", random_vit(model), data=data)
    (one,) = extract(str(run), ["S"], output=tmp_path / "out", format="hf")
    processor = transformers.AutoImageProcessor.from_pretrained(one.path, backend="pil")
    shorter = math.floor(28 / crop_pct)
    level = 1 / 255 / min(ours.std)
    for image in random_images(channels):
        theirs = processor(image, return_tensors="pt").pixel_values[0]
        expected = ours(image)
        for axis, side in ((1, image.height), (2, image.width)):
            margin = int(shorter * side / min(image.size)) - 28
            if margin % 4 == 3:
                theirs, expected = theirs.narrow(axis, 1, 27), expected.narrow(axis, 0, 27)
        cut = crop_pct < 1 or image.height != image.width
        # Theirs is resized first, then cut; ours at once.
        assert (theirs - expected).abs().max() <= (1.01 * level if cut else 1e-6)


def test_what_transformers_does_not_compute_is_refused(tmp_path: Path) -> None:
    kinds: list[tuple[str, dict[str, Any], str]] = [
        ("mean", {"pooling": "mean"}, "has pooling: mean; extract with --format timm or native"),
        ("grouped", {"n_kv_heads": 2}, "n_heads 4, n_kv_heads 2 and heads of 8 .*--format native"),
        ("wide", {"kv_channels": 12}, "n_kv_heads 4 and heads of 12 in a d_model of 32"),
    ]
    for name, changes, says in kinds:
        run = write_vision_run(tmp_path / name, random_vit(vision_config(**changes)))
        with pytest.raises(UserError, match=says):
            extract(str(run), ["M"], output=tmp_path / "out", format="hf")
    assert not (tmp_path / "out").exists()
