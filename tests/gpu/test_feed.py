"""Batches that are copied ahead, on a stream of their own, are whole when they are read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from matformer_dist.data.feed import Batch, Feed
from tests.gpu.device import CUDA


def source(count: int) -> Iterator[Batch]:
    for i in range(count):
        yield torch.full((512, 2048), i), torch.full((512, 2048), -i)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_match_the_source_while_the_device_is_busy(ahead: int) -> None:
    if CUDA.type != "cuda":
        pytest.skip("streams are a GPU's")
    work = torch.randn(2048, 2048, device=CUDA)
    sums = []
    with Feed(source(20), CUDA, ahead) as feed:
        for tokens, targets in feed:
            work = work @ work / 2048
            sums.append(torch.stack([tokens.sum(), targets.sum(), tokens.amax(), tokens.amin()]))
            del tokens, targets  # their memory may be taken again while they are read
    size = 512 * 2048
    assert torch.stack(sums).tolist() == [[i * size, -i * size, i, i] for i in range(20)]
