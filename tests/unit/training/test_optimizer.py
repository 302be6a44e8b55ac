"""The fused AdamW of a run against torch's plain one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from matformer_dist.config import OptimizerConfig
from matformer_dist.training.engine import _optimizer

CONFIG = OptimizerConfig(lr=3e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.2)
STEPS = 5


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33, bias=False), nn.RMSNorm(33), nn.Linear(33, 3, bias=False))


def gradients(lm: nn.Module, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in lm.parameters()]


def stepped(lm: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    for step in range(STEPS):
        for parameter, gradient in zip(lm.parameters(), gradients(lm, step), strict=True):
            parameter.grad = gradient.to(parameter.device)
        optimizer.step()
    return [parameter.detach().cpu() for parameter in lm.parameters()]


def plain(lm: nn.Module) -> torch.optim.Optimizer:
    """Decay on matrices, none on the norm's weights."""
    groups = [
        {"params": [p for p in lm.parameters() if p.dim() == dim], "weight_decay": decay}
        for dim, decay in ((2, CONFIG.weight_decay), (1, 0.0))
    ]
    arguments = {"lr": CONFIG.lr, "betas": CONFIG.betas, "eps": CONFIG.eps}
    return torch.optim.AdamW(groups, **arguments, foreach=False, fused=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [0, 1])
def test_fused_steps_match_plain_ones(stage: int) -> None:
    ours, theirs = model(), model()
    optimizer = _optimizer(ours, CONFIG, stage, offload=False)
    assert all(group["fused"] for group in optimizer.param_groups)
    begun = [parameter.detach().clone() for parameter in ours.parameters()]
    found, wanted = stepped(ours, optimizer), stepped(theirs, plain(theirs))
    for one, other, before in zip(found, wanted, begun, strict=True):
        assert (other - before).abs().min() > 0
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_a_step_that_is_called_off_changes_nothing() -> None:
    lm = model()
    before = [parameter.detach().clone() for parameter in lm.parameters()]
    optimizer = _optimizer(lm, CONFIG, stage=0, offload=False)
    optimizer.is_called_off = True  # type: ignore[attr-defined]
    assert all(map(torch.equal, stepped(lm, optimizer), before))
