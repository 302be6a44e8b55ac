"""The `matformer` command: argument parsing only; the work is done by what each command calls."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from matformer_dist.errors import EXIT_FAILURE, EXIT_USER_ERROR, UserError, as_user_error

app = typer.Typer(
    help="Train nested Transformers and take submodels out of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out = Console(highlight=False, soft_wrap=True)

RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN[@STEP]", help="Run directory; its newest step if none is named."),
]


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
        Path, typer.Argument(metavar="HF_DIR", help="Llama-architecture checkpoint, safetensors.")
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
        typer.Option(help="Text to measure importance on; repeatable. Without: weights alone."),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Tokens of it to run; 8192 if left out.")
    ] = None,
    text_key: Annotated[
        str, typer.Option(help="Key or column of calibration that holds the text.")
    ] = "text",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Another than HF_DIR's: a .model file or tokenizer.json.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a sequence, of calibration and the run's config.")
    ] = None,
) -> None:
    """Make a Hugging Face Llama a run whose model is nested, to be trained on or extracted from."""
    from rich.progress import Progress

    from matformer_dist.importing.import_model import ImportOptions, import_model

    options = ImportOptions(
        fractions=_items("--fractions", fractions),
        widths=_whole_numbers("--widths", widths),
        names=_items("--names", names),
        order=order,
        calibration=calibration or (),
        calibration_tokens=calibration_tokens,
        text_key=text_key,
        tokenizer=tokenizer,
        seq_len=seq_len,
    )
    with Progress(console=_out, transient=True) as progress:
        task = progress.add_task("importing", total=None)
        model = import_model(
            checkpoint,
            output,
            options,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for notice in model.notices:
        _out.print(f"note: {notice}")
    _out.print(f"{model.parameters:,} parameters in {model.run}, {model.order}")
    _out.print(f"to train on: set data.train in {model.run / 'config.yaml'}")


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
    format: Annotated[str, typer.Option(help="native, hf or gguf.")] = "native",
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
        Path | None, typer.Option(help="The run's tokenizer, if its copy there is gone.")
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
        _out.print(f"{model.submodel}: {model.parameters:,} parameters in {model.path}")


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
            _items("--tasks", tasks) or [],
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
    with Progress(console=_out, transient=True) as progress:
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
    _out.print(table)
    file = evaluation.directory / "evaluation.json"
    where = f"written to {file}" if evaluation.is_whole else f"other parts are to come for {file}"
    _out.print(
        f"step {evaluation.step}, {evaluation.tokens:,} validation tokens; loss and KL in nats per "
        f"token, agreement and KL with the largest submodel; {where}"
    )


@app.command("search")
def search_command(
    run: RunArgument,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="params=1.5B, flops=3G (a token), memory=4GiB or latency=12ms (a token); may be "
            "repeated. Without: the frontier from S to XL."
        ),
    ] = None,
    frontier: Annotated[
        str, typer.Option(help="What a whole frontier is over: params, flops, memory, latency.")
    ] = "params",
    points: Annotated[int, typer.Option(help="Budgets of a whole frontier, at most.")] = 24,
    candidates: Annotated[int, typer.Option(help="Measured of each budget and round.")] = 3,
    rounds: Annotated[int, typer.Option(help="Of candidates; 0: the heuristic alone.")] = 2,
    batches: Annotated[
        int | None, typer.Option(min=1, help="Global batches; else the run's evaluation.batches.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Prefix of token files; else the run's validation data.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="That memory is of: fp32, bf16 or fp16.")] = "bf16",
    latency_table: Annotated[
        Path | None,
        typer.Option(help="Times a width, measured where it is not there; RUN/latency.json."),
    ] = None,
    latency_sequences: Annotated[int, typer.Option(help="Decoded together.")] = 1,
    latency_context: Annotated[
        int | None, typer.Option(help="Tokens before the timed one; half of the context.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; else the GPU, if there is one.")
    ] = None,
) -> None:
    """Find the best submodels within a budget, on validation data, into RUN/slices.json."""
    from rich.progress import Progress

    from matformer_dist.search.budget import KINDS, Budget, short_cost
    from matformer_dist.search.picture import draw_frontier
    from matformer_dist.search.search import Options, search

    kind = next((kind for kind in KINDS if kind == frontier), None)
    if kind is None:
        raise UserError(f"--frontier {frontier!r} must be one of {', '.join(KINDS)}")
    options = Options(
        points=points,
        candidates=candidates,
        rounds=rounds,
        batches=batches,
        data=data,
        dtype=dtype,
        table=latency_table,
        sequences=latency_sequences,
        context=latency_context,
        device=device,
    )
    with Progress(console=_out, transient=True) as progress:
        task = progress.add_task("measuring submodels", total=None)
        found = search(
            run,
            [Budget.parse(text) for text in budget or ()],
            kind=kind,
            options=options,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    table = Table("slice", "submodel", "budget", "loss", "agrees with XL", "heuristic", "gain")
    for one in found.slices:
        table.add_row(
            one.name, one.submodel, short_cost(one.kind, one.budget, 4), f"{one.loss:.4f}",
            f"{one.agreement:.1%}", one.heuristic, f"{one.gain:.4f}",
        )  # fmt: skip
    _out.print(table)
    _out.print(
        f"step {found.all.step}, {len(found.all.measured)} submodels measured "
        f"({found.measured_now} of them now) on {found.all.tokens:,} tokens; gain: nats a token "
        f"below the heuristic; written to {found.run / 'slices.json'} and slices.csv"
    )
    if found.all.latency_on:
        _out.print(f"latency on {found.all.latency_on}")
    try:
        draw_frontier(found.all, found.slices[0].kind, found.nesting, found.run / "frontier.png")
        _out.print(f"picture: {found.run / 'frontier.png'}")
    except UserError as error:
        _out.print(f"no picture: {error}")
    example = found.slices[len(found.slices) // 2].name
    _out.print(f"to take one out: matformer extract {run} --submodel {example} --output DIR")


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
    width = 60 + 24 * len(evaluation.submodels)  # a number is never cut
    Console(highlight=False, width=max(_out.width, width)).print(table)
    for note in evaluation.notes():
        _out.print(note, markup=False)


def _leave_out(options: Mapping[str, object], why: str) -> None:
    """UserError for the first of them that is given."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise UserError(f"{name} {why}")


