"""Rows cut over the tensor-parallel ranks: what is learnt must be what whole rows learn."""

from __future__ import annotations

from typing import Any

import pytest

from matformer_dist.config import Config
from matformer_dist.errors import UserError
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import SEQ_LEN, tiny_config, train_each

STEPS = 6
PAPER = {"ffn": "gelu", "norm": "layernorm", "tied_embeddings": True}
GROUPED = {"n_heads": 8, "n_kv_heads": 4, "kv_channels": 6}
# name: objective, model, sequences of a micro-batch
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "joint": ({"kind": "joint", "distillation": 0.5, "z_loss": 1e-3}, {}, 1),
    "per_sequence": ({"kind": "per_sequence"}, GROUPED, 2),
    "sandwich, paper": ({"kind": "sandwich"}, PAPER, 2),  # three copies, cut over four ranks
}
# tensor-parallel ranks, ZeRO stage
LAYOUTS = [(2, 0), (2, 1), (2, 2), (2, 3), (4, 0), (4, 1), (4, 3)]


def configured(name: str, tensor: int, stage: int, sequence: bool) -> Config:
    objective, model, sequences = CASES[name]
    return tiny_config(
        objective=objective,
        model=model,
        parallel={"tensor": tensor, "sequence": sequence},
        training={"steps": STEPS, "micro_batch_size": sequences},
        deepspeed={"zero_optimization": {"stage": stage}},
    )


def layouts() -> dict[str, Config]:
    """Every objective at every layout that the place in the list gives it, "name|TP ZeRO"."""
    names = list(CASES)
    return {
        f"{name}|{tensor} {stage}": configured(name, tensor, stage, sequence=True)
        for i, (tensor, stage) in enumerate(LAYOUTS)
        for j, name in enumerate(names)
        if name == "joint" or (i + j) % 2
    }


@pytest.mark.timeout(1500)
def test_losses_and_gradient_norms_match_whole_rows() -> None:
    """TP 2 and 4 x ZeRO 0 to 3 against plain tensor parallelism of two ranks, and one rank."""
    one = {name: configured(name, 1, 0, sequence=False) for name in CASES}
    two = {name: configured(name, 2, 0, sequence=False) for name in CASES}
    alone = run_ranks(1, train_each, one)[0]
    plain = run_ranks(2, train_each, two)[0]
    for histories in run_ranks(4, train_each, layouts(), timeout_s=1500):
        for name, history in histories.items():
            for wanted in (alone, plain):
                expected = wanted[name.split("|")[0]]
                assert len(history) == len(expected) == STEPS
                for step, (found, other) in enumerate(zip(history, expected, strict=True)):
                    assert found == pytest.approx(other, rel=1e-5), (name, step)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.sequence is true, but .* which is 1"):
        tiny_config(parallel={"tensor": 1, "sequence": True})
    with pytest.raises(UserError, match=rf"seq_len {SEQ_LEN - 1} does not divide .* is {SEQ_LEN}"):
        tiny_config(parallel={"tensor": 2, "sequence": True}, training={"seq_len": SEQ_LEN - 1})
