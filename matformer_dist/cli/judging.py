"""How good submodels are: evaluate."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from matformer_dist.cli.app import app, items, out, print_wide
from matformer_dist.errors import UserError


@app.command("evaluate")
def evaluate_command(
    model: Annotated[
        str, typer.Argument(metavar="RUN[@STEP]|MODEL", help="Run, or an extracted model.")
    ],
    submodel: Annotated[
        list[str] | None, typer.Option(help="A Mix'n'Match submodel; may be repeated.")
    ] = None,
    heuristic: Annotated[
        bool, typer.Option(help="Also every Mix'n'Match submodel of the paper's heuristic.")
    ] = False,
    batches: Annotated[
        int | None, typer.Option(min=1, help="Global batches; else the run's evaluation.batches.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only every N-th of the submodels, from the I-th on; the last of the N calls to "
            "end writes RUN/evaluation.json.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Prefix of token files; else the run's validation data.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Where an extracted model's run is, if it was moved.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; else the GPU, if there is one.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Instead: tasks or groups of lm-eval, with commas between; ours are stdlib and "
            "matformer_paper. Of a run or an extracted native model; into RUN/downstream.json."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --tasks: documents of each.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="With --tasks: examples in a prompt.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --tasks: folder of task files of your own.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="With --tasks: sequences at once; 16 if left out.")
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option(help="With --tasks: leave out those whose data cannot be had.")
    ] = False,
    storycloze: Annotated[
        Path | None, typer.Option(help="With --tasks: folder of the CSV files of Story Cloze 2016.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --tasks: file to write instead.")
    ] = None,
) -> None:
    """Validation loss and consistency with XL of every granularity, into RUN/evaluation.json."""
    from rich.progress import Progress

    of_losses = {
        "--heuristic": heuristic,
        "--batches": batches,
        "--part": part,
        "--data": data,
        "--run": run,
        "--device": device,
    }
    of_tasks = {
        "--limit": limit,
        "--num-fewshot": num_fewshot,
        "--include-path": include_path,
        "--batch-size": batch_size,
        "--skip-missing": skip_missing,
        "--storycloze": storycloze,
        "--output": output,
    }
    if tasks is None:
        _leave_out(of_tasks, "is for --tasks; name some, or leave it out")
    else:
        _leave_out(of_losses, "is for validation losses; leave it out, or --tasks")
        _evaluate_tasks(
            model,
            items("--tasks", tasks) or [],
            submodel or (),
            limit=limit,
            num_fewshot=num_fewshot,
            include=include_path,
            batch_size=batch_size,
            skip_missing=skip_missing,
            storycloze=storycloze,
            output=output,
        )
        return

    from matformer_dist.evaluation.parts import Part
    from matformer_dist.evaluation.run import evaluate_run

    chosen_part = None if part is None else Part.parse(part)
    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("evaluating", total=None)
        evaluation = evaluate_run(
            model,
            submodel or (),
            heuristic=heuristic,
            batches=batches,
            data=data,
            run=run,
            part=chosen_part,
            device=device,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    names = ("submodel", "parameters", "loss", "95%", "perplexity", "bits/byte", "agrees", "KL")
    table = Table(*names)
    for column in table.columns[1:]:
        column.justify = "right"
    for entry in evaluation.results:
        low, high = entry["loss_interval"]
        table.add_row(
            entry["submodel"], f"{entry['parameters']:,}", f"{entry['loss']:.4f}",
            f"{low:.4f} to {high:.4f}", f"{entry['perplexity']:.2f}",
            f"{entry['bits_per_byte']:.4f}", f"{entry['agreement']:.1%}", f"{entry['kl']:.4f}",
        )  # fmt: skip
    print_wide(table)
    file = evaluation.directory / "evaluation.json"
    where = f"written to {file}" if evaluation.is_whole else f"other parts are to come for {file}"
    out.print(
        f"step {evaluation.step}, {evaluation.tokens:,} validation tokens; loss and KL in nats per "
        f"token, agreement and KL with the largest submodel; {where}"
    )


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


def _leave_out(options: Mapping[str, object], why: str) -> None:
    """UserError for the first of them that is given."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise UserError(f"{name} {why}")
