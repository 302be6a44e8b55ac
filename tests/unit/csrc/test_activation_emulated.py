"""The nested activation's CUDA kernels, run on a CPU, against the reference in fp64.

Legend: segment i has rows[i] rows of widths[i] neurons; k = 2 values a neuron for SwiGLU, 1 for
GELU; N neurons in all, R rows, W the widest segment.

Bounds, with u = 2^-24: act and its gradient are products and quotients of a few factors, each
rounded once. 16 u of what is added up covers them, and where an exponential or erfc of x^2 takes
part, 16 u (1 + x^2), for its argument is rounded too. The reference has an error too: it takes
GELU from 1 + erf(x), whose rounding to fp64 is all that is left of it far below 0.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from matformer_dist.ops.nested_activation import activate, activate_backward
from tests.unit.csrc.chunk_cases import assert_close
from tests.unit.csrc.emulated import BACKWARD, FORWARD, NUMBER_OF_DTYPE, Kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = 16 * 2.0**-24
OF_REFERENCE = 2.0**-51
MANY = 130  # segments: three launches of 64 at most
SEGMENTS = {
    "one": ([3], [5]),
    "one neuron": ([1], [1]),
    "odd": ([3, 0, 2, 1, 0], [5, 9, 1, 3, 2]),
    "aligned": ([3, 2, 4], [8, 16, 40]),
    "wider than a block": ([2, 3], [2 * 2048 + 8, 1032]),
    "odd and wider than a block": ([2, 1], [513, 600]),
    "nothing first": ([0, 0, 2], [8, 0, 16]),
    "no width": ([3, 2], [0, 8]),
    "no rows": ([0, 0], [8, 16]),
    "none": ([], []),
    "many": ([i % 3 for i in range(MANY)], [8 * (i % 5 + 1) for i in range(MANY)]),
    "many odd": ([i % 4 for i in range(MANY)], [i % 7 + 1 for i in range(MANY)]),
    "many, an empty launch": ([2] * 64 + [0] * 64 + [1, 2], [3] * MANY),
    "narrow, several rows a block": ([100, 37], [24, 9]),
}


def draw(n: int, k: int, dtype: torch.dtype, off: int = 0) -> tuple[Tensor, Tensor]:
    """h [N, k] and d_act [N], `off` values from an aligned address."""
    generator = torch.Generator().manual_seed(n)
    flat = torch.randn(off + n * k, generator=generator).mul(3)
    flat[off::7] *= 4
    flat[off::101] = 100.0
    flat[off + 1 :: 103] = -100.0
    d_act = torch.randn(off + n, generator=generator)
    return flat.to(dtype)[off:].view(n, k), d_act.to(dtype)[off:]


def allowed_act(h: Tensor) -> Tensor:
    x = h[:, 0]
    if h.shape[1] == 2:
        return ROUNDING * (x * x.sigmoid() * h[:, 1]).abs()
    return ROUNDING * (1 + x.square()) * (x * normal_cdf(x)).abs() + OF_REFERENCE * x.abs()


def allowed_d_h(h: Tensor, d_act: Tensor) -> Tensor:
    x, d = h[:, 0], d_act.abs()
    if h.shape[1] == 2:
        s = x.sigmoid()
        d_gate = d * h[:, 1].abs() * (s + x.abs() * s * (1 - s + 2.0**-24))
        return ROUNDING * torch.stack((d_gate, d * x.abs() * s), 1)
    density = x.square().div(-2).exp() / math.sqrt(2 * math.pi)
    size = normal_cdf(x) + x.abs() * density
    return (d * (ROUNDING * (1 + x.square()) * size + OF_REFERENCE))[:, None]


def normal_cdf(x: Tensor) -> Tensor:
    return torch.special.erfc(x / -math.sqrt(2)) / 2


def of_storage(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit of `dtype`, and what is too small for it or for fp32."""
    limits = torch.finfo(dtype)
    smallest = max(
        limits.smallest_normal * limits.eps, 2 * torch.finfo(torch.float32).smallest_normal
    )
    return truth.abs() * limits.eps / 2 + smallest


