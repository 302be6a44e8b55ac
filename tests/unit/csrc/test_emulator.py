"""The emulator finds what it is there to find, and rounds as CUDA does."""

from __future__ import annotations

import pytest
import torch

from tests.unit.csrc.emulated import BACKWARD, FORWARD, Kernels

# Of bad_kernels.h, in its order.
NO_MISTAKE, MISSING_BARRIER, *DEADLY = range(11)
SAID = (
    "not all threads reach a barrier",
    "threads wait at different barriers",
    "the mask of a shuffle is not the lanes that take part",
    "a shuffle reads a lane that takes no part|the mask of a shuffle is not the lanes",
    "global-buffer-overflow",
    "heap-buffer-overflow",
    "stack-buffer-overflow",
    "misaligned address",
)
SHARED_UNWRITTEN = DEADLY.pop()
NEIGHBOURS = torch.arange(1, 65, dtype=torch.int32) % 64


def neighbours(kernels: Kernels, mistake: int, order: int) -> torch.Tensor:
    [out] = kernels.call("bad_kernel", mistake, torch.zeros(64, dtype=torch.int32), order=order)
    return out


@pytest.mark.parametrize("order", [FORWARD, BACKWARD, 2, 3])
def test_kernel_without_a_mistake(kernels: Kernels, order: int) -> None:
    assert neighbours(kernels, NO_MISTAKE, order).equal(NEIGHBOURS)


@pytest.mark.parametrize(("mistake", "said"), zip(DEADLY, SAID, strict=True))
def test_mistake_is_found(kernels: Kernels, mistake: int, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        neighbours(kernels, mistake, FORWARD)


def test_missing_barrier_gives_a_wrong_result(kernels: Kernels) -> None:
    results = [neighbours(kernels, MISSING_BARRIER, order) for order in (FORWARD, BACKWARD)]
    assert not all(result.equal(NEIGHBOURS) for result in results)


def test_no_block_sees_shared_memory_of_another(kernels: Kernels) -> None:
    """Not even the second of the two that this kernel has."""
    assert neighbours(kernels, SHARED_UNWRITTEN, FORWARD)[4] == -1


def test_narrow_floats_match_torch(kernels: Kernels) -> None:
    """All numbers of both formats, the middles between neighbours, and what lies next to those."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = []
    for dtype in (torch.bfloat16, torch.float16):
        exact = patterns.view(dtype).float()
        after = (patterns + 1).view(dtype).float()
        middle = (exact.double() + after.double()).div(2).float()
        lower, upper = (torch.nextafter(middle, middle.new_tensor(x)) for x in (-1e38, 1e38))
        values += [exact, middle, lower, upper]
    values.append(torch.tensor([65519.996, 65520.0, 3e38, 3.4e38, 1e-40, 2**-25, 2**-149]))
    given = torch.cat(values)
    empty = torch.empty_like(given)
    _, *rounded = kernels.call("round_floats", given, len(given), empty, empty, order=FORWARD)
    for actual, dtype in zip(rounded, (torch.bfloat16, torch.float16), strict=True):
        expected = given.to(dtype).float()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        assert actual.signbit().equal(expected.signbit()) or given.isnan().any()
