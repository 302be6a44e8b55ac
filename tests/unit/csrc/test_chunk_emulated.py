"""The loss's CUDA kernels, run on a CPU, against the reference in fp64.

Legend: see chunk_cases.py. A tile of the gradient's kernel is 512 columns, or 2048 (fp32) or 4096
(bf16, fp16) where rows are 16-byte aligned; a narrower gradient has barriers at tiles 0, 1, 2, 4.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.unit.csrc.chunk_cases import (
    Case,
    assert_close,
    assert_matches_reference,
    draw,
    emulate,
    reference,
    statistics,
)
from tests.unit.csrc.emulated import BACKWARD, FORWARD, NUMBER_OF_DTYPE, Kernels

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)]
CASES = [
    Case(groups=3, tau=1.0, order=FORWARD),
    Case(groups=4, tau=2.0, order=BACKWARD),
    Case(groups=1, tau=1.0, distills=False, order=5),
]


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 31, 33, 127, 512, 513, 2056, 4104, 5001])
@pytest.mark.parametrize(("dtype", "gradient"), DTYPES)
def test_chunk_matches_reference(
    kernels: Kernels, dtype: torch.dtype, gradient: torch.dtype, vocab: int
) -> None:
    for case in CASES:
        case = dataclasses.replace(case, gradient=gradient)
        given = draw(case, vocab, dtype)
        assert_matches_reference(emulate(kernels, case, given), case, given)


@pytest.mark.parametrize("order", [FORWARD, BACKWARD, 2])
@pytest.mark.parametrize("vocab", [2049, 4 * 2048 + 8, 5 * 2048 + 4])
def test_packing_overtakes_no_reader(kernels: Kernels, vocab: int, order: int) -> None:
    """One token, many tiles."""
    case = Case(groups=2, gradient=BF16, order=order)
    given = draw(case, vocab, F32, tokens=1)
    given.targets.fill_(vocab - 1)
    assert_matches_reference(emulate(kernels, case, given), case, given)


@pytest.mark.parametrize("shards", [[6, 5], [1000, 1001], [2048, 3], [11, 0], [3, 4, 5]])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_shards_of_vocabulary_match_the_whole(
    kernels: Kernels, shards: list[int], tau: float
) -> None:
    for dtype, gradient in ((F32, BF16), (BF16, BF16)):
        case = Case(tau=tau, gradient=gradient)
        given = draw(case, sum(shards), dtype)
        assert_matches_reference(emulate(kernels, case, given, shards), case, given)


@pytest.mark.parametrize("find_best_of", ["all", "equals"])
def test_numbers_match_reference(kernels: Kernels, find_best_of: str) -> None:
    """Ids above 2^24, and the lowest of equals."""
    case = Case(groups=2, tau=2.0, offset=(1 << 24) + 1)
    given = draw(case, 1031, F32)
    if find_best_of == "equals":
        given.logits.round_().clamp_(max=3)
    actual = statistics(kernels, case, given, given.logits, case.offset)
    [expected] = reference(case, given).numbers
    top = given.logits.max(-1, keepdim=True).values
    best = case.offset + (given.logits == top).int().argmax(-1)
    ids = torch.stack((best // (1 << 20), best % (1 << 20)), -1)
    assert actual[..., 5:].long().equal(ids)
    assert actual[..., [0, 3]].equal(expected[..., [0, 3]].float())  # top, target
    share = ((given.logits[0] - top[0]).double() / case.tau).exp()
    of_difference = (share * (given.logits[0] - given.logits).double().abs()).sum(-1) / case.tau
    sizes = torch.stack((expected[..., 1], expected[..., 2], of_difference), -1)
    assert_close(actual[..., [1, 2, 4]], expected[..., [1, 2, 4]], 512 * 2.0**-24 * sizes)


def test_first_rank_of_equals_has_the_best_id(kernels: Kernels) -> None:
    """The lowest of equals, on one rank and on both; ids beyond what a float tells apart."""
    case = Case(groups=2, distills=False, gradient=None, offset=(1 << 33) + 1)
    given = draw(case, 8, F32, tokens=2)
    given.logits[:, :, 1] = 16
    given.logits[0, 0, 5] = 16  # still column 1
    given.logits[0, 1, 5] = 17  # column 5
    given.targets.fill_(case.offset)
    best = emulate(kernels, case, given, [4, 4]).best
    assert (best - case.offset).tolist() == [[1, 5], [1, 1]]


@pytest.mark.parametrize("shards", [[9], [5, 4]])
@pytest.mark.parametrize("target", [-1, 9, 1 << 40])
def test_target_that_nobody_owns_makes_nan(
    kernels: Kernels, shards: list[int], target: int
) -> None:
    case = Case(gradient=BF16)
    given = draw(case, 9, F32)
    given.targets[1, 1] = target
    actual = emulate(kernels, case, given, shards)
    assert_matches_reference(actual, case, given)
    is_nan = torch.zeros_like(actual.best, dtype=torch.bool)
    is_nan[1, 1] = True
    assert actual.results[0].isnan().equal(is_nan)
    assert actual.gradient.isnan().all(-1).equal(is_nan)
    assert actual.gradient.isnan().any(-1).equal(is_nan)


@pytest.mark.parametrize("gradient", [F32, BF16])
def test_ignored_rows_get_nothing(kernels: Kernels, gradient: torch.dtype) -> None:
    case = Case(gradient=gradient)
    given = draw(case, 600, F32)
    given.targets.fill_(-100)
    actual = emulate(kernels, case, given)
    assert_matches_reference(actual, case, given)
    assert not actual.gradient.any()
    assert not actual.results[[0, 1, 3]].any() and actual.results[2].all()


@pytest.mark.parametrize("shards", [[2056], [999, 1057]])
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(("dtype", "gradient"), DTYPES)
def test_student_equal_to_teacher_has_no_kl(
    kernels: Kernels, dtype: torch.dtype, gradient: torch.dtype, tau: float, shards: list[int]
) -> None:
    case = Case(groups=2, tau=tau, gradient=gradient)
    given = draw(case, 2056, dtype, tokens=1)
    given.logits[1] = given.logits[0]
    given.targets.fill_(7)
    given.ce.zero_()
    given.z.zero_()
    given.kl.fill_(1)
    actual = emulate(kernels, case, given, shards)
    assert not actual.gradient.any()
    assert not actual.results[[0, 3]].any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_no_gradient_leaves_logits(kernels: Kernels, dtype: torch.dtype) -> None:
    case = Case(gradient=None)
    given = draw(case, 33, dtype)
    assert_matches_reference(emulate(kernels, case, given), case, given)


@pytest.mark.parametrize("shards", [[2056], [1030, 1026]])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_logits_of_minus_infinity_count_for_nothing(
    kernels: Kernels, tau: float, shards: list[int]
) -> None:
    """Of all rows: most columns, whole threads' and warps' among them, and all of a shard's."""
    case = Case(tau=tau, gradient=BF16)
    given = draw(case, 2056, F32)
    given.logits[..., 7:] = -torch.inf
    given.logits[..., 1028] = 3
    if len(shards) > 1:
        given.logits[..., shards[0] :] = -torch.inf
    given.targets = torch.where(given.targets == -100, -100, 3)
    actual = emulate(kernels, case, given, shards)
    assert_matches_reference(actual, case, given)
    assert not actual.gradient[given.logits == -torch.inf].any()