@app.command("convert")
def convert_command(
    run: RunArgument,
    output: Annotated[Path, typer.Option(help="Run directory to make.")],
) -> None:
    """Write a checkpoint with whole weights, as DeepSpeed's universal checkpoints have them."""
    from rich.progress import Progress

    from matformer_dist.checkpoints.convert import convert

    with Progress(console=_out, transient=True) as progress:
        task = progress.add_task("converting", total=None)
        path = convert(
            run, output, lambda n, total: progress.update(task, completed=n, total=total)
        )
    _out.print(f"universal checkpoint: {path}")


@app.command("verify")
def verify_command(
    run: Annotated[
        str, typer.Argument(metavar="RUN[@STEP]", help="Run directory, or one checkpoint of it.")
    ],
) -> None:
    """Read checkpoints and compare every file with its SHA-256; exit code 1 if one is damaged."""
    from rich.progress import Progress

    from matformer_dist.checkpoints.verify import verify

    with Progress(console=_out, transient=True) as progress:
        task = progress.add_task("reading", total=None)
        verdicts = verify(run, lambda n, total: progress.update(task, advance=n, total=total))
    for verdict in verdicts:
        _out.print(f"{verdict.path.name:<12} {verdict}")
    if any(verdict.faults for verdict in verdicts):
        raise typer.Exit(EXIT_FAILURE)


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
    draft_tokens: Annotated[str, typer.Option(metavar="N|auto", help="To draft at a time.")] = "4",
    draft_cache: Annotated[
        str, typer.Option(metavar="own|shared", help="Of the draft's keys and values.")
    ] = "shared",
) -> None:
    """Sample text from a run, at any of its submodels, or from an extracted model."""
    from matformer_dist.inference.generation import Sampling, speak

    statistics = speak(
        model,
        prompt or [""],
        submodel or (),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
        draft=draft,
        draft_tokens=_draft_tokens(draft_tokens),
        draft_cache=draft_cache,  # type: ignore[arg-type] # checked there
        on_text=lambda text: typer.echo(text, nl=False),
    )
    typer.echo()
    if statistics:
        typer.echo(
            f"{draft} drafted {statistics.drafted} tokens, of which {statistics.acceptance:.1%} "
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
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of those of validation data.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest.")] = 0.0,
    repetitions: Annotated[int, typer.Option(min=1, help="Of which medians are shown.")] = 3,
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
    )
    with Progress(console=_out, transient=True) as progress:
        task = progress.add_task("decoding", total=None)
        file, found = measure_speedups(
            run, terms, lambda n, total: progress.update(task, completed=n, total=total)
        )
    table = Table(
        "draft", "cache", "drafted", "accepted", "tokens a verify", "tokens/s", "speed-up"
    )
    for column in table.columns[2:]:
        column.justify = "right"
    plain = found.plain_tokens_per_second
    table.add_row("none", "", "", "", "", f"{plain:.1f}", "1.00")
    for entry in found.drafts:
        table.add_row(
            entry["draft"], entry["cache"], str(entry["draft_tokens"]),
            f"{entry['acceptance']:.1%}", f"{entry['tokens_per_verify']:.2f}",
            f"{entry['tokens_per_second']:.1f}", f"{entry['speedup']:.2f}",
        )  # fmt: skip
    _out.print(table)
    _out.print(
        f"step {found.step}, verified by {found.verifier}, {found.prompts} prompts of "
        f"{found.new_tokens} new tokens, one at a time; written to {file}"
    )


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    output: Annotated[Path | None, typer.Option(help="File; RUN/report.html if left out.")] = None,
) -> None:
    """Write a run's report page."""
    from matformer_dist.report import write_report

    _out.print(f"report: {write_report(run, output)}")


