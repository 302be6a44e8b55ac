"""multi_granularity_loss against its definition, on one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from matformer_dist.ops import multi_granularity_loss as module
from matformer_dist.ops.multi_granularity_loss import VocabShard, default_chunk_tokens
from tests.tolerance import assert_as_exact_as_plain
from tests.unit.ops.loss_problems import PROBLEMS, SCALE, Problem


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Whatever reads what nobody wrote gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, None])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_losses_and_gradients_match_the_definition(
    problem: Problem, chunk_tokens: int | None
) -> None:
    hidden, weight, targets = problem.operands()
    got = problem.run(hidden, weight, targets, chunk_tokens=chunk_tokens)
    expected = problem.define(hidden, weight, targets)
    torch.testing.assert_close(got._asdict(), expected._asdict())
    assert not any(value.requires_grad for value in got[1:] if value is not None)
    upstream = torch.tensor(-3.0, dtype=got.total.dtype)
    torch.testing.assert_close(
        torch.autograd.grad(got.total, (hidden, weight), upstream),
        torch.autograd.grad(expected.total, (hidden, weight), upstream),
    )
    with torch.no_grad():
        alone = problem.run(hidden, weight, targets, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(alone._asdict(), got._asdict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["joint", "temperature 2", "separate"])
def test_gradients_match_finite_differences(name: str) -> None:
    """The teacher's logits are a constant to the KL, so its own rows are held fixed."""
    problem = replace(PROBLEMS[name], vocab=5, d_model=3)
    hidden, weight, targets = problem.operands()
    fixed = problem.rows[0] if problem.shared else 0

    def total(students: Tensor) -> Tensor:
        whole = torch.cat([hidden[:fixed].detach(), students])
        return problem.run(whole, weight.detach(), targets, chunk_tokens=2).total

    assert torch.autograd.gradcheck(total, hidden[fixed:].detach().requires_grad_())
    without_kl = replace(problem, kl=(0,) * len(problem.kl))

    def total_without_kl(hidden: Tensor, weight: Tensor) -> Tensor:
        return without_kl.run(hidden, weight, targets, chunk_tokens=2).total

    assert torch.autograd.gradcheck(total_without_kl, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest_logit", [5.0, 100.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_low_precision_is_as_exact_as_plain(
    temperature: float, largest_logit: float, dtype: torch.dtype
) -> None:
    problem = Problem(
        rows=(65, 65, 65),
        vocab=301,
        d_model=24,
        temperature=temperature,
        largest_logit=largest_logit,
        dtype=dtype,
    )
    hidden, weight, targets = problem.operands()
    got = problem.run(hidden, weight, targets, chunk_tokens=16)
    plain = problem.define(hidden, weight, targets)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = problem.define(wide[0], wide[1], targets)
    for name in ("total", "nll", "lse", "kl"):
        values = [getattr(output, name) for output in (got, plain, truth)]
        assert_as_exact_as_plain(*values, floor_eps=4, what=name)
    both = [torch.autograd.grad(output.total, (hidden, weight)) for output in (got, plain)]
    for name, *three in zip(
        ("hidden", "weight"), *both, torch.autograd.grad(truth.total, wide), strict=True
    ):
        floor = 8 if dtype == torch.float32 else 1
        assert_as_exact_as_plain(*three, floor_eps=floor, what=f"d {name}")


def test_weight_gradient_of_many_chunks_is_accumulated_in_fp32() -> None:
    problem = Problem(
        rows=(600,), ce=(1,), z=(0,), kl=(0,), vocab=3, d_model=2, dtype=torch.bfloat16
    )
    hidden, weight, targets = problem.operands()
    many, one = (
        torch.autograd.grad(problem.run(hidden, weight, targets, chunk_tokens=c).total, weight)[0]
        for c in (1, 600)
    )
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(many, one, rtol=eps, atol=0)  # one rounding apart, at most


