from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from matformer_dist.config_images import ImageDataConfig
from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.errors import UserError
from tests.unit.data.images.pictures import noise

SIZES = [(64, 48), (48, 64), (33, 57), (16, 16), (100, 17), (7, 5)]


def whole_then_crop(image: Image.Image, size: int, crop_pct: float) -> Image.Image:
    """As torchvision's Resize(int) and CenterCrop do it: all is resized, then cut."""
    width, height = image.size
    shorter = int(size / crop_pct)
    if width <= height:
        scaled = (shorter, int(shorter * height / width))
    else:
        scaled = (int(shorter * width / height), shorter)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2.0), round((scaled[1] - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("size", "crop_pct"), [(16, 1.0), (16, 0.875), (15, 0.9), (40, 0.5)])
def test_pixels_match_resizing_the_whole(
    shape: tuple[int, int], size: int, crop_pct: float
) -> None:
    """But for what Pillow rounds, between its two passes too: two levels of 255.

    Pixels that came from half a pixel further would differ by 15 on average.
    """
    image = noise(*shape)
    preprocessing = Preprocessing(size, 3, (0.0,) * 3, (1.0,) * 3, crop_pct)
    expected = np.asarray(whole_then_crop(image, size, crop_pct)).astype(np.float64)
    found = preprocessing(image).permute(1, 2, 0).double().numpy() * 255
    assert np.abs(found - expected).max() <= 2.001
    assert np.abs(found - expected).mean() < 0.3


@pytest.mark.parametrize("channels", [1, 3])
def test_values_match_the_formula(channels: int) -> None:
    config = ImageDataConfig(
        train="digits", mean=[0.1, 0.2, 0.3][:channels], std=[0.5, 0.6, 2][:channels]
    )
    image = noise(12, 12, {1: "L", 3: "RGB"}[channels])
    found = Preprocessing.of(config, 12, channels)(image)
    assert found.shape == (channels, 12, 12) and found.dtype == torch.float32
    assert found.is_contiguous()
    pixels = np.asarray(image).reshape(12, 12, channels)
    for channel in range(channels):
        expected = (pixels[:, :, channel] / 255 - [0.1, 0.2, 0.3][channel]) / [0.5, 0.6, 2][channel]
        np.testing.assert_allclose(found[channel], expected, atol=1e-6)


def test_mean_and_std_default_by_the_channels() -> None:
    config = ImageDataConfig(train="digits")
    colour, grey = (Preprocessing.of(config, 8, channels) for channels in (3, 1))
    assert (colour.mean, colour.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (grey.mean, grey.std) == ((0.5,), (0.5,))


def test_any_mode_is_taken() -> None:
    image = noise(12, 12)
    grey = Preprocessing(12, 1, (0.5,), (0.5,))
    assert torch.equal(grey(image), grey(image.convert("L")))
    with pytest.raises(UserError, match=r"cannot use an image of mode F: .* unknown scale"):
        grey(Image.new("F", (12, 12)))


def test_an_image_of_one_line_fits_in_memory() -> None:
    """Resized as a whole, it would be of 10^9 pixels."""
    line = Preprocessing(224, 3, (0.0,) * 3, (1.0,) * 3)(
        Image.new("RGB", (1, 20_000), (255, 0, 51))
    )
    assert line.shape == (3, 224, 224)
    assert line[:, 100, 100].tolist() == pytest.approx([1.0, 0.0, 0.2])


def test_settings_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(UserError, match=r"1 channel \(grey\) or 3 \(RGB\), not 4"):
        Preprocessing.of(ImageDataConfig(train="digits"), 8, 4)
    config = ImageDataConfig(train="digits", mean=[0.5])
    with pytest.raises(UserError, match=r"data.mean has 1 values, \[0.5\], .* have 3 channels"):
        Preprocessing.of(config, 8, 3)
    with pytest.raises(UserError, match=r"data.mean has 0 values, \[\], .* have 1 channels"):
        Preprocessing.of(ImageDataConfig(train="digits", mean=[]), 8, 1)
    config = ImageDataConfig(train="digits", std=[0.5, 0.5, 0.5])
    with pytest.raises(UserError, match=r"data.std has 3 values.* have 1 channels"):
        Preprocessing.of(config, 8, 1)


def test_exports_are_told_all_of_it() -> None:
    config = ImageDataConfig(train="digits", crop_pct=0.875)
    assert Preprocessing.of(config, 224, 3).to_dict() == {
        "image_size": 224,
        "channels": 3,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop_pct": 0.875,
        "interpolation": "bicubic",
    }
