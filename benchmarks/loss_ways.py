"""The ways that benchmarks/loss.py compares, each in a function of its own.

Legend: g granularities, n tokens of each, R = g n rows widest first, D d_model, V vocabulary.

All compute mean over the R rows of CE_r + kl KL(softmax(z_XL) || softmax(z_r)), z_XL a constant;
a row of XL has no KL. So every granularity weighs 1 / g, and libraries that know a plain mean can
take part. A way is made for one Problem; it returns a call that gives the loss to go backward
from, or raises Unavailable with the reason. What needs a library imports it when it is made, so
that this file runs where there is none.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from matformer_dist.chunks import default_chunk_tokens
from matformer_dist.ops import native
from matformer_dist.ops.multi_granularity_loss import multi_granularity_loss

Run = Callable[[], Tensor]


class Unavailable(Exception):  # noqa: N818, it is a reason, not an accident
    """Why a way cannot take part."""


@dataclass(frozen=True)
class Problem:
    """hidden [R, D] and weight [V, D], leaves that want gradients; targets [R], those of n tokens
    repeated. kl: weight of the KL, 0 for none. chunk_tokens: None for the default."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    granularities: int
    kl: float
    chunk_tokens: int | None = None

    @property
    def tokens(self) -> int:
        return len(self.hidden) // self.granularities

    def in_float64(self) -> Problem:
        hidden, weight = (x.detach().double().requires_grad_() for x in (self.hidden, self.weight))
        return Problem(hidden, weight, self.targets, self.granularities, self.kl)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def ours(problem: Problem) -> Run:
    """The compiled operator of this package."""
    device = problem.hidden.device.type
    if device not in native.devices():
        raise Unavailable(f"this package's compiled operators were not built for {device}")
    return _operator(problem, "native")


def reference(problem: Problem) -> Run:
    """The same operator in plain torch."""
    return _operator(problem, "reference")


def _operator(problem: Problem, impl: native.Implementation) -> Run:
    g = problem.granularities
    options: dict[str, Any] = {
        "rows": [problem.tokens] * g,
        "ce_weights": [1.0] * g,
        "z_weights": [0.0] * g,
        "kl_weights": [0.0] + [problem.kl] * (g - 1),
        "shared_tokens": True,
        "chunk_tokens": problem.chunk_tokens,
        "impl": impl,
    }
    scale = torch.tensor(1 / len(problem.hidden), device=problem.hidden.device)

    def run() -> Tensor:
        return multi_granularity_loss(
            problem.hidden, problem.weight, problem.targets, scale=scale, **options
        ).total

    return run


def naive(problem: Problem) -> Run:
    """All logits at once, softmax in fp32 (fp64 for fp64), a granularity after the other."""
    dtype = torch.promote_types(problem.hidden.dtype, torch.float32)
    g, tokens = problem.granularities, problem.tokens

    def run() -> Tensor:
        logits = problem.hidden @ problem.weight.t()
        total = torch.zeros((), dtype=dtype, device=logits.device)
        teacher: Tensor | None = None
        segments = zip(logits.split(tokens), problem.targets.split(tokens), strict=True)
        for segment, (z, targets) in enumerate(segments):
            z = z.to(dtype)
            total = total + F.cross_entropy(z, targets)
            if problem.kl and segment == 0:
                teacher = F.softmax(z.detach(), -1)
            elif teacher is not None:
                student = F.log_softmax(z, -1)
                total = total + problem.kl * F.kl_div(student, teacher, reduction="batchmean")
        return total / g

    return run


def linear_cross_entropy(problem: Problem) -> Run:
    """torch.nn.functional.linear_cross_entropy, chunked as its own defaults for the device say."""
    _refuse_kl(problem)
    function: Any = getattr(F, "linear_cross_entropy", None)
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise Unavailable(f"torch {torch.__version__} has none")
    return lambda: function(problem.hidden, problem.weight, problem.targets, options=options())


def compiled(problem: Problem) -> Run:
    """The usual recipe: a loop over chunks, each checkpointed, the whole of it torch.compile'd.

    Chunks are as long as those of `ours`, shapes are static.
    """
    g, tokens, kl = problem.granularities, problem.tokens, problem.kl
    most = problem.chunk_tokens or default_chunk_tokens(
        len(problem.weight), problem.hidden.device.type
    )
    length = math.ceil(tokens / math.ceil(tokens / most))

    def chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(F.linear(hidden, weight).float(), -1)  # [g, c, V]
        loss = F.nll_loss(log_p.flatten(0, 1), targets.flatten(), reduction="sum")
        if kl:
            teacher = log_p[:1].detach()
            loss = loss + kl * (teacher.exp() * (teacher - log_p[1:])).sum()
        return loss

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        parts = zip(
            hidden.view(g, tokens, -1).split(length, 1),
            targets.view(g, tokens).split(length, 1),
            strict=True,
        )
        for h, y in parts:
            total = total + checkpoint(
                chunk_loss, h, weight, y, use_reentrant=False, preserve_rng_state=False
            )
        return total / (g * tokens)

    function = torch.compile(loss, dynamic=False, fullgraph=True)
    return lambda: function(problem.hidden, problem.weight, problem.targets)


