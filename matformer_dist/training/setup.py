"""Checks of a run against its directory and checkpoint, before anything is built."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator, Mapping

from matformer_dist.config import Config, ModelConfig
from matformer_dist.config_file import load_config
from matformer_dist.config_vision import VisionObjectiveConfig
from matformer_dist.deepspeed_section import zero_options
from matformer_dist.errors import UserError
from matformer_dist.ops import native
from matformer_dist.parallel.topology import Topology
from matformer_dist.run_directory import Checkpoint, Layout, Manifest, read_checkpoints

# A run may go on with these changed, and with another length (whoever changes that is told what it
# does to the schedule). All else decides what its weights become. Which tokenizer a checkpoint
# belongs to, and how its files are laid out, is checked against its manifest.
_FREE_SECTIONS = ("task", "run", "nesting", "parallel", "evaluation", "checkpoint", "logging")
_FREE_KEYS = {
    "model": ("init_std", "max_seq_len", "vocab_size", "classes"),
    "data": ("tokenizer", "workers", "prefetch"),
    "training": (
        "steps", "tokens", "images", "compile", "operators", "activation_checkpointing",
        "max_skipped_steps", "hang_timeout", "micro_batch_size",
    ),
    "deepspeed": (
        "aio", "comms_logger", "flops_profiler", "memory_breakdown", "steps_per_print",
        "tensorboard", "wandb", "wall_clock_breakdown", "zero_optimization",
    ),
}  # fmt: skip
_PACKAGES = ("matformer_dist", "torch", "deepspeed", "megatron-core")


def check_run_directory(config: Config) -> list[str]:
    """UserError where the run directory holds checkpoints of another configuration.

    Returns what whoever goes on with that run should know.
    """
    path = config.run.dir / "config.yaml"
    found = read_checkpoints(config.run.dir)
    # At step 0 alone, as in an imported run, no setting has decided anything yet.
    if not path.exists() or not (found.damaged or any(one.step for one in found.complete)):
        return []
    saved = load_config(path)
    if saved.task != config.task:
        raise UserError(
            f"the run directory {config.run.dir} holds a run of task: {saved.task}, this one is of "
            f"task: {config.task}; choose another run.dir"
        )
    before, now = saved.model_dump(mode="json"), config.model_dump(mode="json")
    changed = [
        f"nesting (was {saved.granularities}, now {config.granularities})"
        for _ in range(saved.granularities != config.granularities)
    ]
    changed += changes_of_model(saved.model, config.model)
    changed += [
        change
        for section in now
        if section not in (*_FREE_SECTIONS, "model")
        for change in _changes(before[section], now[section], _FREE_KEYS.get(section, ()), section)
    ]
    if changed:
        raise UserError(
            f"the run directory {config.run.dir} holds a run with another configuration: "
            f"{'; '.join(changed)}; set these back, or choose another run.dir"
        )
    return list(_notices(saved, config))


def _notices(saved: Config, config: Config) -> Iterator[str]:
    was, is_ = saved.training.total_steps, config.training.total_steps
    if was != is_ and config.schedule.kind != "constant":
        yield (
            f"the run's length was {was} steps and is now {is_}: the learning rate follows the "
            f"{config.schedule.kind} schedule of the new length from here on"
        )
    was, is_ = saved.training.micro_batch_size, config.training.micro_batch_size
    if was != is_ and config.objective.kind == "per_sequence":
        yield (
            f"training.micro_batch_size was {was} and is now {is_}: from here on other samples "
            "meet each granularity than would have"
        )
    objective = config.objective
    if was != is_ and isinstance(objective, VisionObjectiveConfig) and objective.mixes:
        yield (
            f"training.micro_batch_size was {was} and is now {is_}: from here on images are mixed "
            "with others than they would have been"
        )


def _changes(
    before: Mapping[str, object], now: Mapping[str, object], free: tuple[str, ...], prefix: str
) -> Iterator[str]:
    for key in sorted({*now, *before}.difference(free)):
        if now.get(key) != before.get(key):
            yield f"{prefix}.{key} (was {before.get(key)!r}, now {now.get(key)!r})"


def changes_of_model(
    before: ModelConfig, now: ModelConfig, free: tuple[str, ...] = ()
) -> Iterator[str]:
    """Keys of the section `model` that decide weights, and differ; but for those in `free`."""
    yield from _changes(before.shape(), now.shape(), (*_FREE_KEYS["model"], *free), "model")


def check_monitors(config: Config) -> None:
    """UserError where the run is to log to something that is not installed."""
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "logging.wandb is true, but wandb is not installed; pip install wandb, or set it false"
        )


def choose_operators(config: Config, topology: Topology) -> None:
    """Settle what operators run in this process; UserError where those asked for are not there."""
    fault = native.fault_of(topology.device)
    if config.training.operators == "native" and fault:
        raise UserError(f"training.operators is native, but {fault}; or set it to auto")
    native.prefer(config.training.operators)


def check_checkpoint(checkpoint: Checkpoint, now: Manifest, config: Config) -> None:
    """UserError where a checkpoint is not of the model, labels, batch and layout of this run.

    The batch too, because the steps done say which data are to come; at step 0, where weights are
    imported, none are done.
    """
    saved = checkpoint.manifest
    check_task(f"the checkpoint {checkpoint.path}", saved, now)
    wrong = list(changes_of_model(saved.model, now.model))
    pairs: dict[str, tuple[object, object]] = {
        "nesting.widths": (list(saved.nesting.widths), list(now.nesting.widths)),
        "nesting.names": (list(saved.nesting.names), list(now.nesting.names)),
        "tokens or classes": (saved.outputs, now.outputs),
        "SHA-256 of the tokenizer or class names": (
            saved.labels_sha256[:12],
            now.labels_sha256[:12],
        ),
    }
    if saved.step:
        batch_size = config.training.global_batch_size
        pairs |= {
            "training.precision": (saved.precision, now.precision),
            "training.global_batch_size": (_per(saved.samples, saved.step), batch_size),
            f"{config.unit} a sample": (_per(saved.units, saved.samples), config.units(1)),
        }
    wrong += [
        f"{key} (was {was!r}, now {is_!r})" for key, (was, is_) in pairs.items() if was != is_
    ]
    if wrong:
        raise UserError(
            f"the checkpoint {checkpoint.path} is of another model: {'; '.join(wrong)}; set these "
            "back, or choose another checkpoint.resume"
        )


def check_task(what: str, saved: Manifest, now: Manifest) -> None:
    """UserError for a checkpoint of another task."""
    if saved.model.task != now.model.task:
        raise UserError(
            f"{what} is of task: {saved.model.task}, this run of task: {now.model.task}; choose "
            "another one"
        )


def _per(total: int, parts: int) -> int:
    return total // max(parts, 1)


def changed_data(saved: Manifest, data_sha256: str) -> Iterator[str]:
    """What whoever goes on should know of training data that are no longer the same."""
    if saved.data_sha256 not in (None, data_sha256):
        yield (
            f"data.train does not hold what it did at step {saved.step}: from here on samples come "
            "in another order, so some may be met once more, or once less, than the others"
        )


def describe(
    config: Config, topology: Topology, labels_sha256: str, outputs: int, step: int = 0
) -> Manifest:
    """The manifest of a checkpoint at `step`, but for its files."""
    samples = step * config.training.global_batch_size
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return Manifest(
        step=step,
        samples=samples,
        units=config.units(samples),
        layout=Layout(
            tensor=topology.tensor.size,
            data=topology.data_size,
            zero_stage=config.zero_stage,
            zero_options=zero_options(config),
        ),
        model=config.model,  # type: ignore[arg-type]  # of one of the tasks
        nesting=config.granularities,
        outputs=outputs,
        precision=config.training.precision,
        labels_sha256=labels_sha256,
        config_sha256=hashlib.sha256(config.to_yaml().encode()).hexdigest(),
        versions={**packages, "python": platform.python_version()},
        files={},
    )
