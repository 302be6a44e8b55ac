"""multi_granularity_loss against its definition, on one rank."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from matformer_dist import chunks
from matformer_dist.chunks import default_chunk_tokens
from matformer_dist.ops import loss_operator
from matformer_dist.ops.multi_granularity_loss import multi_granularity_loss
from matformer_dist.ops.native import Implementation
from matformer_dist.ops.vocab_shard import VocabShard
from tests.tolerance import assert_as_exact_as_plain
from tests.unit.ops.loss_problems import (
    IGNORED,
    NATIVE,
    PROBLEMS,
    SCALE,
    Problem,
    of_every_kind,
    tolerances,
)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Whatever reads what nobody wrote gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, None])
@of_every_kind()
def test_losses_and_gradients_match_the_definition(
    problem: Problem, chunk_tokens: int | None
) -> None:
    hidden, weight, targets = problem.operands()
    got = problem.run(hidden, weight, targets, chunk_tokens=chunk_tokens)
    expected, gradients = problem.truth(hidden, weight, targets, upstream=-3.0)
    close = tolerances(problem)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(got, name), value, check_dtype=False, **close)
    assert not any(value.requires_grad for value in got[1:] if value is not None)
    upstream = torch.full_like(got.total, -3.0)
    for actual, gradient in zip(
        torch.autograd.grad(got.total, (hidden, weight), upstream), gradients, strict=True
    ):
        torch.testing.assert_close(actual, gradient, check_dtype=False, **close)
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


LOW = pytest.mark.parametrize(
    ("dtype", "impl"),
    [
        (torch.float32, "reference"),
        (torch.bfloat16, "reference"),
        (torch.float16, "reference"),
        pytest.param(torch.float32, "native", marks=NATIVE),
        pytest.param(torch.bfloat16, "native", marks=NATIVE),
        pytest.param(torch.float16, "native", marks=NATIVE),
    ],
)


@LOW
@pytest.mark.parametrize("largest_logit", [5.0, 100.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_low_precision_is_as_exact_as_plain(
    temperature: float, largest_logit: float, dtype: torch.dtype, impl: Implementation
) -> None:
    problem = Problem(
        rows=(65, 65, 65),
        vocab=301,
        d_model=24,
        temperature=temperature,
        largest_logit=largest_logit,
        dtype=dtype,
        impl=impl,
    )
    hidden, weight, targets = problem.operands()
    got = problem.run(hidden, weight, targets, chunk_tokens=16)
    plain = problem.define(hidden, weight, targets)
    truth, gradients = problem.truth(hidden, weight, targets)
    for name in ("total", "nll", "lse", "kl"):
        values = [getattr(output, name) for output in (got, plain, truth)]
        assert_as_exact_as_plain(*values, floor_eps=4, what=name)
    both = [torch.autograd.grad(output.total, (hidden, weight)) for output in (got, plain)]
    for name, *three in zip(("hidden", "weight"), *both, gradients, strict=True):
        floor = 8 if dtype == torch.float32 else 1
        assert_as_exact_as_plain(*three, floor_eps=floor, what=f"d {name}")


@LOW
@pytest.mark.parametrize(("largest_logit", "mean_nll"), [(0.5, 9.0), (8.0, 6.0), (100.0, 0.4)])
def test_large_problems_are_exact_to_a_few_units(
    largest_logit: float, mean_nll: float, dtype: torch.dtype, impl: Implementation
) -> None:
    """Frobenius norms, per granularity: 1e-6 in fp32, 2e-3 (one rounding and a bit) in bf16.

    Or twice what plain torch is off by: at logits of 100, fp32 holds them to 4e-6 alone.

    Targets lie where the teacher's logits are high, so that losses are as low as `mean_nll`.
    """
    problem = Problem(
        rows=(96,) * 3, vocab=8192, d_model=64, dtype=dtype, impl=impl,
        largest_logit=largest_logit, z=(0.0, 1e-4, 0.0),
    )  # fmt: skip
    hidden, weight, targets = problem.operands()
    if mean_nll < 9:
        best = (hidden[:96] @ weight.t()).argmax(-1).repeat(3)
        targets = torch.where(targets == IGNORED, targets, best)
    output = problem.run(hidden, weight, targets, chunk_tokens=40)
    got = torch.autograd.grad(output.total, (hidden, weight))
    plain = problem.define(hidden, weight, targets)
    of_plain = torch.autograd.grad(plain.total, (hidden, weight))
    truth, gradients = problem.truth(hidden, weight, targets)
    assert abs(truth.nll[:96][targets[:96] != IGNORED].mean() - mean_nll) < 1.5
    allowed = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 5e-4}[dtype]
    for three in (
        *zip(output.nll.split(96), plain.nll.split(96), truth.nll.split(96), strict=True),
        *zip(got[0].split(96), of_plain[0].split(96), gradients[0].split(96), strict=True),
        (got[1], of_plain[1], gradients[1]),
    ):
        actual, plain_value, expected = (t.double() for t in three)
        error, of_plain_value = (
            ((t - expected).norm() / expected.norm()).item() for t in (actual, plain_value)
        )
        assert error <= max(allowed, 2 * of_plain_value)


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
    for actual, expected in zip(got, problem.truth(hidden, weight, targets)[1], strict=True):
        assert actual.dtype == torch.float16
        torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-4)


@of_every_kind("joint", "temperature 2", "separate")
def test_frozen_operands_cost_nothing_and_change_nothing(problem: Problem) -> None:
    hidden, weight, targets = problem.operands()
    both = torch.autograd.grad(problem.run(hidden, weight, targets).total, (hidden, weight))
    for frozen, learning, expected in ((weight, hidden, both[0]), (hidden, weight, both[1])):
        frozen.requires_grad_(False)
        total = problem.run(hidden, weight, targets).total
        torch.testing.assert_close(torch.autograd.grad(total, learning)[0], expected)
        with Watch() as watch:
            problem.run_inside(hidden, weight, targets, chunk_tokens=100)
        assert watch.products() == 2  # logits and one gradient
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert problem.run(hidden, weight, targets).total.grad_fn is None
    with Watch() as watch:
        problem.run_inside(hidden.detach(), weight.detach(), targets, chunk_tokens=100)
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


@of_every_kind("joint", "temperature 2", rows=(40, 40, 40), vocab=101, d_model=3)
def test_logits_never_live_beyond_a_chunk(problem: Problem) -> None:
    operands = problem.operands()
    with Watch() as watch:
        problem.run_inside(*operands, chunk_tokens=4)
    assert watch.largest == 3 * 4 * 101


@of_every_kind("joint", "temperature 2", "separate")
def test_nothing_waits_for_the_device(problem: Problem) -> None:
    """On the meta device there are no values, so whatever asks for one raises."""
    hidden, weight, targets = (t.detach().to("meta") for t in problem.operands())
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    results = problem.run_inside(*inputs, targets, chunk_tokens=2)
    assert results[-1].shape == weight.shape
    with pytest.raises((NotImplementedError, RuntimeError)):
        problem.run_inside(*inputs, targets, chunk_tokens=2, check_targets=True)


@of_every_kind("joint")
def test_autocast_does_not_lower_the_precision(problem: Problem) -> None:
    hidden, weight, targets = problem.operands()
    plain = problem.run(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = problem.run(hidden, weight, targets)
    torch.testing.assert_close(output._asdict(), plain._asdict(), rtol=0, atol=0)


@of_every_kind("joint", rows=(33, 33, 33), vocab=500, d_model=16)
def test_repeated_runs_are_equal_bit_for_bit(problem: Problem) -> None:
    hidden, weight, targets = problem.operands()
    results = []
    for _ in range(2):
        output = problem.run(hidden, weight, targets, chunk_tokens=8)
        results.append((*output, *torch.autograd.grad(output.total, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@LOW
def test_a_student_equal_to_its_teacher_has_no_kl(
    temperature: float, dtype: torch.dtype, impl: Implementation
) -> None:
    problem = Problem(
        rows=(8, 8), ce=(0, 0), z=(0, 0), kl=(0, 1), temperature=temperature, dtype=dtype,
        vocab=4099, impl=impl,
    )  # fmt: skip
    hidden, weight, targets = problem.operands()
    weight = (weight.detach() * 20).requires_grad_()
    twins = torch.cat([hidden[:8], hidden[:8]]).detach().requires_grad_()
    output = problem.run(twins, weight, targets)
    assert output.total == 0 and (output.kl == 0).all()
    assert not any(g.any() for g in torch.autograd.grad(output.total, (twins, weight)))


def test_best_is_the_lowest_of_equal_logits_and_exact_for_large_ids() -> None:
    problem = Problem(rows=(4, 4), ce=(1, 1), z=(0, 0), kl=(0, 0), vocab=3, d_model=3)
    teacher = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [0, 1, 0]])
    student = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]])
    hidden = torch.cat([teacher, student])
    for offset in (0, 2**24, 2**33):
        output = problem.run(
            hidden, torch.eye(3), torch.full((8,), offset), vocab=VocabShard(offset, 3)
        )
        assert output.best is not None
        assert (output.best - offset).tolist() == [0, 0, 1, 1, 1, 0, 2, 1]


@pytest.mark.parametrize("target", [11, 15, -1, 10**12])
@of_every_kind("joint", padding=5)
def test_a_target_outside_the_vocabulary_is_nan_or_named(problem: Problem, target: int) -> None:
    hidden, weight, targets = problem.operands()
    targets[4] = target
    total = problem.run(hidden, weight, targets).total
    assert total.isnan()
    assert all(g.isnan().any() for g in torch.autograd.grad(total, (hidden, weight)))
    with pytest.raises(ValueError, match=rf"targets \[{target}\] are not ids of the vocabulary"):
        problem.run(hidden, weight, targets, check_targets=True, chunk_tokens=2)


def test_chunks_depend_on_one_segment_not_on_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 4 * 8 * 20)
    assert default_chunk_tokens(20, "cpu") == 8
    sizes: list[int] = []
    begin = loss_operator._Plan.begin

    def watched(plan: Any, logits: Tensor, *rest: Any) -> Any:
        sizes.append(logits.numel())
        return begin(plan, logits, *rest)

    monkeypatch.setattr(loss_operator._Plan, "begin", watched)
    for count in (1, 2, 4):
        problem = Problem(
            rows=(17,) * count, ce=(1,) * count, z=(0,) * count, kl=(0,) * count, vocab=20,
            dtype=torch.float32,
        )  # fmt: skip
        problem.run(*problem.operands())
        assert sizes == [count * tokens * 20 for tokens in (6, 6, 5)]
        sizes.clear()


@of_every_kind("temperature 2", "separate")
def test_torch_compile_sees_one_operator_and_no_graph_break(problem: Problem) -> None:
    hidden, weight, targets = problem.operands()
    shard, scale = VocabShard(0, problem.vocab), torch.tensor(SCALE)
    graphs: list[list[str]] = []

    def model(hidden: Tensor, weight: Tensor) -> Tensor:
        output = problem.run(hidden.sin(), weight, targets, vocab=shard, scale=scale)
        return output.total * 2

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch.compiler.reset()
    for way in (backend, "aot_eager"):
        compiled = torch.compile(model, backend=way, fullgraph=True)(hidden, weight)
        eager = model(hidden, weight)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(
            torch.autograd.grad(compiled, (hidden, weight)),
            torch.autograd.grad(eager, (hidden, weight)),
        )
    names = [name for name in graphs[0] if "multi_granularity_loss" in name]
    assert len(names) == 1 and not any("mm" in name for name in graphs[0])


@of_every_kind("joint", "temperature 2", "separate", "no KL")
def test_operator_keeps_torchs_contract(problem: Problem) -> None:
    """Schema, fake implementation, autograd registration and their use by AOTAutograd."""
    hidden, weight, targets = problem.operands()
    shard = VocabShard(0, problem.vocab)
    arguments = (
        hidden, weight, targets, torch.tensor(SCALE), list(problem.rows), list(problem.ce),
        list(problem.z), list(problem.kl), problem.shared, problem.temperature, IGNORED, shard.key,
        2, False, problem.impl == "native", True, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.matformer_dist.multi_granularity_loss.default, arguments)


@of_every_kind("temperature 2")
def test_operands_with_gaps_match_contiguous_ones(problem: Problem) -> None:
    hidden, weight, targets = problem.operands()
    expected = problem.run(hidden, weight, targets).total
    gradients = torch.autograd.grad(expected, (hidden, weight))
    shard, scale = VocabShard(0, problem.vocab), torch.tensor(SCALE)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return problem.run(hidden, weight, targets, vocab=shard, scale=scale).total

    with_gaps = [t.detach().t().contiguous().t().requires_grad_() for t in (hidden, weight)]
    torch.compiler.reset()
    for way in (run, torch.compile(run, fullgraph=True)):  # by inductor, which trusts strides
        total = way(with_gaps[0], with_gaps[1])
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(torch.autograd.grad(total, with_gaps), gradients)


def test_a_second_derivative_is_refused() -> None:
    problem = Problem()
    hidden, weight, targets = problem.operands()
    total = problem.run(hidden, weight, targets).total
    with pytest.raises(RuntimeError, match="have no derivatives; call backward without create_gr"):
        torch.autograd.grad(total, hidden, create_graph=True)


def test_a_shard_survives_copies_and_pickles() -> None:
    problem = Problem()
    hidden, weight, targets = problem.operands()
    shard = VocabShard(0, problem.vocab)
    expected = problem.run(hidden, weight, targets, vocab=shard).total
    copied, pickled = copy.deepcopy(shard), pickle.loads(pickle.dumps(shard))
    smaller = VocabShard(0, 3)
    del shard
    for other in (copied, pickled):
        assert torch.equal(problem.run(hidden, weight, targets, vocab=other).total, expected)
    assert smaller.key not in (copied.key, pickled.key)


def test_work_is_what_the_flop_counter_says() -> None:
    problem = Problem(padding=3)
    hidden, weight, targets = problem.operands()
    with FlopCounterMode(display=False) as counter:
        problem.run(hidden, weight, targets)
        forward = counter.get_total_flops()
        with torch.no_grad():
            problem.run(hidden, weight, targets)
    assert forward == 3 * 2 * 15 * 4 * 11
    assert counter.get_total_flops() == 4 * 2 * 15 * 4 * 11


BAD = {
    "rows do not sum": ({"rows": (5, 5, 4)}, "must sum to the 15 rows"),
    "no segment": ({"rows": (), "ce_weights": ()}, "must sum to the 15 rows"),
    "unequal rows of shared tokens": ({"rows": (5, 4, 6)}, "must be equal"),
    "a weight too few": ({"ce_weights": (1, 1)}, r"hold \[2, 3, 3\] numbers"),
    "the teacher learns": ({"kl_weights": (0.5, 0, 0)}, "segment 0 is the teacher"),
    "KL without shared tokens": ({"shared_tokens": False}, "nobody has a teacher"),
    "temperature 0": ({"temperature": 0.0}, "temperature is 0.0; it must lie in 1e-6 to 1e6"),
    "temperature without end": ({"temperature": float("inf")}, "temperature is inf"),
    "a weight that is no number": ({"z_weights": (0, float("nan"), 0)}, "must be finite"),
    "half a row": ({"rows": (5.0, 5.0, 5.0)}, "must be whole numbers"),
    "half a token": ({"chunk_tokens": 2.5}, "chunk_tokens is 2.5; it must be a whole number"),
    "scale is a number": ({"scale": 0.1}, "scale is 0.1; it must be a tensor"),
    "an empty weight": ({"weight": torch.zeros(0, 4)}, r"weight \[0, 4\] must not be empty"),
    "chunk of nothing": ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    "hidden too wide": ({"hidden": torch.zeros(15, 5)}, r"hidden \[15, 5\]"),
    "dtypes differ": ({"hidden": torch.zeros(15, 4).half()}, "share a floating dtype"),
    "targets in int32": ({"targets": torch.zeros(15).int()}, "must be 15 ids in int64"),
    "targets too few": ({"targets": torch.zeros(14).long()}, r"targets \[14\]"),
    "impl unknown": ({"impl": "cuda"}, "impl is 'cuda'; it must be one of auto, native, refer"),
    "scale elsewhere": ({"scale": torch.ones((), device="meta")}, "lie on one device"),
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
    multi_granularity_loss(**call)
    with pytest.raises(ValueError, match=message):
        multi_granularity_loss(**call | change)
