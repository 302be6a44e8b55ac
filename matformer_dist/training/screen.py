"""What a run shows on the terminal: the plan at the start, then a line that lives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from matformer_dist.config import Config
from matformer_dist.errors import UserError
from matformer_dist.ops import native
from matformer_dist.parallel.topology import Topology
from matformer_dist.planning.layout import PlannedRun
from matformer_dist.planning.memory import estimate_memory
from matformer_dist.planning.plan import granularities_table
from matformer_dist.run_directory import Checkpoint
from matformer_dist.units import short_count, short_number, short_time

_BF16_MULTIPLE = 8  # values in the 16 bytes that tensor cores want operands aligned to


class Screen:
    """Prints on the main rank only; a bar that renews itself on a terminal, lines elsewhere."""

    def __init__(self, config: Config, topology: Topology, outputs: int) -> None:
        self.config = config
        self.topology = topology
        self.outputs = outputs
        self.total_steps = config.training.total_steps
        self.console = Console(
            quiet=not topology.is_main, highlight=False, soft_wrap=True, markup=False
        )
        self._started: tuple[float, int] | None = None
        self._bar: Progress | None = None

    def show_plan(self, data: str, resumed: Checkpoint | None, notices: Sequence[str]) -> None:
        """What is about to be trained, on what, and the memory that it should take."""
        config, topology = self.config, self.topology
        training = config.training
        self.console.print(granularities_table(config, self.outputs))
        planned = PlannedRun(config, self.outputs, topology.data_size, topology.device.type)
        hosts = len(set(topology.hosts))
        self.console.print(
            f"ranks      {topology.world_size} = tensor {topology.tensor.size} x data "
            f"{topology.data_size}, ZeRO {config.zero_stage}, {training.precision}, "
            f"{topology.device.type}{f', on {hosts} hosts' if hosts > 1 else ''}\n"
            f"operators  {native.describe(topology.device)}\n"
            f"objective  {config.objective.kind}\n"
            f"batch      {training.global_batch_size} {config.samples_in_words} = "
            f"{training.micro_batch_size} x {topology.data_size} ranks x {planned.micro_batches} "
            "micro-batches\n"
            f"data       {data}\n"
            f"steps      {self.total_steps:,} = "
            f"{short_count(config.units(self.total_steps * training.global_batch_size))} "
            f"{config.unit}\n"
            f"memory     {estimate_memory(planned)}\n"
            f"run        {config.run.dir}"
        )
        for notice in notices:
            self.console.print(f"notice     {notice}")
        if resumed is not None:
            self.console.print(f"resuming   {resumed.path}")

    def warn_of_unaligned_widths(self) -> None:
        """Where a rank's part of a ring is no multiple of what a GPU multiplies at full speed."""
        if self.topology.device.type != "cuda" or self.config.training.precision != "bf16":
            return
        try:
            self.config.granularities.check_dealable(self.topology.tensor.size, _BF16_MULTIPLE)
        except UserError as error:
            self.console.print(f"warning    matrix products will be slow: {error}")

    def warn_of_split_groups(self) -> None:
        """Where tensor-parallel ranks, which wait for each other in every layer, share no host."""
        hosts = self.topology.hosts_of_split_groups()
        if hosts:
            self.console.print(
                f"warning    tensor-parallel ranks lie on several hosts ({_shortened(hosts)}): two "
                "all-reduces a layer and direction go over the network between them; set a "
                "parallel.tensor that divides the ranks of each host"
            )

    def warn_of_uneven_work(self, even: int | None) -> None:
        """Where micro-batches are no multiple of `even` sequences (see Objective)."""
        size = self.config.training.micro_batch_size
        if self.topology.data_size > 1 and (even is None or size % even):
            remedy = f"a multiple of {even} does" if even else "rounder probabilities do"
            self.console.print(
                f"warning    training.micro_batch_size {size} x objective.probabilities are not "
                "whole numbers: at a step some data-parallel ranks run wider granularities than "
                f"others, which wait; {remedy} away with that"
            )

    def say(self, text: str) -> None:
        self.console.print(text)

    @contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[str], None]]:
        """A bar of `total` things; what it yields is called once for each, with its name."""
        begun = time.monotonic()
        columns = (TextColumn(f"{text}  {{task.completed:.0f}}/{{task.total:.0f}}"), BarColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda _: bar.advance(task)
        self.say(f"{text}: done in {short_time(time.monotonic() - begun)}")

    def show_step(self, line: Mapping[str, Any]) -> None:
        """One line of metrics, in words; with the time that is left."""
        now = time.monotonic()
        if self._started is None:
            self._started = (now, line["step"])
            left = line["step_ms"] / 1e3 * (self.total_steps - line["step"])
        else:
            begun, first = self._started
            left = (now - begun) / (line["step"] - first) * (self.total_steps - line["step"])
        losses, unit = line.get("val_loss", line["train_loss"]), self.config.unit
        text = "  ".join(
            [
                ("validation " if "val_loss" in line else "loss ")
                + " ".join(f"{name} {loss:.3f}" for name, loss in losses.items()),
                f"{short_number(line[f'{unit}_per_second'])} {unit}/s",
                f"{line['model_tflops_per_second']:.3g} TFLOP/s",
                f"{short_time(left)} left",
            ]
        )
        if not self.console.is_terminal:
            width = len(str(self.total_steps))
            self.console.print(f"step {line['step']:>{width}}/{self.total_steps}  {text}")
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=16),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self._bar.add_task("", total=self.total_steps)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=line["step"], description=text)
        if "val_loss" in line:
            self._bar.console.print(f"step {line['step']}  {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _shortened(names: Sequence[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
