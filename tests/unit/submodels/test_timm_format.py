"""`timm` exports against the universal model run in place at the same submodel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.errors import UserError
from matformer_dist.submodels.extract import extract
from matformer_dist.submodels.safetensors_files import read_weights
from matformer_dist.submodels.timm_format import mlp_ratio
from tests.unit.submodels.synthetic_vision_run import (
    CLASSES,
    NESTING,
    random_images,
    random_vit,
    some_images,
    vision_config,
    write_vision_run,
)
from tests.with_timm import import_timm

timm = import_timm()

SUBMODELS = ["S", "M", "XL", "S:2,L:1", "XL:1,S:2"]


def load(directory: Path) -> Any:
    return timm.create_model(f"local-dir:{directory}", pretrained=True).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "sincos"},
        {"pooling": "mean"},
        {"pooling": "mean", "positions": "sincos"},
        {"channels": 1, "image_size": 8, "patch_size": 2},
    ],
    ids=["learned", "sincos", "mean", "mean-sincos", "grey"],
)
def test_timm_logits_match_universal_model_in_place(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = vision_config(**changes)
    vit = random_vit(model)
    run = write_vision_run(tmp_path / "run", vit, tensor=2)
    images = some_images(model)
    for one in extract(str(run), SUBMODELS, output=tmp_path / "out", format="timm"):
        with torch.no_grad():
            expected = vit.logits(images, NESTING.parse(one.submodel, model.n_layers))
            actual = load(one.path)(images)
        assert expected.std() > 0.2
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_is_the_rounded_weight(tmp_path: Path, dtype: str) -> None:
    """All of them in one file, which alone timm reads."""
    run = write_vision_run(tmp_path / "run", random_vit(vision_config()))
    whole, low = (
        extract(
            str(run), ["S:2,L:1"], output=tmp_path / name, format="timm", dtype=name,
            shard_bytes=1000,
        )[0].path
        for name in ("fp32", dtype)
    )  # fmt: skip
    stored = dict(read_weights(low))
    assert sorted(path.name for path in low.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "submodel.json",
    ]  # fmt: skip
    expected, actual = (load(path).state_dict() for path in (whole, low))
    for name, weight in expected.items():
        assert stored[name].equal(weight.to(stored[name].dtype))
        assert stored[name].dtype != torch.float32 and actual[name].equal(stored[name].float())


def test_timm_knows_classes_and_images(tmp_path: Path) -> None:
    run = write_vision_run(tmp_path / "run", random_vit(vision_config()))
    (mixed,) = extract(str(run), ["S:2,L:1"], output=tmp_path / "mixed", format="timm")
    model = load(mixed.path)
    assert list(model.pretrained_cfg["label_names"]) == [*CLASSES.names]
    assert model.num_classes == 5 and model.blocks[0].mlp.fc1.out_features == 40
    assert model.patch_embed.img_size == (12, 12)
    entry = json.loads((mixed.path / "submodel.json").read_text())
    assert (entry["widths"], entry["padded_width"]) == ([8, 8, 40], 40)
    assert "padded to 40" in (mixed.path / "README.md").read_text()


@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_prepared_as_in_validation(
    tmp_path: Path, channels: int, crop_pct: float
) -> None:
    ours = Preprocessing(28, channels, (0.3,) * channels, (0.2, 0.3, 0.4)[:channels], crop_pct)
    data = {"mean": list(ours.mean), "std": list(ours.std), "crop_pct": crop_pct}
    vit = random_vit(vision_config(channels=channels, image_size=28, patch_size=7))
    run = write_vision_run(tmp_path / "run", vit, data=data)
    (one,) = extract(str(run), ["S"], output=tmp_path / "out", format="timm")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(load(one.path)))
    level = 1 / 255 / min(ours.std)
    for image in random_images(channels):
        cut = crop_pct < 1 or image.height != image.width
        # Theirs is resized first, then cut; ours at once.
        assert (transform(image) - ours(image)).abs().max() <= (1.01 * level if cut else 1e-6)


def test_what_timm_does_not_compute_is_refused(tmp_path: Path) -> None:
    kinds: list[tuple[str, dict[str, Any], str]] = [
        ("grouped", {"n_kv_heads": 2}, "ViT of timm .* n_kv_heads 2 .*--format native"),
        ("eps", {"norm_eps": 1e-5}, "eps of 1e-06, .* 1e-05; extract with --format native or hf"),
        ("mean", {"norm_eps": 1e-5, "pooling": "mean"}, "extract with --format native$"),
    ]
    for name, changes, says in kinds:
        run = write_vision_run(tmp_path / name, random_vit(vision_config(**changes)))
        with pytest.raises(UserError, match=says):
            extract(str(run), ["M"], output=tmp_path / "out", format="timm")
    assert not (tmp_path / "out").exists()


def test_every_width_has_a_ratio() -> None:
    for d_model in (32, 48, 192, 384, 768, 1408, 1664):
        for width in range(1, 4 * d_model + 1):
            assert int(d_model * mlp_ratio(width, d_model)) == width
