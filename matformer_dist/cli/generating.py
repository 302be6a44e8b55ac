"""Text: generate, speculate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from matformer_dist.cli.app import DeviceOption, RunArgument, app, leave_out, number, out
from matformer_dist.errors import UserError


@app.command("generate")
def generate_command(
    model: Annotated[
        Path, typer.Argument(metavar="RUN[@STEP]|DIR", help="A run, or an extracted model.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to go on from; several are one batch.")
    ] = None,
    submodel: Annotated[
        list[str] | None,
        typer.Option(help="The largest if left out; else one for all prompts, or one for each."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest.")] = 0.8,
    top_k: Annotated[
        int, typer.Option(min=0, help="Draw among so many of the likeliest; 0: among all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Of these, among the fewest that hold this share.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    draft: Annotated[
        str | None, typer.Option(help="A smaller submodel that drafts; the text stays exact.")
    ] = None,
    draft_tokens: Annotated[
        str | None, typer.Option(metavar="N|auto", help="To draft at a time; 4 if left out.")
    ] = None,
    draft_cache: Annotated[
        str | None,
        typer.Option(
            metavar="own|shared", help="Of the draft's keys and values; shared if left out."
        ),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Sample text from a run, at any of its submodels, or from an extracted model."""
    from matformer_dist.inference.generation import Sampling, speak

    if draft is None:
        leave_out(
            {"--draft-tokens": draft_tokens, "--draft-cache": draft_cache},
            "is for --draft; name one, or leave it out",
        )
    statistics = speak(
        model,
        prompt or [""],
        submodel or (),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
        draft=draft,
        draft_tokens=_draft_tokens("4" if draft_tokens is None else draft_tokens),
        draft_cache="shared" if draft_cache is None else draft_cache,  # type: ignore[arg-type] # checked there
        device=device,
        on_text=lambda text: typer.echo(text, nl=False),
    )
    typer.echo()
    if statistics:
        accepted = number(statistics.acceptance, ".1%")
        typer.echo(
            f"{draft} drafted {statistics.drafted} tokens, of which {accepted} "
            f"were accepted: {statistics.tokens_per_verify:.2f} tokens a verify",
            err=True,
        )


@app.command("speculate")
def speculate_command(
    run: RunArgument,
    verifier: Annotated[
        str | None, typer.Option(help="Whose text it is; the largest if left out.")
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(help="May be repeated; all granularities below the verifier if left out."),
    ] = None,
    cache: Annotated[str, typer.Option(metavar="own|shared|both", help="Of drafts.")] = "both",
    draft_tokens: Annotated[str, typer.Option(metavar="N|auto", help="To draft at a time.")] = "4",
    prompts: Annotated[
        Path | None, typer.Option(help="File with a prompt a line; else the run's validation data.")
    ] = None,
    prompt_count: Annotated[int, typer.Option(min=1, help="At most so many prompts.")] = 8,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of those of validation data; else up to 32.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest.")] = 0.0,
    repetitions: Annotated[int, typer.Option(min=1, help="Of which medians are shown.")] = 3,
    device: DeviceOption = None,
    output: Annotated[Path | None, typer.Option(help="File to write instead.")] = None,
) -> None:
    """Time speculative decoding against plain decoding, into RUN/speculative.json."""
    from rich.progress import Progress

    from matformer_dist.inference.speedup import Terms, measure_speedups

    if cache not in ("own", "shared", "both"):
        raise UserError(f"--cache {cache!r} must be own, shared or both")
    terms = Terms(
        verifier=verifier,
        drafts=draft or (),
        caches=("own", "shared") if cache == "both" else (cache,),
        draft_tokens=_draft_tokens(draft_tokens),
        prompts=prompts,
        n_prompts=prompt_count,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        temperature=temperature,
        repetitions=repetitions,
        device=device,
        output=output,
    )
    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("decoding", total=None)
        file, found = measure_speedups(
            run, terms, lambda n, total: progress.update(task, completed=n, total=total)
        )
    table = Table(
        "draft", "cache", "draft tokens", "accepted", "tokens a verify", "tokens/s", "speed-up"
    )
    for column in table.columns[2:]:
        column.justify = "right"
    plain = found.plain_tokens_per_second
    table.add_row("none", "", "", "", "", f"{plain:.1f}", "1.00")
    for entry in found.drafts:
        table.add_row(
            entry["draft"], entry["cache"], str(entry["draft_tokens"]),
            number(entry["acceptance"], ".1%"), number(entry["tokens_per_verify"], ".2f"),
            f"{entry['tokens_per_second']:.1f}", f"{entry['speedup']:.2f}",
        )  # fmt: skip
    out.print(table)
    out.print(
        f"step {found.step}, verified by {found.verifier}, {found.prompts} prompts of "
        f"{found.new_tokens} new tokens, one at a time; written to {file}"
    )


def _draft_tokens(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not re.fullmatch("0*[1-9][0-9]{0,5}", text):
        raise UserError(f"--draft-tokens {text[:40]!r} must be a number from 1 on, or auto")
    return int(text)
