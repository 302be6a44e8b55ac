"""Names of devices: what is there is taken, all else is named."""

from __future__ import annotations

import pytest
import torch

from matformer_dist.errors import UserError
from matformer_dist.inference.device import choose_device


def test_the_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, expected in ((0, "cpu"), (2, "cuda")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert choose_device() == torch.device(expected)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match=r"cuda:2: here is cuda:0 to cuda:1; choose"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "meta", "mps"])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--device '{name}' must be cpu, cuda or cuda:N"):
        choose_device(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="--device cuda: here is no GPU"):
        choose_device("cuda")
