"""Checks of a run against its directory, tokenizer and checkpoint, before anything is built."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator, Mapping

from matformer_dist.config import Config, load_config
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.errors import UserError
from matformer_dist.parallel.topology import Topology
from matformer_dist.run_directory import Checkpoint, Layout, Manifest, read_checkpoints
from matformer_dist.training.engine import zero_stage

# A run may go on with these changed. All else decides what its weights become; how a checkpoint's
# files are laid out and which tokenizer it belongs to is checked against its manifest.
_FREE_SECTIONS = ("run", "parallel", "evaluation", "checkpoint", "logging", "deepspeed")
_FREE_KEYS = {
    "data": ("tokenizer", "workers"),
    "training": ("steps", "tokens", "micro_batch_size", "compile", "activation_checkpointing"),
}
# Neither changes what trained weights compute.
_FREE_OF_MODEL = ("init_std", "max_seq_len", "vocab_size")
_PACKAGES = ("matformer_dist", "torch", "deepspeed", "megatron-core")


def check_run_directory(config: Config) -> None:
    """UserError where the run directory holds checkpoints of another configuration."""
    path = config.run.dir / "config.yaml"
    if not path.exists() or not any(read_checkpoints(config.run.dir)):
        return
    before = load_config(path).model_dump(mode="json")
    now = config.model_dump(mode="json")
    changed = [
        change
        for section in now
        if section not in _FREE_SECTIONS
        for change in _changes(before[section], now[section], _FREE_KEYS.get(section, ()), section)
    ]
    if changed:
        raise UserError(
            f"the run directory {config.run.dir} holds a run with another configuration: "
            f"{'; '.join(changed)}; set these back, or choose another run.dir"
        )


def _changes(
    before: Mapping[str, object], now: Mapping[str, object], free: tuple[str, ...], prefix: str
) -> Iterator[str]:
    for key in sorted({*now, *before}.difference(free)):
        if now.get(key) != before.get(key):
            yield f"{prefix}.{key} (was {before.get(key)!r}, now {now.get(key)!r})"


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> int:
    """The model's vocabulary size; UserError where the configuration's is not the tokenizer's."""
    if config.model.vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer "
            f"{config.data.tokenizer} has {tokenizer.vocab_size} pieces; leave model.vocab_size "
            "out, or set data.tokenizer to the one that the model is meant for"
        )
    return tokenizer.vocab_size


def check_monitors(config: Config) -> None:
    """UserError where the run is to log to something that is not installed."""
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "logging.wandb is true, but wandb is not installed; pip install wandb, or set it false"
        )


def check_checkpoint(checkpoint: Checkpoint, now: Manifest) -> None:
    """UserError where a checkpoint is not of the model, tokenizer and layout of this run."""
    saved = checkpoint.manifest
    wrong = list(
        _changes(
            saved.model.model_dump(mode="json"),
            now.model.model_dump(mode="json"),
            _FREE_OF_MODEL,
            "model",
        )
    )
    pairs = {
        "nesting.widths": (list(saved.nesting.widths), list(now.nesting.widths)),
        "nesting.names": (list(saved.nesting.names), list(now.nesting.names)),
        "vocabulary": (saved.vocab_size, now.vocab_size),
        "SHA-256 of the tokenizer": (saved.tokenizer_sha256[:12], now.tokenizer_sha256[:12]),
        "training.precision": (saved.precision, now.precision),
    }
    wrong += [
        f"{key} (was {was!r}, now {is_!r})" for key, (was, is_) in pairs.items() if was != is_
    ]
    if wrong:
        raise UserError(
            f"the checkpoint {checkpoint.path} is of another model: {'; '.join(wrong)}; set these "
            "back, or choose another checkpoint.resume"
        )
    _check_layout(checkpoint, now.layout)


def _check_layout(checkpoint: Checkpoint, now: Layout) -> None:
    saved = checkpoint.manifest.layout
    pairs = {
        "parallel.tensor": (saved.tensor, now.tensor),
        "the number of data-parallel ranks": (saved.data, now.data),
        "deepspeed.zero_optimization.stage": (saved.zero_stage, now.zero_stage),
    }
    changed = [
        f"{key} was {was} and is now {is_}" for key, (was, is_) in pairs.items() if was != is_
    ]
    if changed:
        raise UserError(
            f"the checkpoint {checkpoint.path} was saved by another layout: {'; '.join(changed)}; "
            "resume with the layout it was saved by (moving between layouts is not there yet)"
        )


def describe(
    config: Config, topology: Topology, tokenizer_sha256: str, vocab_size: int, step: int = 0
) -> Manifest:
    """The manifest of a checkpoint at `step`, but for its files."""
    consumed = step * config.training.global_batch_size
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return Manifest(
        step=step,
        consumed_sequences=consumed,
        tokens=consumed * config.training.seq_len,
        layout=Layout(
            tensor=topology.tensor.size,
            data=topology.data_size,
            zero_stage=zero_stage(config),
        ),
        model=config.model,
        nesting=config.granularities,
        vocab_size=vocab_size,
        precision=config.training.precision,
        tokenizer_sha256=tokenizer_sha256,
        config_sha256=hashlib.sha256(config.to_yaml().encode()).hexdigest(),
        versions={**packages, "python": platform.python_version()},
        files={},
    )
