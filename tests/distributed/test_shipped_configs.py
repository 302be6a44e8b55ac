"""Every configuration that is shipped trains, shrunken: its objective, precision and ZeRO stage."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

from matformer_dist.config import Config
from matformer_dist.config_file import load_config, validate_config
from matformer_dist.parallel.topology import initialize
from matformer_dist.planning.plan import IF_OPEN
from matformer_dist.training.engine import Engine, build_model
from matformer_dist.training.metrics import LossSums
from matformer_dist.training.setup import choose_operators
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import (
    CLASSES,
    SEQ_LEN,
    VOCAB,
    outputs_of,
    passes,
    synthetic_batches,
)

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
LEARNING_RATE = 3e-3  # of so small a model


def shrunken(path: Path) -> Config:
    """Two layers of a few neurons, of the same kind and proportions; three steps."""
    tree = load_config(path, if_open=IF_OPEN).model_dump(mode="json")
    model, training = tree["model"], tree["training"]
    ratio = model["d_ff"] / model["d_model"]
    model["d_model"] = 4 * model["n_heads"]
    model["d_ff"] = 16 * round(ratio * model["d_model"] / 16)
    model |= {"n_layers": 2, "init_std": 0.1}
    training |= {"steps": 3, "micro_batch_size": 2, "global_batch_size": 8}
    if tree["task"] == "vision":
        model |= {"image_size": 6, "patch_size": 2, "classes": CLASSES}
        training |= {"images": None}
    else:
        model |= {"max_seq_len": SEQ_LEN, "vocab_size": VOCAB}
        training |= {"tokens": None, "seq_len": SEQ_LEN}
    tree["schedule"]["warmup_steps"] = 1
    tree["checkpoint"]["initial"] = None
    tree["logging"]["tensorboard"] = False
    return validate_config(tree, str(path))


def train_on_one_batch(configs: dict[str, Config]) -> dict[str, list[dict[str, float]]]:
    """Losses by granularity of every step on the same samples, each dealt as before."""
    topology = initialize(1)
    histories: dict[str, list[dict[str, float]]] = {}
    for name, config in configs.items():
        model = build_model(config, outputs_of(config), topology)
        choose_operators(config, topology)
        engine = Engine(config, model, topology)
        sums = LossSums(config.granularities, topology)
        batch = list(islice(synthetic_batches(config, topology), engine.accumulation))
        histories[name] = []
        for _ in range(config.training.total_steps):
            sums.add(
                engine.train_step(iter(batch), passes(config, engine, topology, 0), LEARNING_RATE)
            )
            histories[name].append({**sums.take(), "grad_norm": engine.grad_norm})
        engine.deepspeed.destroy()
    return histories


def test_shipped_configurations_train_shrunken() -> None:
    configs = {path.stem: shrunken(path) for path in sorted(CONFIGS.rglob("*/*.yaml"))}
    assert len(configs) == 13
    for rank in run_ranks(2, train_on_one_batch, configs):
        for name, history in rank.items():
            assert len(history) == 3, name
            for step in history:
                assert {"S", "M", "L", "XL", "grad_norm"} == set(step), name
                assert all(math.isfinite(value) for value in step.values()), name
            for granularity in ("S", "M", "L", "XL"):
                assert history[-1][granularity] < history[0][granularity], (name, granularity)
