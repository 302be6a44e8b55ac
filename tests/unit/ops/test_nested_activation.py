"""The nested activation, plain and compiled, against autograd in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from matformer_dist.ops.native import Implementation
from matformer_dist.ops.nested_activation import activate, activate_backward
from tests.tolerance import assert_as_exact_as_plain
from tests.unit.ops.loss_problems import NATIVE

IMPLEMENTATIONS = pytest.mark.parametrize(
    "impl", ["reference", pytest.param("native", marks=NATIVE)]
)
PRE_ACTIVATIONS = pytest.mark.parametrize("k", [1, 2], ids=["gelu", "swiglu"])
# name: (rows, widths). 8192 neurons are one task of a CPU; a vector has 4 to 16 of them.
SEGMENTS = {
    "one neuron": ((1,), (1,)),
    "odd": ((3, 0, 5, 1), (37, 16, 9, 1)),
    "several tasks": ((70, 40, 3), (300, 257, 8)),
    "wider than a task": ((3, 2), (9001, 40)),
    "any order": ((2, 3, 4), (3, 17, 5)),
    "nothing": ((), ()),
    "no rows": ((0, 0), (8, 4)),
}


def definition(h: Tensor) -> Tensor:
    return F.gelu(h[:, 0]) if h.shape[1] == 1 else F.silu(h[:, 0]) * h[:, 1]


def pre_activations(neurons: int, k: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(neurons, k, generator=generator) * 3).to(dtype)


def gradient(h: Tensor, d_act: Tensor) -> tuple[Tensor, Tensor]:
    """act and d_h by the definition, in the dtype of h."""
    h = h.detach().requires_grad_()
    act = definition(h)
    return act.detach(), torch.autograd.grad(act, h, d_act)[0]


def parts(strided: Tensor, rows: tuple[int, ...], widths: tuple[int, ...], k: int) -> Tensor:
    """What lies within the segments of [R, k*W], one after another as in a ragged buffer."""
    cut = zip(strided.split(list(rows)), widths, strict=True)
    return torch.cat([strided.new_empty(0), *(part[:, : k * m].flatten() for part, m in cut)])


@IMPLEMENTATIONS
@PRE_ACTIVATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "widths"), SEGMENTS.values(), ids=SEGMENTS.keys())
def test_activation_and_gradient_match_autograd(
    rows: tuple[int, ...], widths: tuple[int, ...], dtype: torch.dtype, k: int, impl: Implementation
) -> None:
    neurons = sum(r * m for r, m in zip(rows, widths, strict=True))
    h, d_act = pre_activations(neurons, k, dtype), pre_activations(neurons, 1, dtype)[:, 0] / 3
    plain = gradient(h, d_act)
    truth = gradient(h.double(), d_act.double())
    assert_as_exact_as_plain(activate(h, impl), plain[0], truth[0], what="act")
    act, d_h = activate_backward(h, d_act, rows, widths, wants_act=True, impl=impl)
    widest = max(widths, default=0)
    assert act.shape == (sum(rows), widest) and d_h.shape == (sum(rows), k * widest)
    assert_as_exact_as_plain(parts(act, rows, widths, 1), plain[0], truth[0], what="act again")
    d_h_parts = parts(d_h, rows, widths, k).view(-1, k)
    assert_as_exact_as_plain(d_h_parts, plain[1], truth[1], what="d_h", floor_eps=2)


@IMPLEMENTATIONS
@PRE_ACTIVATIONS
def test_extreme_values_saturate_as_torchs_do(k: int, impl: Implementation) -> None:
    gate = torch.tensor([-1e30, -200.0, -90, -20, -1e-30, 0, 1e-30, 20, 90, 200, 1e30, torch.nan])
    h = gate.repeat_interleave(k).view(-1, k).contiguous()
    h[:, -1] = h[:, -1].clamp(-1e4, 1e4) if k == 2 else h[:, -1]
    rows, widths = (1,), (len(h),)
    expected = gradient(h.double(), torch.ones(len(h), dtype=torch.float64))
    act, d_h = activate_backward(h, torch.ones(len(h)), rows, widths, True, impl)
    for actual, value in ((act[0], expected[0]), (d_h.view(-1, k), expected[1])):
        torch.testing.assert_close(actual.double(), value, rtol=2e-6, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(activate(h, impl), act[0], rtol=0, atol=0, equal_nan=True)


@IMPLEMENTATIONS
@PRE_ACTIVATIONS
def test_what_is_not_asked_for_is_not_made(k: int, impl: Implementation) -> None:
    rows, widths = (3, 2), (5, 2)
    h, d_act = pre_activations(19, k, torch.float32), torch.ones(19)
    both = activate_backward(h, d_act, rows, widths, wants_act=True, impl=impl)
    for d, wants_act in itertools.product((d_act, None), (True, False)):
        act, d_h = activate_backward(h, d, rows, widths, wants_act=wants_act, impl=impl)
        assert len(act) == 5 * wants_act and len(d_h) == (0 if d is None else 5)
        if wants_act:
            assert torch.equal(parts(act, rows, widths, 1), parts(both[0], rows, widths, 1))
        if d is not None:
            assert torch.equal(parts(d_h, rows, widths, k), parts(both[1], rows, widths, k))


@IMPLEMENTATIONS
def test_nothing_right_of_a_narrow_segment_is_written(impl: Implementation) -> None:
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    try:
        h, d_act = pre_activations(14, 2, torch.float32), torch.ones(14)
        act, d_h = activate_backward(h, d_act, (2, 2), (5, 2), wants_act=True, impl=impl)
    finally:
        torch.use_deterministic_algorithms(False)
    if impl == "reference":  # torch fills what torch makes, and not what a library makes
        assert act[2:, 2:].isnan().all() and d_h[2:, 4:].isnan().all()
    assert act[:2].isfinite().all() and d_h[:2].isfinite().all()
    assert act[2:, :2].isfinite().all() and d_h[2:, :4].isfinite().all()