def liger(problem: Problem) -> Run:
    """Liger's fused linear cross-entropy of all rows, fp32 accumulation of the weight's gradient;
    with a KL its fused linear JSD at beta 0, that is KL(teacher || student), of the students."""
    _needs(problem, "liger_kernel")
    layers: Any = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    ce = layers.LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    if not problem.kl:
        return lambda: ce(problem.weight, problem.hidden, problem.targets)
    layers = import_module("liger_kernel.transformers.fused_linear_jsd")
    jsd = layers.LigerFusedLinearJSD(jsd_beta=0.0, accum_dtype=torch.float32)
    g, tokens, weight = problem.granularities, problem.tokens, problem.weight

    def run() -> Tensor:
        loss = ce(weight, problem.hidden, problem.targets)
        xl = problem.hidden[:tokens].detach()
        teacher = xl.repeat(g - 1, 1)
        divergence = jsd(problem.hidden[tokens:], weight, teacher, weight.detach(), None)
        return loss + problem.kl * (g - 1) / g * divergence

    return run


def liger_distillation(problem: Problem) -> Run:
    """Liger's chunked distillation loss (JSD at beta 0) of the students, their cross-entropy
    included; XL's cross-entropy as in `liger`. It accumulates in the operands' dtype."""
    if not problem.kl:
        raise Unavailable("is for cells with a KL")
    _needs(problem, "liger_kernel")
    g, tokens, weight = problem.granularities, problem.tokens, problem.weight
    layers: Any = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    ce = layers.LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    layers = import_module("liger_kernel.chunked_loss.jsd_loss")
    distil = layers.LigerFusedLinearJSDLoss(
        weight_hard_loss=1.0, weight_soft_loss=problem.kl, beta=0.0, temperature=1.0
    )

    def run() -> Tensor:
        xl, students = problem.hidden[:tokens], problem.hidden[tokens:]
        teacher = xl.detach().repeat(g - 1, 1)
        targets = problem.targets[tokens:]
        taught = distil(students, weight, teacher, weight.detach(), targets)
        return (ce(weight, xl, problem.targets[:tokens]) + (g - 1) * taught) / g

    return run


def cce(problem: Problem) -> Run:
    """Cut cross-entropy without its filter of small gradients; accumulating in fp32 ("cce_exact")
    where the release has it, which those up to 25.1.1 have not."""
    _refuse_kl(problem)
    _needs(problem, "cut_cross_entropy")
    function: Any = import_module("cut_cross_entropy").linear_cross_entropy
    options: dict[str, Any] = {"impl": "cce", "filter_eps": None}
    if "accum_c_fp32" in inspect.signature(function).parameters:
        options = {"impl": "cce_exact"}
    return lambda: function(problem.hidden, problem.weight, problem.targets, **options)


def quack(problem: Problem) -> Run:
    """QuACK's chunked linear cross-entropy, its own chunks and choice of kernels."""
    _refuse_kl(problem)
    _needs(problem, "quack")
    function: Any = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda: function(problem.hidden, problem.weight, problem.targets)


def _refuse_kl(problem: Problem) -> None:
    if problem.kl:
        raise Unavailable("has no KL")


def _needs(problem: Problem, module: str) -> None:
    if find_spec(module) is None:
        raise Unavailable("not installed")
    if not problem.hidden.is_cuda:
        raise Unavailable("runs on CUDA only")


FLOOR_CHUNKS = {"cpu": (256, 1024, 4096), "cuda": (2048, 8192, 32768)}  # rows


def floor(problem: Problem) -> Run:
    """The three GEMMs alone, over chunks of rows, with one buffer for logits and their gradient.

    d_weight is accumulated in fp32 on CUDA. A CPU's low-precision GEMMs give their own dtype only,
    so fp32 operands, converted beforehand, are tried too. The fastest of a few chunks is taken.
    """
    dtypes = {problem.hidden.dtype}
    if not problem.hidden.is_cuda:
        dtypes.add(torch.float32)
    most = FLOOR_CHUNKS["cuda" if problem.hidden.is_cuda else "cpu"]
    best, best_s = None, math.inf
    for dtype in dtypes:
        for rows in sorted({min(rows, len(problem.hidden)) for rows in most}):
            try:
                run = _gemms(problem, rows, dtype)
                seconds = min(_seconds(run) for _ in range(2))
            except torch.OutOfMemoryError:
                continue
            if seconds < best_s:
                best, best_s = run, seconds
    if best is None:
        raise torch.OutOfMemoryError
    return best


def _gemms(problem: Problem, chunk_rows: int, dtype: torch.dtype) -> Run:
    hidden, weight = (x.detach().to(dtype) for x in (problem.hidden, problem.weight))
    out_dtype = torch.float32 if hidden.is_cuda else dtype
    widens: dict[str, Any] = {} if dtype == out_dtype else {"out_dtype": out_dtype}

    def run() -> Tensor:
        buffer = hidden.new_empty(chunk_rows, len(weight))
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.empty_like(weight, dtype=out_dtype)
        parts = zip(hidden.split(chunk_rows), d_hidden.split(chunk_rows), strict=True)
        for i, (h, d_h) in enumerate(parts):
            z = torch.mm(h, weight.t(), out=buffer[: len(h)])
            torch.mm(z, weight, out=d_h)
            if i == 0:
                torch.mm(z.t(), h, out=d_weight, **widens)
            else:
                torch.addmm(d_weight, z.t(), h, out=d_weight, **widens)
        return d_hidden

    return run


def _seconds(run: Run) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


WAYS: dict[str, Callable[[Problem], Run]] = {
    "naive": naive,
    "ours": ours,
    "reference": reference,
    "linear_cross_entropy": linear_cross_entropy,
    "compiled": compiled,
    "liger": liger,
    "liger_distillation": liger_distillation,
    "cce": cce,
    "quack": quack,
    "floor": floor,
}
