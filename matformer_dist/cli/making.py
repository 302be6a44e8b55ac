"""What runs are made of: prepare-data, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matformer_dist.cli.app import app, items, out, whole_numbers
from matformer_dist.errors import UserError


@app.command("prepare-data")
def prepare_data_command(
    inputs: Annotated[
        list[Path], typer.Argument(help=".txt, .jsonl[.gz|.zst], .parquet, or folders of text.")
    ],
    output: Annotated[Path, typer.Option(help="Prefix of the .bin and .idx files to write.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="SentencePiece .model or tokenizer.json to use; else trained."),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Pieces of a tokenizer that is trained.")] = 32000,
    workers: Annotated[int, typer.Option(help="Processes; 0: one a core.")] = 0,
    text_key: Annotated[str, typer.Option(help="Column or key that holds the text.")] = "text",
    include: Annotated[
        list[str] | None, typer.Option(help="Pattern of files to take from folders; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of files to leave out; repeatable.")
    ] = None,
    invalid_text: Annotated[str, typer.Option(help="Bytes not UTF-8: error or replace.")] = "error",
    force: Annotated[bool, typer.Option(help="Replace what is at the output.")] = False,
) -> None:
    """Turn text into the token files that training reads."""
    from matformer_dist.data.corpus import INCLUDE
    from matformer_dist.data.prepare import prepare_data

    if invalid_text not in ("error", "replace"):
        raise UserError(f"--invalid-text {invalid_text!r} must be error or replace")
    prepare_data(
        inputs,
        output,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        workers=workers,
        text_key=text_key,
        include=include or INCLUDE,
        exclude=exclude or (),
        invalid_text=invalid_text,  # type: ignore[arg-type]
        force=force,
    )


@app.command("import")
def import_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Checkpoint in safetensors: a Llama or ViT of Hugging Face, or a ViT of timm.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="RUN", help="Run directory to make.")],
    fractions: Annotated[
        str | None, typer.Option(help="Granularities as shares of the FFN; 1/8,1/4,1/2,1.")
    ] = None,
    widths: Annotated[str | None, typer.Option(help="Or as neurons: 1376,2752,11008.")] = None,
    names: Annotated[str | None, typer.Option(help="Their names: S,M,L,XL.")] = None,
    order: Annotated[
        str, typer.Option(help="Of neurons: by importance, or none, as they are.")
    ] = "importance",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text (of a ViT, images) to measure importance on; repeatable. Without: weights "
            "alone."
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Tokens of it to run; 8192 if left out.")
    ] = None,
    calibration_images: Annotated[
        int | None, typer.Option(help="Images of it to run; 128 if left out.")
    ] = None,
    text_key: Annotated[
        str, typer.Option(help="Key or column of calibration that holds the text.")
    ] = "text",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Another than DIR's: a .model file or tokenizer.json.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a sequence, of calibration and the run's config.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Of a ViT: a JSON list of its classes' names. One without a classifier gets a "
            "fresh head for them."
        ),
    ] = None,
) -> None:
    """Make a Llama or ViT a run whose model is nested, to be trained on or extracted from."""
    from rich.progress import Progress

    from matformer_dist.importing.import_model import import_model
    from matformer_dist.importing.options import ImportOptions

    options = ImportOptions(
        fractions=items("--fractions", fractions),
        widths=whole_numbers("--widths", widths),
        names=items("--names", names),
        order=order,
        calibration=calibration or (),
        calibration_tokens=calibration_tokens,
        text_key=text_key,
        tokenizer=tokenizer,
        seq_len=seq_len,
        calibration_images=calibration_images,
        classes=classes,
    )
    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("importing", total=None)
        model = import_model(
            checkpoint,
            output,
            options,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for notice in model.notices:
        out.print(f"note: {notice}")
    out.print(f"{model.parameters:,} parameters in {model.run}, {model.order}")
    out.print(f"to train on: set data.train in {model.run / 'config.yaml'}")
