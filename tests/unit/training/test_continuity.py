"""What is said of the loss behind a move to another layout."""

from __future__ import annotations

import math

import pytest

from matformer_dist.errors import UserError
from matformer_dist.training.continuity import compare
from tests.unit.checkpoints.test_store import manifest


@pytest.mark.parametrize(("precision", "near", "far"), [("fp32", 5e-6, 2e-5), ("bf16", 5e-3, 0.02)])
def test_a_loss_that_is_another_ends_the_run(precision: str, near: float, far: float) -> None:
    saved = manifest(3).model_copy(update={"precision": precision, "probe_loss": 4.0})
    assert compare(saved, 4.0 * (1 + near)).startswith("continuity XL's loss")
    for other in (4.0 * (1 + far), 4.0 * (1 - far), math.nan, math.inf):
        with pytest.raises(UserError, match=r"was 4\.000000 when .* ZeRO 0, and is .* Go on with"):
            compare(saved, other)


def test_without_a_loss_to_compare_with_it_says_so() -> None:
    assert "not checked" in compare(manifest(3), 4.0)
