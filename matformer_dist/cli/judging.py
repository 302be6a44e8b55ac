"""How good submodels are: evaluate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from matformer_dist.cli.app import (
    DeviceOption,
    app,
    interval_text,
    items,
    leave_out,
    number,
    out,
    print_wide,
)

_LOSSES, _TASKS = "Validation losses", "Tasks of lm-eval, in place of losses"


@app.command("evaluate")
def evaluate_command(
    model: Annotated[
        str, typer.Argument(metavar="RUN[@STEP]|MODEL", help="Run, or an extracted model.")
    ],
    submodel: Annotated[
        list[str] | None,
        typer.Option(help="A Mix'n'Match submodel or a slice; may be repeated."),
    ] = None,
    device: DeviceOption = None,
    output: Annotated[Path | None, typer.Option(help="File to write instead.")] = None,
    heuristic: Annotated[
        bool,
        typer.Option(
            help="Also every Mix'n'Match submodel of the paper's heuristic.",
            rich_help_panel=_LOSSES,
        ),
    ] = False,
    batches: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Global batches; else the run's evaluation.batches.",
            rich_help_panel=_LOSSES,
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only every N-th of the submodels, from the I-th on; the last of the N calls to "
            "end writes RUN/evaluation.json.",
            rich_help_panel=_LOSSES,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Prefix of token files, or images; else the run's validation data.",
            rich_help_panel=_LOSSES,
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Where an extracted model's run is, if it was moved.", rich_help_panel=_LOSSES
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks or groups, with commas between; ours are stdlib and matformer_paper. Of a "
            "run or an extracted native model; into RUN/downstream.json.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each.", rich_help_panel=_TASKS)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in a prompt.", rich_help_panel=_TASKS)
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="Folder of task files of your own.", rich_help_panel=_TASKS),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences at once; 16 if left out.", rich_help_panel=_TASKS),
    ] = None,
    skip_missing: Annotated[
        bool,
        typer.Option(help="Leave out those whose data cannot be had.", rich_help_panel=_TASKS),
    ] = False,
    storycloze: Annotated[
        Path | None,
        typer.Option(help="Folder of the CSV files of Story Cloze 2016.", rich_help_panel=_TASKS),
    ] = None,
) -> None:
    """Validation loss and consistency with XL of every granularity, into RUN/evaluation.json."""
    if tasks is None:
        leave_out(
            {
                "--limit": limit, "--num-fewshot": num_fewshot, "--include-path": include_path,
                "--batch-size": batch_size, "--skip-missing": skip_missing,
                "--storycloze": storycloze,
            },
            "is for --tasks; name some, or leave it out",
        )  # fmt: skip
        _evaluate_losses(
            model, submodel or (), heuristic=heuristic, batches=batches, data=data, run=run,
            part=part, device=device, output=output,
        )  # fmt: skip
    else:
        leave_out(
            {
                "--heuristic": heuristic, "--batches": batches, "--part": part, "--data": data,
                "--run": run,
            },
            "is for validation losses; leave it out, or --tasks",
        )  # fmt: skip
        _evaluate_tasks(
            model, items("--tasks", tasks) or [], submodel or (), limit=limit,
            num_fewshot=num_fewshot, include=include_path, batch_size=batch_size,
            skip_missing=skip_missing, storycloze=storycloze, output=output, device=device,
        )  # fmt: skip


def _evaluate_losses(
    source: str, submodels: Sequence[str], *, part: str | None, **options: Any
) -> None:
    from rich.progress import Progress

    from matformer_dist.evaluation.parts import Part
    from matformer_dist.evaluation.run import evaluate_run

    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("evaluating", total=None)
        evaluation = evaluate_run(
            source,
            submodels,
            **options,
            part=None if part is None else Part.parse(part),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    is_text = evaluation.unit == "tokens"
    of_text = ("perplexity", "bits/byte") if is_text else ()
    table = Table("submodel", "parameters", "loss", "95%", *of_text, "accuracy", "agrees", "KL")
    for column in table.columns[1:]:
        column.justify = "right"
    for entry in evaluation.results:
        text = [f"{entry['perplexity']:.2f}", f"{entry['bits_per_byte']:.4f}"] if is_text else []
        table.add_row(
            entry["submodel"], f"{entry['parameters']:,}", f"{entry['loss']:.4f}",
            interval_text(entry["loss_interval"]), *text, number(entry["accuracy"], ".1%"),
            number(entry["agreement"], ".1%"), number(entry["kl"], ".4f"),
        )  # fmt: skip
    print_wide(table)
    file = evaluation.file
    to_come = f"other parts, called with the same options, are to come for {file}"
    where = f"written to {file}" if evaluation.is_whole else to_come
    out.print(
        f"step {evaluation.step}, {evaluation.units:,} validation {evaluation.unit}; loss and KL "
        f"in nats per {evaluation.unit.removesuffix('s')}, agreement and KL with XL; {where}"
    )
    if evaluation.note:
        out.print(evaluation.note, markup=False)


def _evaluate_tasks(
    source: str, tasks: list[str], submodels: Sequence[str], **options: Any
) -> None:
    from rich.progress import Progress

    from matformer_dist.evaluation.downstream.run import evaluate_tasks

    # Bound to standard output as it is now: lm-eval's own prints are turned away meanwhile.
    screen = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    with Progress(console=screen, transient=True) as progress:
        task = progress.add_task("loading the model", total=None)
        evaluation = evaluate_tasks(
            source,
            tasks,
            submodels,
            **options,
            progress=lambda what, done, total: progress.update(
                task, description=what, completed=done, total=total or None
            ),
        )
    table = Table("task", "metric", *evaluation.submodels)
    for column in table.columns[2:]:
        column.justify = "right"
    for name, metric, values in evaluation.rows():
        table.add_row(name, metric, *values)
    print_wide(table, 60 + 24 * len(evaluation.submodels))
    for note in evaluation.notes():
        out.print(note, markup=False)
