"""Checks of a run against its directory, tokenizer and checkpoint, before anything is built."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping
from typing import Any

from matformer_dist.config import Config, load_config
from matformer_dist.errors import UserError
from matformer_dist.parallel.topology import Topology
from matformer_dist.run_directory import list_checkpoints
from matformer_dist.training.engine import zero_stage

# A run may go on with these changed; every other section decides what the weights become.
_FREE_SECTIONS = ("run", "evaluation", "checkpoint", "logging")
_PACKAGES = ("matformer_dist", "torch", "deepspeed", "megatron-core")


def check_run_directory(config: Config) -> None:
    """UserError where the run directory holds checkpoints of another configuration."""
    path = config.run.dir / "config.yaml"
    if not path.exists() or not list_checkpoints(config.run.dir):
        return
    before = load_config(path).model_dump(mode="json")
    now = config.model_dump(mode="json")
    changed = [
        f"{section}.{key} (was {before[section].get(key)!r}, now {now[section].get(key)!r})"
        for section in now
        if section not in _FREE_SECTIONS
        for key in sorted({*now[section], *before[section]})
        if now[section].get(key) != before[section].get(key)
    ]
    if changed:
        raise UserError(
            f"the run directory {config.run.dir} holds a run with another configuration: "
            f"{'; '.join(changed)}; set these back, or choose another run.dir"
        )


def check_vocabulary(config: Config, tokenizer_size: int) -> int:
    """The model's vocabulary size; UserError where the configuration's is not the tokenizer's."""
    if config.model.vocab_size not in (None, tokenizer_size):
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer "
            f"{config.data.tokenizer} has {tokenizer_size} pieces; leave model.vocab_size out, or "
            "set data.tokenizer to the one that the model is meant for"
        )
    return tokenizer_size


def check_monitors(config: Config) -> None:
    """UserError where the run is to log to something that is not installed."""
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "logging.wandb is true, but wandb is not installed; pip install wandb, or set it false"
        )


def topology_of(config: Config, topology: Topology) -> dict[str, int]:
    """The layout that a checkpoint's files depend on."""
    return {
        "tensor": topology.tensor.size,
        "data": topology.data_size,
        "zero_stage": zero_stage(config),
    }


def check_topology(saved: Mapping[str, int], now: Mapping[str, int], path: object) -> None:
    """UserError where a checkpoint was saved by another layout of ranks."""
    names = {
        "tensor": "parallel.tensor",
        "data": "data-parallel ranks",
        "zero_stage": "deepspeed.zero_optimization.stage",
    }
    changed = [
        f"{names[key]} was {saved[key]} and is now {now[key]}"
        for key in names
        if saved[key] != now[key]
    ]
    if changed:
        raise UserError(
            f"the checkpoint {path} was saved by another layout: {'; '.join(changed)}; resume "
            "with the layout it was saved by (moving between layouts is not there yet)"
        )


def versions() -> dict[str, str]:
    """Versions that a checkpoint's reader may want to know."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {**found, "python": platform.python_version()}


def digest(config: Config) -> str:
    return hashlib.sha256(config.to_yaml().encode()).hexdigest()


def describe(config: Config, topology: Topology, vocab_size: int) -> dict[str, Any]:
    """The parts of a checkpoint's manifest that hold for the whole run."""
    nesting = config.granularities
    return {
        "format": 1,
        "topology": topology_of(config, topology),
        "model": config.model.model_dump(mode="json"),
        "vocab_size": vocab_size,
        "nesting": {"widths": list(nesting.widths), "names": list(nesting.names)},
        "precision": config.training.precision,
        "tokenizer_sha256": hashlib.sha256(config.data.tokenizer.read_bytes()).hexdigest(),
        "config_sha256": digest(config),
        "versions": versions(),
    }
