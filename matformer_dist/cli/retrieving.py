"""A gallery embedded once, queries by any submodel: retrieve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from matformer_dist.cli.app import (
    DeviceOption,
    RunArgument,
    app,
    number,
    out,
    print_wide,
    whole_numbers,
)
from matformer_dist.errors import UserError

if TYPE_CHECKING:
    from matformer_dist.submodels.retrieval_results import RetrievalResult

_IMAGES = "Images"


@app.command("retrieve")
def retrieve_command(
    run: RunArgument,
    submodel: Annotated[
        list[str] | None,
        typer.Option(
            help="That queries, beside the uniform and the paper's Mix'n'Match ones; repeatable."
        ),
    ] = None,
    independent: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="An encoder trained apart, for contrast; repeatable."),
    ] = None,
    k: Annotated[
        str | None, typer.Option(help="Numbers of neighbours; 1,5,10 if left out.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="faiss or torch; else FAISS, if it is installed.")
    ] = None,
    device: DeviceOption = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write; RUN/retrieval.json if left out.")
    ] = None,
    gallery: Annotated[
        str | None,
        typer.Option(help="Images as in data.train; else the run's.", rich_help_panel=_IMAGES),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(help="The same; else its validation images.", rich_help_panel=_IMAGES),
    ] = None,
    gallery_images: Annotated[
        int | None, typer.Option(min=2, help="At most.", rich_help_panel=_IMAGES)
    ] = None,
    query_images: Annotated[
        int | None, typer.Option(min=2, help="At most.", rich_help_panel=_IMAGES)
    ] = None,
) -> None:
    """Adaptive retrieval: XL embeds a gallery, any submodel the queries (paper sec. 4.2)."""
    from rich.progress import Progress

    from matformer_dist.evaluation.retrieval import KS
    from matformer_dist.evaluation.retrieve import ImagesAsked, retrieve

    if backend not in (None, "faiss", "torch"):
        raise UserError(f"--backend {backend!r} must be faiss or torch")
    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("embedding", total=None)
        file, result = retrieve(
            run,
            submodel or (),
            independents=independent or (),
            images=ImagesAsked(gallery, queries, gallery_images, query_images),
            ks=whole_numbers("--k", k) or KS,
            backend=backend,  # type: ignore[arg-type]  # checked
            device=device,
            output=output,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    print_wide(_table(result))
    out.print(
        f"step {result.step}, gallery of {result.gallery:,} images, {result.queries:,} queries, "
        f"by {result.backend}; chance {result.chance.accuracy:.1%}; written to {file}"
    )
    for note in result.notes:
        out.print(note, markup=False)


def _table(result: RetrievalResult) -> Table:
    most = result.ks[-1]
    table = Table(
        "query encoder", "gallery", "MFLOPs", "saved", "1-NN", "lost", f"recall@{most}",
        "neighbours", "distances",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for one in result.entries:
        table.add_row(
            one.submodel if one.encoder == "nested" else one.encoder,
            one.gallery,
            f"{one.query_flops / 1e6:.2f}",
            number(result.saved(one), ".1%"),
            number(one.knn_accuracy[1].value, ".1%"),
            number(100 * one.accuracy_lost[1].value, ".2f"),
            number(one.recall[most].value, ".1%"),
            number(one.neighbour_agreement[most].value, ".1%"),
            number(one.pearson.value, ".3f"),
        )
    return table
