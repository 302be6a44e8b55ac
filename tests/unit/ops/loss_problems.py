"""What the loss is asked in tests, and the definition: whole logits, torch's losses, autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from matformer_dist.ops import native
from matformer_dist.ops.loss_operator import compute
from matformer_dist.ops.multi_granularity_loss import LossOutput, multi_granularity_loss
from matformer_dist.ops.vocab_shard import VocabShard

IGNORED = -100
SCALE = 0.125


@dataclass(frozen=True)
class Problem:
    """Arguments of the operator, and how to draw its operands."""

    rows: tuple[int, ...] = (5, 5, 5)
    shared: bool = True
    ce: tuple[float, ...] = (0.5, 0.3, 0.2)
    z: tuple[float, ...] = (0.01, 0.02, 0.0)
    kl: tuple[float, ...] = (0.0, 0.4, 0.7)
    temperature: float = 1.0
    vocab: int = 11
    padding: int = 0  # rows of the weight beyond the vocabulary
    d_model: int = 4
    ignored: str = "some"
    largest_logit: float = 5.0
    dtype: torch.dtype = torch.float64
    impl: native.Implementation = "auto"

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """hidden and weight, which need gradients, and targets."""
        generator = torch.Generator().manual_seed(0)

        def draw(rows: int) -> Tensor:
            return torch.randn(rows, self.d_model, generator=generator, dtype=torch.float64)

        hidden, weight = draw(sum(self.rows)), draw(self.vocab + self.padding)
        if len(hidden):
            weight *= self.largest_logit / (hidden @ weight[: self.vocab].t()).abs().max()
        tokens = self.rows[0] if self.shared else len(hidden)
        targets = torch.randint(self.vocab, (tokens,), generator=generator)
        if self.ignored != "none":
            targets[:: 1 if self.ignored == "all" else 3] = IGNORED
        if self.shared:
            targets = targets.repeat(len(self.rows))
        hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
        return hidden.requires_grad_(), weight.requires_grad_(), targets

    def run(self, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> LossOutput:
        """The operator."""
        if "vocab" not in options:
            options["vocab"] = VocabShard(0, self.vocab)
        options = {"scale": torch.tensor(SCALE), "impl": self.impl, **options}
        return multi_granularity_loss(
            hidden,
            weight,
            targets,
            rows=self.rows,
            ce_weights=self.ce,
            z_weights=self.z,
            kl_weights=self.kl,
            temperature=self.temperature,
            shared_tokens=self.shared,
            **options,
        )

    def run_inside(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        check_targets: bool = False,
    ) -> tuple[Tensor, ...]:
        """What the operator does inside, without it: visible to torch's dispatch modes."""
        vocab = VocabShard(0, self.vocab)
        compiled = self.impl == "native"
        with torch.no_grad():
            return compute(
                hidden, weight, targets, torch.full((), SCALE, device=hidden.device), self.rows,
                self.ce, self.z, self.kl, self.shared, self.temperature, IGNORED, vocab.key,
                chunk_tokens, check_targets, compiled, hidden.requires_grad, weight.requires_grad,
            )  # fmt: skip

    def define(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> LossOutput:
        """The definition. GEMM in the operands' dtype, softmax in fp32 or better."""
        logits = hidden @ weight[: self.vocab].t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        segments = list(zip(logits.split(self.rows), targets.split(self.rows), strict=True))
        teacher, tau = segments[0][0].detach(), self.temperature
        columns = []
        for i, (z, y) in enumerate(segments):
            valid = y != IGNORED
            nll = F.cross_entropy(z, y, reduction="none", ignore_index=IGNORED)
            lse, kl, best = z.logsumexp(-1), torch.zeros_like(nll), z.argmax(-1)
            if self.kl[i]:
                p, q = ((t / tau).log_softmax(-1) for t in (teacher, z))
                kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * valid
            loss = self.ce[i] * nll + self.z[i] * lse**2 + self.kl[i] * tau**2 * kl
            columns.append((loss * valid, nll, lse, kl, best))
        loss, nll, lse, kl, best = (torch.cat(column) for column in zip(*columns, strict=True))
        return LossOutput(SCALE * loss.sum(), nll, lse, kl, best if self.shared else None)

    def truth(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: float = 1.0
    ) -> tuple[LossOutput, tuple[Tensor, ...]]:
        """The definition in fp64, and upstream times the gradients of hidden and weight."""
        wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        output = self.define(wide[0], wide[1], targets)
        return output, torch.autograd.grad(
            output.total, wide, torch.full_like(output.total, upstream)
        )


PROBLEMS = {
    "joint": Problem(),
    "temperature 2": Problem(temperature=2.0),
    "temperature 0.7": Problem(temperature=0.7),
    "only the last learns": Problem(kl=(0, 0, 0.5), temperature=3.0),
    "KL alone": Problem(ce=(0, 0, 0), z=(0, 0, 0)),
    "no KL": Problem(kl=(0, 0, 0)),
    "z-loss alone": Problem(ce=(0, 0, 0), kl=(0, 0, 0)),
    "padding rows": Problem(padding=5, temperature=2.0),
    "nothing ignored": Problem(ignored="none"),
    "all ignored": Problem(ignored="all", temperature=2.0),
    "logits up to 100": Problem(largest_logit=100.0, temperature=2.0),
    "one segment": Problem(rows=(7,), ce=(1,), z=(0.1,), kl=(0,)),
    "one token, two words": Problem(rows=(1, 1, 1), vocab=2, d_model=1, ignored="none"),
    "separate": Problem(
        rows=(6, 0, 1, 5), shared=False, ce=(1, 0.5, 0.25, 2), z=(0.1, 0, 0, 0.3), kl=(0,) * 4
    ),
    "no tokens": Problem(rows=(0, 0, 0)),
    "no rows": Problem(rows=(0, 0), shared=False, ce=(1, 1), z=(0, 0), kl=(0, 0)),
}


NATIVE = pytest.mark.skipif(bool(native.FAULT), reason=f"no compiled operators: {native.FAULT}")
KINDS: dict[str, tuple[torch.dtype, native.Implementation]] = {
    "fp64": (torch.float64, "reference"),
    "fp32": (torch.float32, "reference"),
    "native": (torch.float32, "native"),
}


def of_every_kind(*names: str, **changes: Any) -> pytest.MarkDecorator:
    """Parametrizes `problem` with those PROBLEMS, or all: in fp64, in fp32, and compiled."""
    return pytest.mark.parametrize(
        "problem",
        [
            pytest.param(
                replace(PROBLEMS[name], dtype=dtype, impl=impl, **changes),
                id=f"{name}-{kind}",
                marks=NATIVE if impl == "native" else (),
            )
            for name in names or PROBLEMS
            for kind, (dtype, impl) in KINDS.items()
        ],
    )


def tolerances(problem: Problem) -> dict[str, Any]:
    """Of assert_close. In fp32 logits are off by some units of the largest, and so is all else."""
    if problem.dtype == torch.float64:
        return {"rtol": 1e-7, "atol": 1e-7}
    eps = torch.finfo(torch.float32).eps
    return {"rtol": 16 * eps, "atol": 16 * eps * max(1.0, math.sqrt(problem.largest_logit))}