def spread(ragged: Tensor, rows: list[int], widths: list[int], fill: float) -> Tensor:
    """ragged [N, k] -> [R, k W], `fill` where a row is narrower."""
    k, widest = ragged.shape[1], max(widths, default=0)
    out = torch.full((sum(rows), k * widest), fill, dtype=ragged.dtype)
    start = offset = 0
    for count, width in zip(rows, widths, strict=True):
        part = ragged[offset : offset + count * width]
        out[start : start + count, : k * width] = part.reshape(count, k * width)
        start, offset = start + count, offset + count * width
    return out


@pytest.mark.parametrize("off", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 255, 4096, 2051])
def test_forward_matches_reference(
    kernels: Kernels, n: int, k: int, dtype: torch.dtype, off: int
) -> None:
    h, act = draw(n, k, dtype, off)
    after, actual, *_ = kernels.call(
        *("nested_activation", h, NUMBER_OF_DTYPE[dtype], n, k, torch.full_like(act, torch.nan)),
        *(None,),
        order=FORWARD,
    )
    assert after.equal(h)
    expected = activate(h.double(), "reference")
    assert_close(actual, expected, allowed_act(h.double()) + of_storage(expected, dtype))


@pytest.mark.parametrize("wanted", ["both", "act", "d_h"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_backward_matches_reference(
    kernels: Kernels, segments: str, k: int, dtype: torch.dtype, wanted: str
) -> None:
    check_backward(kernels, *SEGMENTS[segments], k, dtype, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("off", [1, 2, 3])
def test_backward_of_operands_off_an_aligned_address(
    kernels: Kernels, k: int, dtype: torch.dtype, off: int
) -> None:
    """As views into larger tensors have them, at widths that would otherwise be read in vectors."""
    check_backward(kernels, [2, 3], [16, 8], k, dtype, "both", off)


def check_backward(
    kernels: Kernels,
    rows: list[int],
    widths: list[int],
    k: int,
    dtype: torch.dtype,
    wanted: str,
    off: int = 0,
) -> None:
    n = sum(count * width for count, width in zip(rows, widths, strict=True))
    n_rows, widest = sum(rows), max(widths, default=0)
    h, d_act = draw(n, k, dtype, off)
    nothing = torch.full((n_rows, widest), torch.nan, dtype=dtype)
    given = (
        *(h, None if wanted == "act" else d_act, NUMBER_OF_DTYPE[dtype], k),
        *(torch.tensor(rows).long(), torch.tensor(widths).long(), len(rows), widest),
        None if wanted == "d_h" else nothing,
        None if wanted == "act" else nothing.repeat(1, k),
        None,
    )
    arrays = kernels.call(
        "nested_activation_backward", *given, order=BACKWARD if n % 2 else FORWARD
    )
    assert arrays[0].equal(h)
    wide_h, wide_d = h.double(), d_act.double()
    whole = activate_backward(wide_h, wide_d, rows, widths, True, "reference")
    here = spread(torch.ones(n, 1), rows, widths, 0).bool()
    bounds = allowed_act(wide_h)[:, None], allowed_d_h(wide_h, wide_d)
    names = ["act", "d_h"] if wanted == "both" else [wanted]
    made = dict(zip(names, arrays[-len(names) :], strict=True))
    for name, expected, bound in zip(("act", "d_h"), whole, bounds, strict=True):
        if name not in made:
            continue
        written = here if name == "act" else here.repeat_interleave(k, 1)
        assert made[name][~written].isnan().all()
        allowed = spread(bound, rows, widths, 0) + of_storage(expected, dtype)
        assert_close(made[name][written], expected[written], allowed[written])


@pytest.mark.parametrize(("dtype", "k"), [(3, 1), (0, 3), (-1, 2), (0, 0)])
def test_what_cannot_be_done_is_an_error(kernels: Kernels, dtype: int, k: int) -> None:
    ones, one = torch.ones(4), torch.ones(1).long()
    error, _ = kernels.call_for_error(
        "nested_activation", ones, dtype, 4, k, ones, None, order=FORWARD
    )
    backward_error, _ = kernels.call_for_error(
        *("nested_activation_backward", ones, ones, dtype, k, one, 4 * one, 1, 4, ones, ones, None),
        order=FORWARD,
    )
    assert error == backward_error == 1
