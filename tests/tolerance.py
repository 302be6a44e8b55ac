"""The one rule for comparing low-precision results (also of other GEMM orders in fp32).

An operator may be as wrong as twice the plain torch computation in the same dtype, both measured
against the truth in fp64 (or fp32), plus a floor for where the plain one happens to be exact.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of the truth; NaN if any is."""
    assert actual.shape == truth.shape, f"shapes {list(actual.shape)} and {list(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    difference = (actual.double() - truth.double()).abs().max()
    return (difference / truth.double().abs().max().clamp(min=1e-300)).item()


def assert_as_exact_as_plain(
    actual: Tensor, plain: Tensor, truth: Tensor, *, floor_eps: float = 1.0, what: str = ""
) -> None:
    """Error of `actual` at most twice that of `plain` plus `floor_eps` units of `actual`'s dtype.

    The dtypes of actual and plain must be equal: a result that comes back in fp32 where bf16 was
    asked for is not a better result.
    """
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, plain {plain.dtype}"
    allowed = 2 * relative_error(plain, truth) + floor_eps * torch.finfo(actual.dtype).eps
    error = relative_error(actual, truth)
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"
