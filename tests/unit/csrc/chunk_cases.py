"""One chunk of the loss as the emulated kernels compute it, and as the reference does in fp64.

Legend: G rows of one token (row 0 the teacher), c tokens, V columns of the whole vocabulary, T
shards of it (emulated tensor-parallel ranks), tau temperature.

What fp32 may cost: u = 2^-24 is half a unit of fp32. Logits are at most 16 in size here, so a
difference of two (at most 32) is off by 32 u, and so is its exponential, relatively. A thread adds
up to 12 of those and rescales its sum when its maximum rises, a block merges 9 levels and 15 warps;
all in all a sum of exponentials is off by less than 32 + 3 * (12 + 9 + 15) < 200 u, relatively.
A log-sum is off by as much, plus a rounding of its own size (at most 24); a probability by that and
by the 40 u of its exponent. 512 u is above all of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matformer_dist.ops.head_chunk import chunk_gradient_, chunk_statistics, packed
from tests.unit.csrc.emulated import NUMBER_OF_DTYPE, Kernels

ROUNDING = 512 * 2.0**-24
IGNORED = -100


@dataclass(frozen=True)
class Case:
    """Arguments of the launchers."""

    groups: int = 3
    tau: float = 1.0
    distills: bool = True
    gradient: torch.dtype | None = torch.float32
    offset: int = 0  # global id of the whole vocabulary's first column
    order: int = 0


@dataclass
class Operands:
    """logits [G, c, V], targets (global ids), weights ce, z and kl [G, c]."""

    logits: Tensor
    targets: Tensor
    ce: Tensor
    z: Tensor
    kl: Tensor


@dataclass
class Outcome:
    """numbers [T, G, c, 7], results [4, G, c], best [G, c], gradient [G, c, V]."""

    numbers: Tensor
    results: Tensor
    best: Tensor
    gradient: Tensor


def draw(case: Case, vocab: int, dtype: torch.dtype, tokens: int = 2) -> Operands:
    """The first target is the first column, the last the last; some are ignored."""
    generator = torch.Generator().manual_seed(vocab)
    shape = case.groups, tokens
    logits = torch.randn(*shape, vocab, generator=generator).mul(4).clamp(-16, 16)
    targets = torch.randint(vocab, shape, generator=generator)
    flat = targets.view(-1)
    flat[0], flat[-1] = 0, vocab - 1
    flat += case.offset
    flat[1:-1:4] = IGNORED
    ce, z, kl = torch.rand(3, *shape, generator=generator)
    kl[-1, 0] = 0  # a row without a teacher among rows with one
    return Operands(logits.to(dtype), targets, ce, 0.01 * z, kl)


def emulate(
    kernels: Kernels, case: Case, given: Operands, shards: list[int] | None = None
) -> Outcome:
    """Both launchers, on each of the shards that `shards` columns of the vocabulary make."""
    sizes = shards or [given.logits.shape[-1]]
    parts = [part.contiguous() for part in given.logits.split(sizes, dim=-1)]
    if shards is None:
        parts = [given.logits]  # its address may be what is tested
    numbers, outcomes = [], []
    for part, offset in _with_offsets(case, parts):
        numbers.append(statistics(kernels, case, given, part, offset))
    ranks = torch.stack(numbers)
    for part, offset in _with_offsets(case, parts):
        outcomes.append(gradient(kernels, case, given, part, offset, ranks))
    results, best, _ = outcomes[0]
    for other_results, other_best, _ in outcomes[1:]:  # every rank says the same
        torch.testing.assert_close(other_results, results, rtol=0, atol=0, equal_nan=True)
        assert other_best.equal(best)
    return Outcome(ranks, results, best, torch.cat([d for _, _, d in outcomes], -1))


def statistics(
    kernels: Kernels, case: Case, given: Operands, logits: Tensor, offset: int
) -> Tensor:
    dtype, empty = NUMBER_OF_DTYPE[logits.dtype], torch.full((*given.targets.shape, 7), torch.nan)
    flags = case.tau, case.distills, True
    arrays = kernels.call(
        *("chunk_statistics", logits, dtype, given.targets, *logits.shape, offset, *flags),
        *(empty, None),
        order=case.order,
    )
    assert _bits(arrays[0]).equal(_bits(logits)) and arrays[1].equal(given.targets)
    return arrays[2]


def gradient(
    kernels: Kernels, case: Case, given: Operands, logits: Tensor, offset: int, ranks: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """results, best, and the gradient (logits where none is asked for)."""
    dtype, wanted = NUMBER_OF_DTYPE[logits.dtype], NUMBER_OF_DTYPE[case.gradient]
    shape, results = given.targets.shape, torch.full((4, *given.targets.shape), torch.nan)
    after, *unchanged, results, best = kernels.call(
        *("chunk_gradient", logits, dtype, given.targets, ranks, len(ranks)),
        *(given.ce, given.z, given.kl, *logits.shape, offset, IGNORED, case.tau, case.distills),
        *(wanted, results, torch.full(shape, -1), None),
        order=case.order,
    )
    inputs = (given.targets, ranks, given.ce, given.z, given.kl)
    assert all(_bits(a).equal(_bits(b)) for a, b in zip(unchanged, inputs, strict=True))
    d = packed(after, case.gradient or logits.dtype)
    written = d.shape[-1] * d.element_size()
    assert _bits(after)[..., written:].equal(_bits(logits)[..., written:])
    return results, best, d


def reference(case: Case, given: Operands) -> Outcome:
    """In fp64, the vocabulary whole. For -inf it takes a number that fp64 holds: its own rule for
    a teacher's logit of -inf would be 0 * inf."""
    logits = given.logits.double().clamp(min=-1e300)
    targets, offset, tau, distills = given.targets, case.offset, case.tau, case.distills
    ranks = chunk_statistics(logits, targets, offset, tau, distills, find_best=True)[None]
    weights = given.ce.double(), given.z.double(), given.kl.double()
    d = logits.clone()
    results, best = chunk_gradient_(
        d, targets, ranks, *weights, offset, IGNORED, tau, distills, torch.float64
    )
    return Outcome(ranks, results, best, given.logits.double() if case.gradient is None else d)


