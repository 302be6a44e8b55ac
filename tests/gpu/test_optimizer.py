"""The fused AdamW of a run on a GPU against torch's plain one on a CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("deepspeed", reason="the optimizer is made beside DeepSpeed's engine")

from matformer_dist.training.engine import _optimizer
from tests.gpu.device import CUDA
from tests.unit.training.test_optimizer import CONFIG, model, plain, stepped


def test_fused_steps_match_plain_ones() -> None:
    ours, theirs = model().to(CUDA), model()
    found = stepped(ours, _optimizer(ours, CONFIG, stage=1, offload=False))
    torch.testing.assert_close(found, stepped(theirs, plain(theirs)), rtol=1e-6, atol=1e-7)
