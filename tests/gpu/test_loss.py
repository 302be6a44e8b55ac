"""multi_granularity_loss on a GPU against its definition in fp64, and what it promises there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.gpu.device import CUDA, LossStep, assert_equal_bits, every_dtype, frobenius_error, there
from tests.tolerance import assert_as_exact_as_plain
from tests.unit.ops.loss_problems import IGNORED, PROBLEMS, SCALE, Problem

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")
NAMES = ("total", "nll", "lse", "kl")
# In units of the dtype. fp32: exp(z - lse) is off by as much as lse is, half a unit of up to 100.
FLOOR = {torch.float32: 64, torch.bfloat16: 1, torch.float16: 1}


def assert_exact(problem: Problem, operands: list[Tensor], chunk_tokens: int | None) -> None:
    """Losses and gradients, the upstream gradient being -3, against plain torch and fp64."""
    hidden, weight, targets = operands
    got = LossStep(problem, chunk_tokens).losses(hidden, weight, targets)
    plain = problem.define(hidden, weight, targets)
    truth, true_gradients = problem.truth(hidden, weight, targets, upstream=-3.0)
    for name in NAMES:
        three = [getattr(output, name).detach() for output in (got, plain, truth)]
        assert_as_exact_as_plain(*three, floor_eps=16, what=name)
    upstream = torch.full_like(got.total, -3.0)
    both = [torch.autograd.grad(o.total, (hidden, weight), upstream) for o in (got, plain)]
    for what, *gradients in zip(("hidden", "weight"), *both, true_gradients, strict=True):
        floor = FLOOR[problem.dtype]
        assert_as_exact_as_plain(*gradients, floor_eps=floor, what=f"d {what}")
    if got.best is not None and problem.dtype == torch.float32:
        assert truth.best is not None and torch.equal(got.best, truth.best)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, None])
@every_dtype
@pytest.mark.parametrize("name", PROBLEMS)
def test_losses_and_gradients_are_as_exact_as_plain(
    name: str, dtype: torch.dtype, chunk_tokens: int | None
) -> None:
    problem = replace(PROBLEMS[name], dtype=dtype)
    assert_exact(problem, there(*problem.operands()), chunk_tokens)


@every_dtype
@pytest.mark.parametrize("ignored", ["some", "none", "all"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_targets_in_the_first_and_last_column_are_as_exact_as_plain(
    temperature: float, ignored: str, dtype: torch.dtype
) -> None:
    problem = Problem(
        rows=(33, 33, 33), vocab=1027, padding=5, d_model=24, dtype=dtype, ignored=ignored,
        temperature=temperature, largest_logit=100.0,
    )  # fmt: skip
    hidden, weight, targets = there(*problem.operands())
    valid = targets != IGNORED
    ends = torch.arange(len(targets), device=CUDA) % 33 % 2 * (problem.vocab - 1)
    targets[valid] = ends[valid]
    assert_exact(problem, [hidden, weight, targets], 16)


def large(vocab: int, dtype: torch.dtype, sharpest: float) -> list[Tensor]:
    """2048 tokens of 3 granularities, D 256, whose logits fp32 holds exactly in every dtype.

    A row is its target's row of the weight, `sharpest` times at most, and noise, more of it at
    narrower granularities. Values are whole steps of 2^-8 (weight) and 2^-6 (hidden), so that
    the forward GEMM rounds nothing, and errors are those of what comes after it.
    """
    generator = torch.Generator(CUDA).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=CUDA)

    weight = (draw(vocab, 256) * 2**4).round() * 2**-8
    targets = torch.randint(vocab, (2048,), generator=generator, device=CUDA)
    targets[:2], targets[2::7] = torch.tensor([0, vocab - 1], device=CUDA), IGNORED
    strength = torch.linspace(0.9, sharpest, 2048, device=CUDA)[:, None]
    own = weight[targets.clamp(min=0)] * strength
    hidden = torch.cat([own + noise * draw(2048, 256) for noise in (0.1, 0.2, 0.3)])
    hidden = (hidden * 2**6).round() * 2**-6
    return [t.to(dtype).requires_grad_() for t in (hidden, weight)] + [targets.repeat(3)]


@every_dtype
@pytest.mark.parametrize("vocab", [32003, 32768])
@pytest.mark.parametrize(("sharpest", "temperature"), [(11.5, 1.0), (11.5, 2.0), (100.0, 2.0)])
def test_large_problems_are_exact_to_rounding(
    vocab: int, dtype: torch.dtype, sharpest: float, temperature: float
) -> None:
    """Frobenius errors. Printed, for the limits are wider than what is hoped for.

    Losses, always fp32: 1e-6, of KL relative to lse, for it is a small difference of such numbers.
    Gradients in fp32: 1e-6, or 1.5 times the error of plain torch, whose GEMMs are the same. In
    bf16 and fp16: what rounding the truth makes, and 1e-3 and 1.2e-4 for that of the logits'
    gradient before the GEMMs (bf16 comes to 2.3e-3 in all where only these two are rounded).
    """
    problem = Problem(
        rows=(2048,) * 3, vocab=vocab, d_model=256, dtype=dtype, temperature=temperature,
        ce=(0.5, 0.3, 0.2), z=(1e-3, 1e-3, 1e-3),
    )  # fmt: skip
    hidden, weight, targets = large(vocab, dtype, sharpest)
    output = LossStep(problem, 700).losses(hidden, weight, targets)
    got = torch.autograd.grad(output.total, (hidden, weight))
    truth, true_gradients = problem.truth(hidden, weight, targets)
    valid = targets[:2048] != IGNORED
    nll = truth.nll[:2048][valid]
    assert nll.min() < 0.4 and nll.max() > 9.4
    errors = {name: frobenius_error(getattr(output, name), getattr(truth, name)) for name in NAMES}
    kl_of_lse = errors["kl"] * (truth.kl.norm() / truth.lse.norm()).item()
    print(f"\n{dtype} V {vocab} sharpest {sharpest} tau {temperature}: losses "
          + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))  # fmt: skip
    for name, error in errors.items():
        assert (kl_of_lse if name == "kl" else error) <= 1e-6, f"{name}: {error:.1e}"
    if dtype == torch.float32:
        plain = torch.autograd.grad(problem.define(hidden, weight, targets).total, (hidden, weight))
        allowed = [max(1e-6, 1.5 * frobenius_error(p, t))
                   for p, t in zip(plain, true_gradients, strict=True)]  # fmt: skip
    else:
        more = 1e-3 if dtype == torch.bfloat16 else 1.2e-4
        allowed = [more + frobenius_error(t.to(dtype), t) for t in true_gradients]
    for name, gradient, expected, limit in zip(
        ("hidden", "weight"), got, true_gradients, allowed, strict=True
    ):
        error = frobenius_error(gradient, expected)
        print(f"  d {name} {error:.1e}, allowed {limit:.1e}")
        assert error <= limit, f"d {name}: {error:.1e}, allowed {limit:.1e}"


@every_dtype
def test_the_size_of_chunks_does_not_matter(dtype: torch.dtype) -> None:
    problem = Problem(rows=(257,) * 3, vocab=3001, d_model=64, dtype=dtype, temperature=2.0)
    operands = there(*problem.operands())
    whole = LossStep(problem, 257)(*operands)
    for chunk_tokens in (1, 60, 256):
        parts = LossStep(problem, chunk_tokens)(*operands)
        for got, expected in zip(parts, whole, strict=True):
            # Other GEMMs sum in another order, and KL is a small difference of large sums.
            rounding = 0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
            assert frobenius_error(got, expected) <= rounding + 64 * torch.finfo(torch.float32).eps


@every_dtype
@pytest.mark.parametrize("name", ["joint", "temperature 2", "separate"])
def test_frozen_operands_change_nothing(name: str, dtype: torch.dtype) -> None:
    problem = replace(PROBLEMS[name], dtype=dtype)
    hidden, weight, targets = there(*problem.operands())
    step = LossStep(problem)
    *_, d_hidden, d_weight = step(hidden, weight, targets)
    for frozen, learning, expected in ((weight, hidden, d_hidden), (hidden, weight, d_weight)):
        frozen.requires_grad_(False)
        total = step.losses(hidden, weight, targets).total
        assert_equal_bits(torch.autograd.grad(total, learning), (expected,))
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert step.losses(hidden, weight, targets).total.grad_fn is None


@every_dtype
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("vocab", [50, 4099, 32768])
def test_a_student_equal_to_its_teacher_has_no_kl(
    vocab: int, temperature: float, dtype: torch.dtype
) -> None:
    problem = Problem(
        rows=(8, 8), ce=(0, 0), z=(0, 0), kl=(0, 1), temperature=temperature, dtype=dtype,
        vocab=vocab, largest_logit=100.0,
    )  # fmt: skip
    hidden, weight, targets = there(*problem.operands())
    twins = torch.cat([hidden[:8], hidden[:8]]).detach().requires_grad_()
    total, _, _, kl, *gradients = LossStep(problem)(twins, weight, targets)
    assert total == 0 and (kl == 0).all()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("target", [11, 15, -1, 10**12])
def test_a_target_outside_the_vocabulary_is_nan_or_named(target: int) -> None:
    problem = Problem(padding=5, dtype=torch.bfloat16)
    hidden, weight, targets = there(*problem.operands())
    targets[4] = target
    total, *_, d_hidden, d_weight = LossStep(problem)(hidden, weight, targets)
    assert total.isnan() and d_hidden.isnan().any() and d_weight.isnan().any()
    scale = torch.full((), SCALE, device=CUDA)
    with pytest.raises(ValueError, match=rf"targets \[{target}\] are not ids of the vocabulary"):
        problem.run(hidden, weight, targets, scale=scale, check_targets=True, chunk_tokens=2)


def test_autocast_does_not_lower_the_precision() -> None:
    problem = Problem(dtype=torch.float32)
    operands = there(*problem.operands())
    plain = LossStep(problem)(*operands)
    with torch.autocast(CUDA.type, dtype=torch.bfloat16):
        assert_equal_bits(LossStep(problem)(*operands), plain)


@pytest.mark.parametrize("elsewhere", ["hidden", "weight", "targets", "scale"])
def test_operands_on_two_devices_are_refused(elsewhere: str) -> None:
    problem = Problem(dtype=torch.float32)
    names = ("hidden", "weight", "targets")
    tensors = dict(zip(names, there(*problem.operands()), strict=True))
    tensors["scale"] = torch.full((), SCALE, device=CUDA)
    tensors[elsewhere] = tensors[elsewhere].detach().cpu()
    scale = tensors.pop("scale")
    with pytest.raises(ValueError, match="device"):
        problem.run(*tensors.values(), scale=scale, impl="native")
