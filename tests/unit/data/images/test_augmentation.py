from __future__ import annotations

import random
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from matformer_dist.config_images import AugmentationConfig
from matformer_dist.data.images.augmentation import Augmentation, random_box
from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.errors import UserError
from tests.unit.data.images.pictures import noise

PLAIN = Preprocessing(16, 3, (0.0,) * 3, (1.0,) * 3)


def augmentation(seed: int = 7, **keys: Any) -> Augmentation:
    return Augmentation(AugmentationConfig(**keys), PLAIN, seed)


def test_boxes_match_their_scale_and_ratio() -> None:
    areas, ratios = [], []
    for seed in range(500):
        left, top, right, bottom = random_box((300, 200), (0.1, 0.5), (0.5, 2.0), Random(seed))
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
        areas.append((right - left) * (bottom - top) / 60_000)
        ratios.append((right - left) / (bottom - top))
    assert 0.09 < min(areas) < 0.12 and 0.45 < max(areas) < 0.51
    assert np.mean(areas) == pytest.approx(0.3, abs=0.02)
    assert 0.49 < min(ratios) < 0.55 and 1.9 < max(ratios) < 2.03
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.1)


def test_boxes_of_images_that_none_fits_are_their_middle() -> None:
    for seed in range(5):
        assert random_box((100, 2), (0.9, 1.0), (3 / 4, 4 / 3), Random(seed)) == (48, 0, 51, 2)
        assert random_box((2, 100), (0.9, 1.0), (3 / 4, 4 / 3), Random(seed)) == (0, 48, 2, 51)
    assert random_box((1, 1), (0.05, 1.0), (3 / 4, 4 / 3), Random(0)) == (0, 0, 1, 1)


def test_draws_stay_what_they_are() -> None:
    """For all versions of Python; a run that goes on under another would see other pixels."""
    box = random_box((300, 200), (0.05, 1.0), (3 / 4, 4 / 3), Random("augmentation:7:3"))
    assert box == (102, 87, 180, 183)


@pytest.mark.parametrize("kind", ["none", "crop", "light1", "strong2"])
def test_augmentation_is_a_function_of_seed_and_sample(kind: str) -> None:
    image = noise(40, 30)
    keys: dict[str, Any] = {"kind": kind, "shift": 2, "rotate": 20.0}
    first = [augmentation(**keys)(image, sample) for sample in range(20)]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    again = augmentation(**keys)
    for sample in reversed(range(20)):
        assert torch.equal(again(image, sample), first[sample])
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert len({tensor.numpy().tobytes() for tensor in first}) == 20
    others = [augmentation(8, **keys)(image, sample) for sample in range(20)]
    assert not any(map(torch.equal, others, first))


def test_kind_none_leaves_images_as_validation_sees_them() -> None:
    image = noise(40, 30)
    for sample in range(3):
        assert torch.equal(augmentation()(image, sample), PLAIN(image))


def test_every_other_image_is_flipped() -> None:
    image = noise(16, 16)
    here = PLAIN(image)
    made = [augmentation(flip=True)(image, sample) for sample in range(400)]
    flipped = sum(torch.equal(one, here.flip(2)) for one in made)
    assert 150 < flipped < 250
    assert sum(torch.equal(one, here) for one in made) == 400 - flipped


def test_shifts_move_by_whole_pixels() -> None:
    image = noise(16, 16)
    here = PLAIN(image)
    seen = set()
    for sample in range(300):
        found = augmentation(shift=2)(image, sample)
        offsets = [
            (dx, dy)
            for dx in range(-2, 3)
            for dy in range(-2, 3)
            if torch.equal(found, moved(here, dx, dy))
        ]
        assert len(offsets) == 1
        seen.add(offsets[0])
    assert len(seen) == 25


def moved(image: torch.Tensor, dx: int, dy: int) -> torch.Tensor:
    """[C, H, W], black where nothing comes from."""
    out = torch.zeros_like(image)
    _, h, w = image.shape
    out[:, max(0, dy) : h + min(0, dy), max(0, dx) : w + min(0, dx)] = image[
        :, max(0, -dy) : h + min(0, -dy), max(0, -dx) : w + min(0, -dx)
    ]
    return out


def test_rotations_are_up_to_so_many_degrees() -> None:
    """By where a dot to the right of the middle comes to."""
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (14, 7, 16, 9))
    angles = []
    for sample in range(200):
        found = augmentation(rotate=30.0)(image, sample)[0]
        rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        y = ((found * rows).sum() / found.sum() - 7.5).item()
        x = ((found * columns).sum() / found.sum() - 7.5).item()
        angles.append(np.degrees(np.arctan2(y, x)))
    assert -33 < min(angles) < -25 and 25 < max(angles) < 33
    assert abs(np.mean(angles)) < 5


def test_a_shift_that_leaves_nothing_is_refused() -> None:
    augmentation(shift=15)
    with pytest.raises(UserError, match="shift 16 moves images of 16 pixels out of sight"):
        augmentation(shift=16)
