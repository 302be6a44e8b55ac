from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from matformer_dist.data.images import rand_augment as module
from matformer_dist.data.images.rand_augment import OPERATIONS, rand_augment
from tests.unit.data.images.pictures import noise

WITHOUT_MAGNITUDE = {"autocontrast", "equalize", "invert"}
Pixels = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def pixels(image: Image.Image) -> Pixels:
    return np.asarray(image).astype(np.int64)


def both_signs(name: str, image: Image.Image, strength: float) -> list[Pixels]:
    """What the operation makes of it, with the value and with its negative."""
    return [pixels(OPERATIONS[name](image, strength, Random(seed))) for seed in SIGNS]


SIGNS = [
    next(seed for seed in range(99) if Random(seed).random() < 0.5),
    next(seed for seed in range(99) if Random(seed).random() >= 0.5),
]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - WITHOUT_MAGNITUDE))
def test_nothing_happens_at_magnitude_0(name: str, mode: str) -> None:
    image = noise(24, 16, mode)
    for found in both_signs(name, image, 0.0):
        assert np.array_equal(found, pixels(image))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (224, 160)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_size_and_mode_are_kept(name: str, size: tuple[int, int], mode: str) -> None:
    image = noise(*size, mode)
    before = pixels(image)
    for strength in (0.0, 1.0, 3.0):
        found = OPERATIONS[name](image, strength, Random(3))
        assert (found.size, found.mode) == (size, mode)
    assert np.array_equal(pixels(image), before)  # not changed in its place


def test_levels_match_their_formulas() -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    values = pixels(ramp)

    def made(name: str, strength: float) -> Pixels:
        return pixels(OPERATIONS[name](ramp, strength, Random(0)))

    assert np.array_equal(made("invert", 0), 255 - values)
    for strength, bits in ((0.5, 6), (1.0, 4), (1.5, 2), (3.0, 1)):
        assert np.array_equal(made("posterize", strength), values >> (8 - bits) << (8 - bits))
    for strength, threshold in ((0.25, 192), (0.5, 128), (1.0, 0), (3.0, 0)):
        expected = np.where(values < threshold, values, 255 - values)
        assert np.array_equal(made("solarize", strength), expected)
    for strength, added in ((0.5, 55), (1.5, 165)):
        expected = np.where(values < 128, np.minimum(255, values + added), values)
        assert np.array_equal(made("solarize_add", strength), expected)


