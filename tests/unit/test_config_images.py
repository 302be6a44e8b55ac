from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from matformer_dist.config_images import PRESETS, AugmentationConfig, ImageDataConfig, Preset


def test_presets_match_the_papers_table() -> None:
    """Steiner et al., as they lie in the authors' configurations: (layers, magnitude), mixup."""
    table = {
        "light1": ((2, 0), 0.0),
        "light2": ((2, 10), 0.2),
        "medium1": ((2, 15), 0.2),
        "medium2": ((2, 15), 0.5),
        "strong1": ((2, 20), 0.5),
        "strong2": ((2, 20), 0.8),
    }
    found = {kind: ((p.layers, p.magnitude), p.mixup) for kind, p in PRESETS.items()}
    assert found == {"none": ((0, 0), 0.0), "crop": ((0, 0), 0.0), **table}
    for kind, preset in PRESETS.items():
        crops = ((0.05, 1.0), True) if kind != "none" else (None, False)
        assert (preset.crop_scale, preset.flip) == crops


def test_keys_that_are_set_go_before_the_presets() -> None:
    assert AugmentationConfig().chosen == PRESETS["none"]
    own = AugmentationConfig(kind="medium2", flip=False, layers=3, crop_scale=(0.5, 1.0))
    assert own.chosen == Preset((0.5, 1.0), False, 3, 15, 0.5)
    assert AugmentationConfig(kind="strong1", layers=0).chosen.layers == 0
    assert AugmentationConfig(layers=1, magnitude=0).chosen == Preset(None, False, 1, 0, 0.0)


def test_yaml_round_trip() -> None:
    tree = yaml.safe_load(
        "{train: digits, mean: [0.5], std: [0.25], workers: 2, "
        "augmentation: {kind: light2, crop_scale: [0.3, 1], rotate: 10}}"
    )
    config = ImageDataConfig.model_validate(tree)
    again = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert ImageDataConfig.model_validate(again) == config
    assert config.augmentation.chosen.crop_scale == (0.3, 1.0)


def test_digits_are_the_default() -> None:
    assert ImageDataConfig().train == "digits"


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"train": ""}, "at least 1 character"),
        ({"train": "x", "trian": "x"}, "Extra inputs"),
        ({"train": "x", "split": 1.0}, "less than 1"),
        (
            {"train": "x", "split": 0.1, "validation": "y"},
            "split 0.1 has no meaning beside data.va",
        ),
        ({"train": "digits", "split": 0.1}, "no meaning beside data.train digits"),
        ({"train": "x", "std": [0.0]}, "greater than 0"),
        ({"train": "x", "crop_pct": 1.5}, "less than or equal to 1"),
        ({"train": "x", "workers": 257}, "less than or equal to 256"),
        ({"train": "x", "prefetch": -1}, "greater than or equal to 0"),
        ({"train": "x", "shuffle": "no"}, "'all' or 'row_groups'"),
        ({"train": "x", "seed": -1}, "greater than or equal to 0"),
        ({"train": "x", "augmentation": {"kind": "hard"}}, "'strong1' or 'strong2'"),
        (
            {"train": "x", "augmentation": {"crop_scale": [0.5, 0.1]}},
            "crop_scale is .0.5, 0.1.; th",
        ),
        ({"train": "x", "augmentation": {"crop_scale": [0, 1]}}, "greater than 0"),
        ({"train": "x", "augmentation": {"crop_ratio": [2, 1]}}, "crop_ratio is .2.0, 1.0."),
        (
            {"train": "x", "augmentation": {"magnitude": 31, "layers": 2}},
            "less than or equal to 30",
        ),
        ({"train": "x", "augmentation": {"magnitude": 9}}, "magnitude 9 .* set .*layers, 2 for"),
        (
            {"train": "x", "augmentation": {"layers": 2}},
            "layers 2 need data.augmentation.magnitude",
        ),
        ({"train": "x", "augmentation": {"rotate": 181}}, "less than or equal to 180"),
        ({"train": "x", "augmentation": {"shift": 1.5}}, "valid integer"),
    ],
)
def test_mistakes_are_found(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ImageDataConfig.model_validate(tree)