def assert_matches_reference(actual: Outcome, case: Case, given: Operands) -> None:
    expected = reference(case, given)
    z = given.logits.double().clamp(min=-1e300)
    p, warm = z.softmax(-1), (z / case.tau).softmax(-1)
    ce, weight, kl = given.ce.double(), given.z.double(), given.kl.double()
    _, nll, lse, _ = expected.results
    # Sizes of what is added up, which its errors are relative to.
    of_difference = (warm[0] * (z[0] - z).abs()).sum(-1) / case.tau
    of_kl = 2 + of_difference + lse.abs() + lse[0].abs()
    of_nll = 1 + lse.abs() + nll.abs().nan_to_num()
    of_loss = ce * of_nll + weight * lse.square() + kl * case.tau**2 * of_kl
    sizes = torch.stack((of_loss, of_nll, 1 + lse.abs(), of_kl))
    assert_close(actual.results, expected.results, ROUNDING * sizes)
    assert actual.best.equal(expected.best)
    if case.gradient is None:
        assert actual.gradient.equal(given.logits)
        return
    at_target = torch.arange(z.shape[-1]) == (given.targets - case.offset)[..., None]
    of_d = (ce + 2 * weight * lse.abs())[..., None] * p + ce[..., None] * at_target
    if case.distills:
        of_d += (kl * case.tau)[..., None] * (warm + warm[0])
    format_ = torch.finfo(case.gradient)
    of_storage = expected.gradient.abs() * format_.eps / 2 + format_.smallest_normal * format_.eps
    assert actual.gradient.dtype == case.gradient
    assert_close(actual.gradient, expected.gradient, ROUNDING * of_d + of_storage)


def assert_close(actual: Tensor, expected: Tensor, allowed: Tensor) -> None:
    """Within `allowed`; what is not finite must be the same."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    good = same | ((actual.double() - expected).abs() <= allowed)
    worst = ((actual.double() - expected).abs() / allowed).nan_to_num(torch.inf)[~good]
    where = (~good).nonzero()[:5].tolist()
    assert good.all(), f"{len(worst)} wrong, up to {worst.max():.3g} times the bound, at {where}"


def _with_offsets(case: Case, parts: list[Tensor]) -> list[tuple[Tensor, int]]:
    sizes = [part.shape[-1] for part in parts]
    return [(part, case.offset + sum(sizes[:i])) for i, part in enumerate(parts)]


def _bits(array: Tensor) -> Tensor:
    return array.contiguous().view(torch.uint8)