def test_nan_reaches_its_row_alone(kernels: Kernels) -> None:
    case = Case(distills=False)
    given = draw(case, 700, F32)
    given.targets.fill_(3)
    given.logits[1, 1, 650] = torch.nan
    actual = emulate(kernels, case, given, [350, 350])
    is_nan = torch.zeros_like(actual.best, dtype=torch.bool)
    is_nan[1, 1] = True
    for found in (actual.results[0], actual.results[2], actual.gradient[..., 0]):
        assert found.isnan().equal(is_nan)


@pytest.mark.parametrize(("dtype", "gradient"), DTYPES)
@pytest.mark.parametrize("off", [1, 3])
def test_logits_off_an_aligned_address(
    kernels: Kernels, dtype: torch.dtype, gradient: torch.dtype, off: int
) -> None:
    """As a view into a larger tensor has them, at a V that would otherwise be read in vectors."""
    case = Case(gradient=gradient)
    given = draw(case, 520, dtype)
    buffer = torch.empty(given.logits.numel() + off, dtype=dtype)
    given.logits = buffer[off:].view_as(given.logits).copy_(given.logits)
    assert given.logits.data_ptr() % 16
    assert_matches_reference(emulate(kernels, case, given), case, given)


def test_what_cannot_be_done_is_an_error(kernels: Kernels) -> None:
    """A gradient wider than its logits; a number of no dtype; more shared memory than there is."""
    for groups, dtype, gradient, expected in (
        (2, BF16, NUMBER_OF_DTYPE[F32], 1),
        (2, F16, NUMBER_OF_DTYPE[BF16], 1),
        (2, F32, 7, 1),
        (2000, F32, NUMBER_OF_DTYPE[F32], 1),
    ):
        logits, zeros = torch.zeros(groups, 1, 4, dtype=dtype), torch.zeros(groups, 1)
        error, arrays = kernels.call_for_error(
            *("chunk_gradient", logits, NUMBER_OF_DTYPE[dtype], torch.zeros(groups, 1).long()),
            *(torch.zeros(1, groups, 1, 7), 1, zeros, zeros, zeros, groups, 1, 4, 0, -100, 1.0),
            *(True, gradient, torch.zeros(4, groups, 1), torch.zeros(groups, 1).long(), None),
            order=FORWARD,
        )
        assert error == expected
        assert not any(array.any() for array in arrays)
