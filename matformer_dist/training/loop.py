"""A training run from its configuration to its last checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from matformer_dist.checkpoints.files import replace_file
from matformer_dist.checkpoints.store import CheckpointStore
from matformer_dist.checkpoints.verify import check_whole
from matformer_dist.config import Config
from matformer_dist.counting import forward_flops
from matformer_dist.data.feed import Batch, Feed
from matformer_dist.deepspeed_section import check_deepspeed_section
from matformer_dist.errors import PreemptedError, UserError
from matformer_dist.evaluation.loss import SubmodelLoss, evaluate_submodels
from matformer_dist.models.forward_pass import Pass
from matformer_dist.parallel.agreement import agreement, gathered, on_main
from matformer_dist.parallel.collectives import around_collectives
from matformer_dist.parallel.topology import Topology
from matformer_dist.run_directory import LABEL_FILES, Checkpoint, Manifest, find_checkpoint, lock
from matformer_dist.training import random_states, setup
from matformer_dist.training.beginning import begin_from
from matformer_dist.training.continuity import compare, probe_loss
from matformer_dist.training.control import Control
from matformer_dist.training.engine import (
    Engine,
    build_model,
    learning_rate,
)
from matformer_dist.training.measurements import Measurements, Stragglers
from matformer_dist.training.metrics import LossSums, MetricsLog
from matformer_dist.training.objective import Objective
from matformer_dist.training.profiling import Profiler, Wanted
from matformer_dist.training.screen import Screen
from matformer_dist.training.task import open_task

_NO_STEPS = Wanted()


class Run:
    """What one rank holds of a training run."""

    def __init__(
        self, config: Config, topology: Topology, control: Control, profiled: Wanted = _NO_STEPS
    ) -> None:
        self.config = config
        self.control = control
        self.topology = topology
        self.nesting = config.granularities
        self.step = self.skipped = self.skips_in_a_row = 0
        self.began_from: str | None = None
        self.line: dict[str, Any] | None = None  # of metrics, to be completed and written
        self.saved: int | None = None  # the step of the last checkpoint
        training = config.training
        self.total_steps = training.total_steps

        with agreement():
            check_deepspeed_section(config, topology.data_size)
            setup.check_monitors(config)
            setup.choose_operators(config, topology)
        self.task = open_task(config)
        notices = on_main(lambda: setup.check_run_directory(config))
        self.store = CheckpointStore(config.run.dir, config.checkpoint, control.busy)
        self.control.mark("reading checkpoints")
        resumed, damaged = self.store.choose_start()
        if resumed is not None:
            setup.check_checkpoint(resumed, self._manifest(), config)
            profiled.check_start(resumed.step)
        self.control.mark("opening the data")
        samples = self.total_steps * training.global_batch_size
        self.train_data, self.validation_data = self.task.datasets(samples, topology)
        if resumed is not None:
            notices += setup.changed_data(resumed.manifest, self.task.data_sha256)
        self.objective = Objective(
            config.objective, self.nesting, config.model.n_layers, training.seed
        )
        on_main(self._write_down)

        self.screen = Screen(config, topology, self.task.outputs)
        self.screen.show_plan(self.task.data_in_words, resumed, [*notices, *damaged])
        self.screen.warn_of_split_groups()
        self.screen.warn_of_uneven_work(self.objective.even_micro_batch())
        self.screen.warn_of_unaligned_widths()
        self.control.mark("building the model")
        model = build_model(config, self.task.outputs, topology)
        self.measurements = Measurements(config, topology)
        self.stragglers = Stragglers()
        self.profiler = Profiler(
            profiled.ranges if dist.get_rank() in profiled.ranks else (),
            config.run.dir / "profile",
            self.measurements.clock,
            self.screen.say,
        )
        self.engine = Engine(config, model, topology, self.measurements.clock)
        self.losses = LossSums(self.nesting, topology)
        if resumed is not None:
            self._load(resumed)
        elif config.checkpoint.initial is not None:
            self._begin_from(config.checkpoint.initial)
        with agreement():
            self.log = MetricsLog(config, self.step) if topology.is_main else None
        if on_main(lambda: self.log is not None and self.log.reaches(self.step)):
            self.line = None

    def _write_down(self) -> None:
        """What the run directory holds from the start."""
        directory = self.config.run.dir
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = lock(directory)
        contents = {"config.yaml": self.config.to_yaml().encode(), **self.task.label_files}
        for name in set(LABEL_FILES) - contents.keys():  # of a start that came to nothing
            (directory / name).unlink(missing_ok=True)
        for name, content in contents.items():
            path = directory / name
            if not path.exists() or path.read_bytes() != content:
                replace_file(path, content)

    def _manifest(self) -> Manifest:
        task = self.task
        return setup.describe(
            self.config, self.topology, task.labels_sha256, task.outputs, self.step
        )

    def _load(self, checkpoint: Checkpoint) -> None:
        self.control.mark(f"loading {checkpoint.path.name}")
        manifest = checkpoint.manifest
        if manifest.layout == self._manifest().layout:
            self.engine.load(checkpoint)
        else:
            with self.screen.progress(f"from {manifest.layout}", self.engine.weights) as advance:
                self.engine.load_other_layout(checkpoint, advance)
            loss = self._probe_loss()
            with agreement():
                said = compare(manifest, loss)
            self.screen.say(said)
        self.step, self.skipped = manifest.step, manifest.skipped_steps
        self.skips_in_a_row = manifest.skips_in_a_row
        self.began_from = manifest.began_from
        if checkpoint.path.resolve().parent != self.store.directory.resolve():
            self.began_from = str(checkpoint.path.resolve())
        else:
            self.line, self.saved = manifest.metrics_line, self.step
        if manifest.loss_sums:
            self.losses.load(manifest.loss_sums)
        if dist.get_rank() < len(manifest.random_states):
            random_states.restore(manifest.random_states[dist.get_rank()])

    def _begin_from(self, run: str) -> None:
        self.control.mark(f"loading the weights of {run}")
        with agreement():
            checkpoint = find_checkpoint(run)
            source = begin_from(checkpoint, self.config, self._manifest())
        with self.screen.progress(f"from {checkpoint.path}", self.engine.weights) as advance:
            self.engine.begin_from(source, advance)
        on_main(lambda: check_whole(checkpoint))
        self.began_from = str(checkpoint.path.resolve())
        for notice in source.notices:
            self.screen.say(f"notice     {notice}")

    def _probe_loss(self) -> float:
        return probe_loss(self.engine, self.config, self.task, self.topology)

    def train(self) -> None:
        """Run the remaining steps; save, evaluate and log when due, and at the end.

        PreemptedError where a signal asked for an end, UserError where no step changes anything any
        more; a checkpoint of the last step is there then.
        """
        clock = self.measurements.clock
        try:
            self._report()  # of the checkpoint's step, if the run ended before that
            if self.step >= self.total_steps:
                self.screen.say(f"finished: all {self.total_steps} steps are done")
            with (
                self._feed(self._training_batches()) as fed,
                around_collectives(clock.begin_communication, clock.end_communication),
            ):
                batches = self.control.guarded(fed, self._stand_in)
                while self.step < self.total_steps:
                    with self.profiler.step(self.step + 1):
                        self._train_step(batches)
                    self._after_step()
        finally:
            self.profiler.close()
            self.screen.close()
            if self.log is not None:
                self.log.close()

    def _after_step(self) -> None:
        """Save first: an evaluation, which may take long, need not come to its end."""
        if self._is_reported(self.step):
            self.line = self._measurements()
        self._end_if_asked()
        while self.store.warnings:
            self.screen.say(f"warning    {self.store.warnings.pop(0)}")
        is_last = self.step == self.total_steps
        gives_up = self.skips_in_a_row == self.config.training.max_skipped_steps and not is_last
        due = _due(self.step, self.config.checkpoint.every) and not self.skips_in_a_row
        if is_last or due or gives_up:
            self._save()
        if is_last or gives_up:
            self.store.finish()
        self._report()
        if gives_up:
            raise UserError(
                f"loss or gradient of the last {self.skips_in_a_row} steps was not finite, so they "
                f"changed nothing; {self._is_saved()}, with the weights from before them. Look "
                "into the data of these steps, or begin a new run from an earlier checkpoint with "
                f"a lower rate: run.dir=NEW checkpoint.resume={self.config.run.dir}@STEP "
                "optimizer.lr=LOWER. training.max_skipped_steps sets how many are borne"
            )

    def _end_if_asked(self) -> None:
        """PreemptedError behind a checkpoint of this step, where some rank received a signal;
        UserError where one could not read its data, which is not saved.

        All ranks call it together; it also completes a checkpoint that is written beside the
        training, once all have written their files.
        """
        signal, written, failed = self.control.decide(self.store.is_written)
        if written or failed:
            self.store.finish()
        if failed:
            with agreement():
                if self.control.failure is not None:
                    raise self.control.failure
        if signal is None:
            return
        if self.saved != self.step:
            self._save()
        self.store.finish()
        if not self._is_evaluated(self.step):
            self._report()
        raise PreemptedError(
            f"{signal} ended the run; {self._is_saved()}, and the same command goes on from it"
        )

    def _is_saved(self) -> str:
        return f"the checkpoint of step {self.step} is saved"

    def _train_step(self, batches: Iterator[Batch]) -> None:
        self.control.mark(f"step {self.step + 1}")
        with self.measurements.step(self._training_flops(self.step)):
            config = self.config
            self.lr = learning_rate(
                config.schedule, config.optimizer.lr, self.step, self.total_steps
            )
            passes = iter(self._passes(self.step))
            results = self.engine.train_step(batches, passes, self.lr)
            self.step += 1
            if not self.engine.was_skipped:
                self.losses.add(results)
        self._count_skipped()

    def _count_skipped(self) -> None:
        if not self.engine.was_skipped:
            self.skips_in_a_row = 0
            return
        self.skipped += 1
        self.skips_in_a_row += 1
        self.screen.say(
            f"warning    step {self.step} is skipped: its loss or gradient is not finite "
            f"({self.skipped} so far)"
        )

    def _is_reported(self, step: int) -> bool:
        return _due(step, self.config.logging.every) or self._is_evaluated(step)

    def _is_evaluated(self, step: int) -> bool:
        return step == self.total_steps or _due(step, self.config.evaluation.every)

    def _passes(self, step: int) -> list[Pass]:
        """The passes of this rank's micro-batches of a step."""
        ranks, accumulation = self.topology.data_size, self.engine.accumulation
        sequences = self.config.training.micro_batch_size
        return [
            self.objective.plan(
                step, i * ranks + self.topology.data_rank, accumulation * ranks, sequences
            )
            for i in range(accumulation)
        ]

    def _training_flops(self, step: int) -> int:
        """Forward, dX and dW of a step over all ranks, which may run different granularities."""
        whole = self.objective.plan(step, 0, 1, self.config.training.global_batch_size)
        forward = forward_flops(
            self.config.model,
            self.task.outputs,
            whole.segments,
            self.config.sample,
            shared_tokens=whole.shared_tokens,
        )
        return 3 * forward.total

    def _training_batches(self) -> Iterator[Batch]:
        """The micro-batches of the remaining steps, in the order of their passes."""
        consumed = self.step * self.config.training.global_batch_size
        batches = self.task.micro_batches(self.train_data, consumed, self.topology)
        steps = range(self.step, self.total_steps)
        return chain.from_iterable(_in_order(batches, self._passes(step)) for step in steps)

    def _feed(self, batches: Iterator[Batch]) -> Feed:
        return Feed(batches, self.topology.device, self.config.data.prefetch)

    def _stand_in(self) -> Batch:
        """A micro-batch, made up."""
        size, device = self.config.training.micro_batch_size, self.topology.device
        inputs, targets = self.task.probe()
        return torch.cat([inputs] * size).to(device), torch.cat([targets] * size).to(device)

    def _evaluate(self) -> dict[str, SubmodelLoss]:
        layers = self.config.model.n_layers
        uniform = self.nesting.uniforms(layers)
        mixed = [self.nesting.parse(text, layers) for text in self.config.evaluation.submodels]
        assert self.validation_data is not None
        batches = self.task.micro_batches(self.validation_data, 0, self.topology)
        count = self.config.evaluation.batches  # None: all
        batches = islice(batches, count and count * self.engine.accumulation)

        def run_pass(inputs: Tensor, targets: Tensor, plan: Pass) -> Tensor:
            self.control.mark(f"the evaluation of step {self.step}")
            self._end_if_asked()
            return self.engine.evaluate(inputs, targets, plan)

        with self._feed(batches) as fed:
            return evaluate_submodels(
                run_pass,
                self.control.guarded(fed, self._stand_in),
                [*uniform, *mixed],
                uniform[0],
                per_pass=len(self.nesting),
                group=self.topology.data_group,
            )

    def _measurements(self) -> dict[str, Any]:
        """A line of metrics, but for what the evaluation and the checkpoint add to it."""
        return {
            "step": self.step,
            self.config.unit: self.config.units(self.step * self.config.training.global_batch_size),
            "train_loss": self.losses.take(),
            "grad_norm": self.engine.grad_norm,
            "learning_rate": self.lr,
            **self.measurements.take(),
            "skipped_steps": self.skipped,
        }

    def _report(self) -> None:
        """Complete and write the line of metrics that waits, if one does."""
        if self.line is None:
            return
        line = dict(self.line)
        if self._is_evaluated(self.step):
            evaluated = self._evaluate()
            line["val_loss"] = {name: result.loss for name, result in evaluated.items()}
            line["val_agreement"] = {name: r.agreement for name, r in evaluated.items()}
            line["val_accuracy"] = {name: r.accuracy for name, r in evaluated.items()}
        line["checkpoint_ms"] = self.store.take_seconds() * 1e3
        self.line = None
        if self.log is not None:
            self.log.write(line)
            self.engine.write_events(self.log.events(line))
        self.screen.show_step(line)
        if warning := self.stragglers.look_at(line):
            self.screen.say(f"warning    {warning}")

    def _save(self) -> None:
        self.control.mark(f"the checkpoint of step {self.step}")
        manifest = self._manifest().model_copy(
            update={
                "skipped_steps": self.skipped,
                "skips_in_a_row": self.skips_in_a_row,
                "data_sha256": self.task.data_sha256,
                "began_from": self.began_from,
                "loss_sums": self.losses.state(),
                "metrics_line": self.line,
                "probe_loss": self._probe_loss(),
                "random_states": gathered(random_states.capture()),
            }
        )
        # Weights that lead to nothing finite must not be all that is kept.
        self.store.save(self.engine, manifest, prunes=not self.skips_in_a_row)
        self.saved = self.step


def _in_order(batches: Iterator[Batch], passes: list[Pass]) -> Iterator[Batch]:
    """A step's micro-batches, each as its pass wants it."""
    for plan, (inputs, targets) in zip(passes, batches, strict=False):
        order = slice(None) if plan.order is None else list(plan.order)
        yield inputs[order], targets[order]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