@app.command("plan")
def plan_command(
    config: Annotated[Path, typer.Argument(help="YAML file of a run, see launch/configs.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="Devices of the run; 8 if left out.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Their kind: h100, h200, a100-80gb, ...")] = "h100",
    memory: Annotated[
        float | None, typer.Option(min=0.1, max=1e5, help="GiB of one, where not its kind's.")
    ] = None,
    peak_tflops: Annotated[
        float | None,
        typer.Option(min=0.1, max=1e6, help="Dense TFLOP/s of one, where not its kind's."),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, max=1024)] = 8,
    link: Annotated[
        float | None, typer.Option(min=0.1, max=1e5, help="GB/s of one to its node, one direction.")
    ] = None,
    network: Annotated[
        float,
        typer.Option(min=0.01, max=1e5, help="GB/s of one's share of the network between nodes."),
    ] = 50.0,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1, help="Of the arithmetic alone, assumed.")
    ] = 0.4,
    tokens: Annotated[
        float | None,
        typer.Option(min=1, max=1e18, help="To train on, such as 160e9; else the config's."),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Of a device's hour, for the cost.")
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(min=2, max=10**8, help="Where neither config nor tokenizer says it."),
    ] = None,
    sweep: Annotated[bool, typer.Option(help="From 8 to 4096 devices.")] = False,
    scale_batch: Annotated[
        bool, typer.Option(help="With --sweep: the batch grows with the devices, from 8 on.")
    ] = False,
) -> None:
    """What a run will need, before it runs; layouts that fit, and why."""
    from matformer_dist.config_file import load_config
    from matformer_dist.deepspeed_section import check_deepspeed_section
    from matformer_dist.planning import plan
    from matformer_dist.planning.machines import Machine, find_device

    if scale_batch and not sweep:
        raise UserError("--scale-batch is for --sweep; add it, or leave --scale-batch out")
    if sweep and gpus:
        raise UserError(f"--sweep plans for 8 to 4096 devices; leave --gpus {gpus} out")
    device = find_device(gpu)
    loaded = load_config(config, overrides or (), if_open=plan.IF_OPEN)
    machine = Machine(
        name=gpu.upper(),
        memory_bytes=round((memory or device.memory_gib) * 2**30),
        peak_tflops=peak_tflops or device.peak_tflops(loaded.training.precision),
        devices_per_node=gpus_per_node,
        link_gb_per_second=link or device.link_gb_per_second,
        network_gb_per_second=network,
        assumed_mfu=mfu,
    )
    devices = gpus or 8
    if vocab_size and vocab_size != (loaded.model.vocab_size or vocab_size):
        raise UserError(
            f"--vocab-size {vocab_size} is not model.vocab_size, which is "
            f"{loaded.model.vocab_size}; leave one of them out"
        )
    plan.check_order(None if sweep else devices, machine)
    check_deepspeed_section(loaded, max(1, devices // loaded.parallel.tensor))
    training = loaded.training
    of_config = training.total_steps * training.global_batch_size * training.seq_len
    order = plan.Order(
        config=loaded,
        vocab_size=vocab_size or loaded.model.vocab_size or _vocab_size(loaded.data.tokenizer),
        devices=devices,
        machine=machine,
        tokens=round(tokens or of_config),
        price_per_hour=price,
    )
    # As wide as its tables are: a number is never cut, in a pipe or a narrow window.
    out = Console(highlight=False, soft_wrap=True, width=max(_out.width, 160))
    for part in plan.show_sweep(order, scale_batch) if sweep else plan.show_plan(order):
        out.print(part)


def _vocab_size(tokenizer: Path) -> int:
    from matformer_dist.data.tokenizer_files import load_tokenizer

    try:
        return load_tokenizer(tokenizer).vocab_size
    except UserError as error:
        raise UserError(
            f"how large is the vocabulary? {error}; or set --vocab-size, or model.vocab_size"
        ) from None


@app.command("doctor")
def doctor_command(
    dir: Annotated[
        Path, typer.Option(metavar="RUN", help="Where a run is written; here if left out.")
    ] = Path(),
) -> None:
    """Look at what is installed and this machine, and try two ranks; for bug reports."""
    from matformer_dist.doctor import examine

    problems = []
    for finding in examine(dir):
        _out.print(f"{finding.what:<14} {finding.text}", markup=False)
        if finding.problem:
            problems.append(finding)
    _out.print("" if problems else "\nno problems found")
    for one in sorted(problems, key=lambda one: not one.fails):
        _out.print(f"{'problem' if one.fails else 'note':<8} {one.problem}", markup=False)
    if any(one.fails for one in problems):
        raise typer.Exit(EXIT_FAILURE)


def _draft_tokens(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--draft-tokens {text!r} must be a number from 1 on, or auto")
    return int(text)


def _items(option: str, text: str | None) -> list[str] | None:
    """The items of a list such as S,M,L; None where the option is not given."""
    if text is None:
        return None
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise UserError(f"{option} {text!r} must be items with commas between them")
    return items


def _whole_numbers(option: str, text: str | None) -> list[int] | None:
    items = _items(option, text)
    if items is None:
        return None
    try:
        return [int(item) for item in items]
    except ValueError:
        raise UserError(
            f"{option} {text!r} must be whole numbers with commas between them, such as 256,1024"
        ) from None


def main() -> None:
    """Run the command; what the user can mend is one message and exit code 2.

    SIGINT and SIGTERM end it as exceptions do, so that what was begun is cleaned away.
    """
    signals: list[int] = []

    def end(number: int, _: object) -> None:
        signals.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        app()
    except Exception as error:
        if signals:  # compiled code may make an error of its own of what a handler raises
            sys.exit(128 + signals[0])
        if not isinstance(said := as_user_error(error), UserError):
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
