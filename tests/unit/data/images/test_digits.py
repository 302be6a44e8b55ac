from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from matformer_dist.data.images.digits import DigitsSource
from matformer_dist.errors import UserError


@pytest.fixture(scope="module")
def train() -> DigitsSource:
    return DigitsSource("train")


@pytest.fixture(scope="module")
def validation() -> DigitsSource:
    return DigitsSource("validation")


def test_the_split_is_fixed_and_stratified(train: DigitsSource, validation: DigitsSource) -> None:
    assert (len(train), len(validation)) == (1442, 355)
    assert sorted([*train.samples, *validation.samples]) == list(range(1797))
    for label in range(10):
        held, all_of_it = (validation.labels == label).sum(), load_digits().target == label
        assert held == all_of_it.sum() // 5
    # Losses of runs can be compared as long as these stay.
    digests = [
        hashlib.sha256(source.labels.astype("<i8").tobytes()).hexdigest()[:16]
        for source in (train, validation)
    ]
    assert digests == ["9313721fa010b406", "ee6ec0ae7823271a"]


def test_pixels_match_scikit_learns(train: DigitsSource, validation: DigitsSource) -> None:
    digits = load_digits()
    for source in (train, validation):
        assert source.names == tuple("0123456789")
        for sample in (0, 7, len(source) - 1):
            number = source.samples[sample]
            assert source.labels[sample] == digits.target[number]
            grey = source.image(sample, 1)
            assert (grey.mode, grey.size) == ("L", (8, 8))
            expected = digits.images[number] / 16 * 255
            assert np.abs(np.asarray(grey) - expected).max() <= 0.5
            assert np.array_equal(np.asarray(source.image(sample, 3))[:, :, 2], np.asarray(grey))
    assert validation.where(0) == f"digits, number {validation.samples[0]}"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        UserError, match=r"digits need scikit-learn .*pip install 'matformer-dist\[vision\]'"
    ):
        DigitsSource("train")
