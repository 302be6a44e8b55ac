"""Tiny training runs on synthetic tokens, for parity between layouts of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from matformer_dist.config import Config
from matformer_dist.config_file import validate_config
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matlm import MatLM
from matformer_dist.parallel.topology import Topology, initialize, leave_groups
from matformer_dist.training.engine import Engine, build_model, learning_rate
from matformer_dist.training.metrics import LossSums
from matformer_dist.training.objective import Objective
from matformer_dist.training.setup import choose_operators

VOCAB = 61  # odd: the last tensor-parallel rank holds padding
SEQ_LEN = 12


def tiny_config(**sections: Any) -> Config:
    """A model that divides over four ranks; `sections` are merged over it, section by section."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused"},
        "model": {
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "d_ff": 64,
            "max_seq_len": SEQ_LEN,
            "init_std": 0.1,
        },
        "nesting": {"widths": [8, 16, 40, 64]},
        "objective": {"kind": "joint"},
        "parallel": {"tensor": 1},
        "data": {"train": [[1, "unused"]], "tokenizer": "unused"},
        "optimizer": {"lr": 3e-3, "grad_clip": 0.5},
        "schedule": {"warmup_steps": 3},
        "training": {
            "steps": 20,
            "seq_len": SEQ_LEN,
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "precision": "fp32",
        },
        "logging": {"tensorboard": False},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return validate_config(tree, "test")


def synthetic_batches(
    config: Config, topology: Topology, vocab_size: int = VOCAB
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches: a global batch is the same whatever the layout of ranks."""
    size = config.training.micro_batch_size
    generator = torch.Generator().manual_seed(99)
    while True:
        shape = (config.training.global_batch_size, config.training.seq_len + 1)
        sequences = torch.randint(0, vocab_size, shape, generator=generator)
        sequences[:, ::3] = 7  # something to learn
        micro_batches = sequences.split(size)
        for chunk in micro_batches[topology.data_rank :: topology.data_size]:
            yield chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


def passes(config: Config, engine: Engine, topology: Topology, step: int) -> Iterator[Pass]:
    objective = Objective(config.objective, config.granularities, config.model.n_layers, 5)
    ranks = topology.data_size
    for i in range(engine.accumulation):
        yield objective.plan(
            step,
            i * ranks + topology.data_rank,
            engine.accumulation * ranks,
            config.training.micro_batch_size,
        )


def train(config: Config, topology: Topology) -> tuple[list[dict[str, float]], Engine, MatLM]:
    """Losses per granularity and "grad_norm" of every step; the engine and its model."""
    model = build_model(config, VOCAB, topology)
    choose_operators(config, topology)
    engine = Engine(config, model, topology)
    batches = synthetic_batches(config, topology)
    sums = LossSums(config.granularities, topology)
    history = []
    for step in range(config.training.total_steps):
        rate = learning_rate(config.schedule, config.optimizer.lr, step, 20)
        results = engine.train_step(batches, passes(config, engine, topology, step), rate)
        sums.add(results)
        history.append({**sums.take(), "grad_norm": engine.grad_norm})
    return history, engine, model


def train_each(configs: dict[str, Config]) -> dict[str, list[dict[str, float]]]:
    """Histories of several runs, one after another on the same ranks."""
    histories = {}
    for tensor in sorted({config.parallel.tensor for config in configs.values()}):
        topology = initialize(tensor)  # once: every gloo group costs threads
        for name, config in configs.items():
            if config.parallel.tensor == tensor:
                histories[name], engine, _ = train(config, topology)
                engine.deepspeed.destroy()
        leave_groups()
    return histories
