"""Tiny training runs on synthetic tokens and images, for parity between layouts of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from matformer_dist.config import Config
from matformer_dist.config_file import validate_config
from matformer_dist.config_language import LanguageConfig, as_language
from matformer_dist.config_vision import VisionConfig
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matformer import MatFormer
from matformer_dist.parallel.topology import Topology, initialize, leave_groups
from matformer_dist.training.engine import Engine, build_model, learning_rate
from matformer_dist.training.metrics import LossSums
from matformer_dist.training.objective import Objective
from matformer_dist.training.setup import choose_operators

VOCAB = 61  # odd: the last tensor-parallel rank holds padding
SEQ_LEN = 12
CLASSES = 7


def tiny_config(**sections: Any) -> LanguageConfig:
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
    return as_language(validate_config(tree, "test"), "the test")


def tiny_vision_config(**sections: Any) -> VisionConfig:
    """An encoder that divides over four ranks, as `tiny_config` is a language model."""
    tree: dict[str, Any] = {
        "task": "vision",
        "run": {"dir": "unused"},
        "model": {
            "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 64, "init_std": 0.1,
            "image_size": 6, "patch_size": 2, "channels": 1,
        },
        "nesting": {"widths": [8, 16, 40, 64]},
        "objective": {"kind": "joint"},
        "parallel": {"tensor": 1},
        "data": {"train": "digits"},
        "optimizer": {"lr": 3e-3, "grad_clip": 0.5},
        "schedule": {"warmup_steps": 3},
        "training": {
            "steps": 20, "micro_batch_size": 1, "global_batch_size": 4, "precision": "fp32",
        },
        "logging": {"tensorboard": False},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    config = validate_config(tree, "test")
    assert isinstance(config, VisionConfig)
    return config


def outputs_of(config: Config) -> int:
    return VOCAB if isinstance(config, LanguageConfig) else CLASSES


def synthetic_batches(
    config: Config, topology: Topology, outputs: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches: a global batch is the same whatever the layout of ranks."""
    size = config.training.micro_batch_size
    generator = torch.Generator().manual_seed(99)
    while True:
        inputs, targets = _global_batch(config, outputs or outputs_of(config), generator)
        pairs = list(zip(inputs.split(size), targets.split(size), strict=True))
        yield from pairs[topology.data_rank :: topology.data_size]


def _global_batch(
    config: Config, outputs: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """With something to learn."""
    size = config.training.global_batch_size
    if isinstance(config, VisionConfig):
        model = config.model
        labels = torch.randint(0, outputs, (size, 1), generator=generator)
        images = torch.randn(
            (size, model.channels, model.image_size, model.image_size), generator=generator
        )
        return images + labels[:, :, None, None], labels
    assert isinstance(config, LanguageConfig)
    shape = (size, config.training.seq_len + 1)
    sequences = torch.randint(0, outputs, shape, generator=generator)
    sequences[:, ::3] = 7
    return sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()


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


def train(config: Config, topology: Topology) -> tuple[list[dict[str, float]], Engine, MatFormer]:
    """Losses per granularity and "grad_norm" of every step; the engine and its model."""
    model = build_model(config, outputs_of(config), topology)
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


def train_each(configs: Mapping[str, Config]) -> dict[str, list[dict[str, float]]]:
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