def test_fp16_gradients_survive_until_the_loss_scale_is_known() -> None:
    """Gradients of 1e-7 and less are nothing in fp16; times the upstream 2^16 they are 1e-2."""
    problem = Problem(dtype=torch.float16, temperature=2.0)
    hidden, weight, targets = problem.operands()
    tiny = torch.tensor(2.0**-24)
    total = problem.run(hidden, weight, targets, scale=tiny, chunk_tokens=2).total
    got = torch.autograd.grad(total, (hidden, weight), torch.tensor(2.0**24 * SCALE))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = torch.autograd.grad(problem.define(wide[0], wide[1], targets).total, wide)
    for actual, expected in zip(got, truth, strict=True):
        assert actual.dtype == torch.float16
        torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["joint", "temperature 2", "separate"])
def test_frozen_operands_cost_nothing_and_change_nothing(name: str) -> None:
    problem = PROBLEMS[name]
    hidden, weight, targets = problem.operands()
    both = torch.autograd.grad(problem.run(hidden, weight, targets).total, (hidden, weight))
    for frozen, learning, expected in ((weight, hidden, both[0]), (hidden, weight, both[1])):
        frozen.requires_grad_(False)
        with Watch() as watch:
            total = problem.run(hidden, weight, targets).total
        torch.testing.assert_close(torch.autograd.grad(total, learning)[0], expected)
        assert watch.products() == 2  # logits and one gradient
        frozen.requires_grad_(True)
    with torch.no_grad(), Watch() as watch:
        assert problem.run(hidden, weight, targets).total.grad_fn is None
    assert watch.products() == 1


