"""Submodels: search, extract."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from matformer_dist.cli.app import (
    DeviceOption,
    RunArgument,
    app,
    interval_text,
    leave_out,
    number,
    out,
    print_wide,
)
from matformer_dist.errors import UserError
from matformer_dist.units import one_of


@app.command("search")
def search_command(
    run: RunArgument,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="params=1.5B, flops=3G (a token, an image), memory=4GiB or latency=12ms (a "
            "token, a pass over images); may be repeated. Without: the frontier from S to XL."
        ),
    ] = None,
    frontier: Annotated[
        str | None,
        typer.Option(
            help="What a whole frontier is over: params, flops, memory or latency; params if left "
            "out."
        ),
    ] = None,
    points: Annotated[
        int | None, typer.Option(help="Budgets of a frontier, beside S to XL; 24 if left out.")
    ] = None,
    candidates: Annotated[int, typer.Option(help="Measured of each budget and round.")] = 3,
    rounds: Annotated[int, typer.Option(help="Of candidates; 0: one-layer changes alone.")] = 2,
    batches: Annotated[
        int | None, typer.Option(min=1, help="Global batches; else the run's evaluation.batches.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Prefix of token files, or images; else the run's validation data."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of memory, which is weights and, of a language model, the cache of a sequence of "
            "training.seq_len: fp32, bf16 or fp16."
        ),
    ] = "bf16",
    latency_table: Annotated[
        Path | None,
        typer.Option(help="Times a width, measured where it is not there; RUN/latency.json."),
    ] = None,
    latency_sequences: Annotated[
        int | None,
        typer.Option(help="Decoded together, or images of a pass; the table's, else 1."),
    ] = None,
    latency_context: Annotated[
        int | None,
        typer.Option(help="Tokens before the timed one; the table's, else half of all."),
    ] = None,
    latency_dtype: Annotated[
        str | None,
        typer.Option(help="fp32, bf16, fp16; the table's, else bf16 on a GPU, fp32 on a CPU."),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Find the best submodels within a budget, on validation data, into RUN/slices.json."""
    from rich.progress import Progress

    from matformer_dist.search.budget import KINDS, Budget, short_cost
    from matformer_dist.search.picture import draw_frontier
    from matformer_dist.search.search import Options, search

    if budget:
        leave_out(
            {"--frontier": frontier, "--points": points},
            "is for whole frontiers; leave it out, or --budget",
        )
    kind = next((kind for kind in KINDS if kind == (frontier or "params")), None)
    if kind is None:
        raise UserError(f"--frontier {frontier!r} must be one of {', '.join(KINDS)}")
    options = Options(
        points=24 if points is None else points,
        candidates=candidates,
        rounds=rounds,
        batches=batches,
        data=data,
        dtype=dtype,
        table=latency_table,
        sequences=latency_sequences,
        context=latency_context,
        latency_dtype=latency_dtype,
        device=device,
    )
    try:
        with Progress(console=out, transient=True) as progress:
            task = progress.add_task("measuring submodels", total=None)
            found = search(
                run,
                [Budget.parse(text) for text in budget or ()],
                kind=kind,
                options=options,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    except KeyboardInterrupt:
        typer.echo("interrupted; what was measured is kept, and the same command goes on", err=True)
        raise
    table = Table(
        "slice", "submodel", "budget", "loss", "accuracy", "agrees with XL", "heuristic", "gain",
        "95%",
    )  # fmt: skip
    for one in found.slices:
        table.add_row(
            one.name, one.submodel, short_cost(one.kind, one.budget, 4), f"{one.loss:.4f}",
            number(one.accuracy, ".1%"), f"{one.agreement:.1%}", one.heuristic, f"{one.gain:.4f}",
            interval_text(one.gain_interval),
        )  # fmt: skip
    print_wide(table)
    for note in found.notes:
        out.print(note)
    out.print(
        f"step {found.all.step}, {len(found.all.measured)} submodels measured "
        f"({found.measured_now} of them now) on {found.all.units:,} {found.all.unit}; gain: nats "
        f"{one_of(found.all.unit)} below the heuristic; written to {found.run / 'slices.json'} and "
        "slices.csv"
    )
    if found.all.latency_on:
        of = "a token" if found.all.unit == "tokens" else "a pass"
        out.print(f"latency of {of} on {found.all.latency_on}")
    try:
        draw_frontier(found.all, found.slices[0].kind, found.nesting, found.run / "frontier.png")
        out.print(f"picture: {found.run / 'frontier.png'}")
    except UserError as error:
        out.print(f"no picture: {error}")
    example = found.slices[len(found.slices) // 2].name
    out.print(f"to take one out: matformer extract {run} --submodel {example} --output DIR")


@app.command("extract")
def extract_command(
    run: RunArgument,
    submodel: Annotated[
        list[str],
        typer.Option(
            help='S, M, L, XL, layers such as "S:8,M:8", or a slice of `matformer search`; '
            "may be repeated."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory; one below it for each of several.")],
    format: Annotated[str, typer.Option(help="native, hf, gguf or timm.")] = "native",
    sparse: Annotated[
        bool,
        typer.Option(help="Format hf: exact widths in every layer, for vLLM and its like."),
    ] = False,
    nested: Annotated[
        bool,
        typer.Option(help="Format hf: transformers runs any submodel of it, chosen as it loads."),
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16 or fp16; in format gguf also q8_0.")
    ] = "fp32",
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="The run's tokenizer, or classes.json, if its copy there is gone."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace the model at the output.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Compare all of the checkpoint with its SHA-256 meanwhile.")
    ] = True,
) -> None:
    """Take submodels out of a training run, as models of their own."""
    from matformer_dist.submodels.extract import extract

    for model in extract(
        run,
        submodel,
        output=output,
        format=format,
        sparse=sparse,
        nested=nested,
        dtype=dtype,
        force=force,
        verify=verify,
        tokenizer=tokenizer,
    ):
        out.print(f"{model.submodel}: {model.parameters:,} parameters in {model.path}")
