"""Runs and machines: plan, convert, verify, report, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matformer_dist.cli.app import RunArgument, app, out, print_wide
from matformer_dist.config import Config
from matformer_dist.errors import EXIT_FAILURE, UserError


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
        typer.Option(
            min=1, max=1e18, help="To train on, such as 160e9, or images; else the config's."
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Of a device's hour, for the cost.")
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=2, max=10**8, help="Or classes, where neither config nor tokenizer says it."
        ),
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
    known, key = loaded.model.known_outputs, f"model.{loaded.model.outputs_key}"
    if vocab_size and vocab_size != (known or vocab_size):
        raise UserError(
            f"--vocab-size {vocab_size} is not {key}, which is {known}; leave one of them out"
        )
    plan.check_order(None if sweep else devices, machine)
    check_deepspeed_section(loaded, max(1, devices // loaded.parallel.tensor))
    training = loaded.training
    of_config = loaded.units(training.total_steps * training.global_batch_size)
    order = plan.Order(
        config=loaded,
        outputs=vocab_size or known or _outputs(loaded),
        devices=devices,
        machine=machine,
        units=round(tokens or of_config),
        price_per_hour=price,
    )
    for part in plan.show_sweep(order, scale_batch) if sweep else plan.show_plan(order):
        print_wide(part)


def _outputs(config: Config) -> int:
    """Of the tokenizer, where the settings do not say it."""
    from matformer_dist.config_language import LanguageConfig
    from matformer_dist.data.tokenizer_files import load_tokenizer

    if not isinstance(config, LanguageConfig):
        raise UserError("how many classes are there? Set model.classes, or --vocab-size")
    try:
        return load_tokenizer(config.data.tokenizer).vocab_size
    except UserError as error:
        raise UserError(
            f"how large is the vocabulary? {error}; or set --vocab-size, or model.vocab_size"
        ) from None


@app.command("convert")
def convert_command(
    run: RunArgument,
    output: Annotated[Path, typer.Option(help="Run directory to make.")],
) -> None:
    """Write a checkpoint with whole weights, as DeepSpeed's universal checkpoints have them."""
    from rich.progress import Progress

    from matformer_dist.checkpoints.convert import convert

    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("converting", total=None)
        path = convert(
            run, output, lambda n, total: progress.update(task, completed=n, total=total)
        )
    out.print(f"universal checkpoint: {path}")


@app.command("verify")
def verify_command(
    run: Annotated[
        str, typer.Argument(metavar="RUN[@STEP]", help="Run directory, or one checkpoint of it.")
    ],
) -> None:
    """Read checkpoints and compare every file with its SHA-256; exit code 1 if one is damaged."""
    from rich.progress import Progress

    from matformer_dist.checkpoints.verify import verify

    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("reading", total=None)
        verdicts = verify(run, lambda n, total: progress.update(task, advance=n, total=total))
    for verdict in verdicts:
        out.print(f"{verdict.path.name:<12} {verdict}")
    if any(verdict.faults for verdict in verdicts):
        raise typer.Exit(EXIT_FAILURE)


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    output: Annotated[Path | None, typer.Option(help="File; RUN/report.html if left out.")] = None,
) -> None:
    """Write a run's report page."""
    from matformer_dist.report import write_report

    out.print(f"report: {write_report(run, output)}")


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
        out.print(f"{finding.what:<14} {finding.text}", markup=False)
        if finding.problem:
            problems.append(finding)
    out.print("" if problems else "\nno problems found")
    for one in sorted(problems, key=lambda one: not one.fails):
        out.print(f"{'problem' if one.fails else 'note':<8} {one.problem}", markup=False)
    if any(one.fails for one in problems):
        raise typer.Exit(EXIT_FAILURE)
