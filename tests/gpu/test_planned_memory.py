"""Memory of training steps as planned against the most that the CUDA allocator gave."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="steps are DeepSpeed's")
pytest.importorskip("megatron.core", reason="MatLM's layers need megatron-core")

from matformer_dist.parallel.topology import initialize
from matformer_dist.planning.layout import PlannedRun
from matformer_dist.planning.memory import estimate_memory
from matformer_dist.training.engine import Engine, build_model
from matformer_dist.training.setup import choose_operators
from tests.distributed.test_plan import case
from tests.distributed.training_cases import passes, synthetic_batches
from tests.gpu.device import CUDA, needs_free_bytes

# Large beside what cuBLAS keeps for itself, tens of MiB.
SIZES = {"d_model": 1024, "n_layers": 6, "d_ff": 4096, "seq_len": 1024, "micro_batch_size": 4}
PAPER = {"ffn": "gelu", "norm": "layernorm", "tied_embeddings": True}
CASES: dict[str, dict[str, Any]] = {
    "per_sequence": {},
    "joint": {"kind": "joint", "distillation": 0.5},
    "joint, the paper's": {"kind": "joint", **PAPER},
    "joint, selective checkpointing": {"kind": "joint", "activation_checkpointing": "selective"},
    "joint, full checkpointing": {"kind": "joint", "activation_checkpointing": "full"},
    "fp32": {"precision": "fp32"},
    "ZeRO 2": {"stage": 2},
    "ZeRO 3": {"stage": 3},
}
VOCABULARY = 32_000


@pytest.mark.parametrize("name", CASES)
def test_memory_is_within_a_tenth_of_what_is_allocated(name: str) -> None:
    needs_free_bytes(16 * 2**30)
    config = case(**{**SIZES, "global_batch_size": 8, "precision": "bf16", **CASES[name]})
    topology = initialize(1)
    model = build_model(config, VOCABULARY, topology)
    choose_operators(config, topology)
    engine = Engine(config, model, topology)
    del model
    batches = ((x.to(CUDA), y.to(CUDA)) for x, y in synthetic_batches(config, topology, VOCABULARY))
    before = torch.cuda.memory_allocated()
    for step in range(3):
        torch.cuda.reset_peak_memory_stats()
        engine.train_step(batches, passes(config, engine, topology, step), 1e-3)
    most = torch.cuda.max_memory_allocated()
    engine.deepspeed.destroy()
    planned = estimate_memory(PlannedRun(config, VOCABULARY, 1, "cuda"))
    print(f"{name}: {planned}; measured {most / 2**30:.2f} GiB, before steps {before / 2**30:.2f}")
    assert planned.total_bytes == pytest.approx(most, rel=0.1)