class Watch(TorchDispatchMode):
    """Counts operators and remembers the largest tensor that any of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result

    def products(self) -> int:
        return sum(self.calls[kind] for kind in ("mm", "addmm", "addmm_", "bmm", "matmul"))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_never_live_beyond_a_chunk(temperature: float) -> None:
    problem = Problem(rows=(40, 40, 40), vocab=101, d_model=3, temperature=temperature)
    operands = problem.operands()
    with Watch() as watch:
        problem.run(*operands, chunk_tokens=4)
    assert watch.largest == 3 * 4 * 101


@pytest.mark.parametrize("name", ["joint", "temperature 2", "separate"])
def test_nothing_waits_for_the_device(name: str) -> None:
    """On the meta device there are no values, so whatever asks for one raises."""
    problem = PROBLEMS[name]
    hidden, weight, targets = (t.detach().to("meta") for t in problem.operands())
    scale = torch.empty((), device="meta")
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    total = problem.run(*inputs, targets, scale=scale, chunk_tokens=2).total
    torch.autograd.grad(total, inputs)
    with pytest.raises((NotImplementedError, RuntimeError)):
        problem.run(*inputs, targets, scale=scale, check_targets=True)


def test_autocast_does_not_lower_the_precision() -> None:
    problem = Problem(dtype=torch.float32)
    hidden, weight, targets = problem.operands()
    plain = problem.run(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = problem.run(hidden, weight, targets)
    torch.testing.assert_close(output._asdict(), plain._asdict(), rtol=0, atol=0)


def test_repeated_runs_are_equal_bit_for_bit() -> None:
    problem = Problem(rows=(33, 33, 33), vocab=500, d_model=16, dtype=torch.float32)
    hidden, weight, targets = problem.operands()
    results = []
    for _ in range(2):
        output = problem.run(hidden, weight, targets, chunk_tokens=8)
        results.append((*output, *torch.autograd.grad(output.total, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_equal_to_its_teacher_has_no_kl(temperature: float, dtype: torch.dtype) -> None:
    problem = Problem(
        rows=(8, 8), ce=(0, 0), z=(0, 0), kl=(0, 1), temperature=temperature, dtype=dtype, vocab=50
    )
    hidden, weight, targets = problem.operands()
    twins = torch.cat([hidden[:8], hidden[:8]]).detach().requires_grad_()
    output = problem.run(twins, weight, targets)
    assert output.total == 0 and (output.kl == 0).all()
    assert not any(g.any() for g in torch.autograd.grad(output.total, (twins, weight)))


def test_agreement_takes_the_lowest_of_equal_logits_and_tells_large_ids_apart() -> None:
    problem = Problem(rows=(4, 4), ce=(1, 1), z=(0, 0), kl=(0, 0), vocab=3, d_model=3)
    teacher = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [0, 1, 0]])
    student = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]])
    hidden = torch.cat([teacher, student])
    for offset in (0, 2**24, 2**33):
        output = problem.run(
            hidden, torch.eye(3), torch.full((8,), offset), vocab=VocabShard(offset, 3)
        )
        assert output.agrees is not None
        assert output.agrees.tolist() == [True, True, True, True, False, True, False, True]


@pytest.mark.parametrize("target", [11, 15, -1, 10**12])
def test_a_target_outside_the_vocabulary_is_nan_or_named(target: int) -> None:
    problem = Problem(padding=5)
    hidden, weight, targets = problem.operands()
    targets[4] = target
    total = problem.run(hidden, weight, targets).total
    assert total.isnan()
    assert all(g.isnan().any() for g in torch.autograd.grad(total, (hidden, weight)))
    with pytest.raises(ValueError, match=rf"targets \[{target}\] are not ids of the vocabulary"):
        problem.run(hidden, weight, targets, check_targets=True, chunk_tokens=2)


def test_chunks_depend_on_one_segment_not_on_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 8 * 20)
    assert default_chunk_tokens(20) == 8
    for count in (1, 2, 4):
        problem = Problem(
            rows=(17,) * count, ce=(1,) * count, z=(0,) * count, kl=(0,) * count, vocab=20
        )
        hidden, weight, targets = problem.operands()
        with torch.no_grad(), Watch() as watch:
            problem.run(hidden.float(), weight.float(), targets)
        assert watch.products() == 3  # 6 + 6 + 5 tokens
        assert watch.largest == count * 6 * 20


def test_compiled_model_may_hold_the_loss_which_stays_eager() -> None:
    problem = PROBLEMS["temperature 2"]
    hidden, weight, targets = problem.operands()
    traced: list[str] = []

    def model(hidden: Tensor) -> Tensor:
        return problem.run(hidden.sin(), weight, targets).total * 2

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    compiled, eager = torch.compile(model, backend=backend)(hidden), model(hidden)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, (hidden, weight)),
        torch.autograd.grad(eager, (hidden, weight)),
    )
    assert any("sin" in name for name in traced)
    assert not any("autograd" in name or "mm" in name for name in traced)


BAD = {
    "rows do not sum": ({"rows": (5, 5, 4)}, "must sum to the 15 rows"),
    "no segment": ({"rows": (), "ce_weights": ()}, "must sum to the 15 rows"),
    "unequal rows of shared tokens": ({"rows": (5, 4, 6)}, "must be equal"),
    "a weight too few": ({"ce_weights": (1, 1)}, r"hold \[2, 3, 3\] numbers"),
    "the teacher learns": ({"kl_weights": (0.5, 0, 0)}, "segment 0 is the teacher"),
    "KL without shared tokens": ({"shared_tokens": False}, "nobody has a teacher"),
    "temperature 0": ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
    "chunk of nothing": ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    "hidden too wide": ({"hidden": torch.zeros(15, 5)}, r"hidden \[15, 5\]"),
    "dtypes differ": ({"hidden": torch.zeros(15, 4).half()}, "share a floating dtype"),
    "targets in int32": ({"targets": torch.zeros(15).int()}, "must be 15 ids in int64"),
    "targets too few": ({"targets": torch.zeros(14).long()}, r"targets \[14\]"),
    "scale is a vector": ({"scale": torch.ones(1)}, r"scale \[1\]"),
    "shard larger than the weight": ({"vocab": VocabShard(0, 12)}, "does not fit a weight of 11"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_operands_are_named(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {
        "hidden": torch.zeros(15, 4),
        "weight": torch.zeros(11, 4),
        "targets": torch.zeros(15).long(),
        "rows": (5, 5, 5),
        "ce_weights": (1, 1, 1),
        "z_weights": (0, 0, 0),
        "kl_weights": (0, 1, 1),
        "scale": torch.ones(()),
        "shared_tokens": True,
    }
    module.multi_granularity_loss(**call)
    with pytest.raises(ValueError, match=message):
        module.multi_granularity_loss(**call | change)