def test_contrast_is_spread_over_all_levels() -> None:
    image = Image.fromarray(np.array([[60, 70, 160, 160]], np.uint8))
    found = pixels(OPERATIONS["autocontrast"](image, 1.0, Random(0)))
    assert np.abs(found - [[0, 25.5, 255, 255]]).max() <= 1
    many = Image.fromarray((np.arange(4096) // 64 + 50).astype(np.uint8).reshape(64, 64))
    levels = np.unique(pixels(OPERATIONS["equalize"](many, 1.0, Random(0))))
    assert levels.min() < 5 and levels.max() > 250
    assert np.ptp(np.diff(levels)) <= 2  # evenly


def test_enhancements_match_their_formulas() -> None:
    """factor x image + (1 - factor) x what is left at 0; 1 +- 0.9 of the strength, from 0.1."""
    image = noise(24, 16)
    here = pixels(image)
    grey = pixels(image.convert("L"))
    mean = int(grey.mean() + 0.5)
    without = {
        "brightness": np.zeros_like(here),
        "color": grey[:, :, None].repeat(3, 2),
        "contrast": np.full_like(here, mean),
    }
    for name, left in without.items():
        for strength, factors in ((0.5, (1.45, 0.55)), (2.0, (2.8, 0.1))):
            for found, factor in zip(both_signs(name, image, strength), factors, strict=True):
                expected = np.clip(factor * here + (1 - factor) * left, 0, 255)
                assert np.abs(found - expected).max() <= 1 + abs(factor)
    edges = [np.abs(np.diff(found)).sum() for found in both_signs("sharpness", image, 1.0)]
    assert edges[0] > np.abs(np.diff(here)).sum() > edges[1]


def test_rotation_matches_turning_by_right_angles() -> None:
    image = noise(16, 16)
    left, right = both_signs("rotate", image, 3.0)
    assert np.array_equal(left, np.rot90(pixels(image)))
    assert np.array_equal(right, np.rot90(pixels(image), -1))
    turned = both_signs("rotate", Image.new("RGB", (32, 32)), 1.5)[0]
    assert (turned[0, 0] == 128).all() and (turned[16, 16] == 0).all()


def test_translations_move_by_pixels_of_224() -> None:
    image = noise(224, 224)
    here = pixels(image)
    for axis, name in ((1, "translate_x"), (0, "translate_y")):
        for found, sign in zip(both_signs(name, image, 0.1), (-1, 1), strict=True):
            expected = np.roll(here, 10 * sign, axis)
            gap = slice(0, 10) if sign > 0 else slice(214, 224)
            expected[(slice(None), gap) if axis else gap] = 128
            assert np.array_equal(found, expected)
        far = both_signs(name, image, 3.0)[0]
        assert 0.05 < (far != 128).mean() < 0.15  # a tenth remains


def test_shears_turn_about_the_middle() -> None:
    image = Image.new("L", (33, 33))
    image.paste(255, (16, 0, 17, 33))  # a line from top to bottom
    for found, sign in zip(both_signs("shear_x", image, 1.0), (1, -1), strict=True):
        at = [int((row == 255 - abs(row - 255).min()).argmax()) for row in found]
        assert at[16] == 16
        assert (at[6] - 16) * sign == 3 and (at[26] - 16) * sign == -3
    image = image.transpose(Image.Transpose.TRANSPOSE)
    for found, sign in zip(both_signs("shear_y", image, 1.0), (1, -1), strict=True):
        assert (int(found[:, 6].argmax()) - 16) * sign == 3
        assert (int(found[:, 26].argmax()) - 16) * sign == -3


def test_cutout_is_a_grey_square() -> None:
    image = Image.new("RGB", (224, 160), (255, 0, 0))
    boxes = []
    for seed in range(200):
        found = pixels(OPERATIONS["cutout"](image, 1.0, Random(seed)))
        grey = (found == 128).all(2)
        rows, columns = np.flatnonzero(grey.any(1)), np.flatnonzero(grey.any(0))
        assert grey.sum() == len(rows) * len(columns) > 0  # a rectangle
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    left, top, right, bottom = np.array(boxes).T
    side = round(160 * 80 / 224)
    inside = (left > 0) & (right < 224) & (top > 0) & (bottom < 160)
    assert (right - left).max() == (bottom - top).max() == side
    assert ((right - left == side) & (bottom - top == side))[inside].all()
    for cut in (left == 0, right == 224, top == 0, bottom == 160):  # by each edge, some to half
        assert 0.05 < cut.mean() < 0.35
    assert side // 2 <= (right - left).min() < 0.6 * side


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_operations_are_drawn_evenly(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: Counter[str] = Counter()

    def counting(name: str) -> Any:
        def count(image: Image.Image, strength: float, _: Random) -> Image.Image:
            assert strength == 1.5
            drawn[name] += 1
            return image

        return count

    monkeypatch.setattr(module, "OPERATIONS", {name: counting(name) for name in OPERATIONS})
    for seed in range(1600):
        rand_augment(noise(4, 4), layers, 15, Random(seed))
    assert drawn.total() == 1600 * layers
    if layers:  # 100 x layers each, give or take 5 standard deviations
        spread = 5 * (100 * layers) ** 0.5
        assert len(drawn) == 16
        assert all(abs(count - 100 * layers) < spread for count in drawn.values())
