"""Assembly of the page: what the run says, in the order a reader asks for it."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from math import exp, isfinite, nan
from pathlib import Path
from typing import Any

import jinja2

from matformer_dist.counting import count_parameters
from matformer_dist.errors import UserError
from matformer_dist.report import curves, machine, series, tables, text
from matformer_dist.report.charts import palette, script_json
from matformer_dist.report.commands import commands
from matformer_dist.report.explorer import explorer_data
from matformer_dist.report.inputs import Run, read_run
from matformer_dist.report.points import join_points
from matformer_dist.report.retrieval import read_rows
from matformer_dist.report.retrieval_charts import retrieval_charts
from matformer_dist.report.shapes import Sample
from matformer_dist.report.tradeoff import accuracy_charts, consistency_charts, loss_charts

SAMPLE_CHARACTERS = 4000  # of one text; the rest stays in samples.json
TABLED_EVALUATIONS = 40
_SCRIPTS = ("page.js", "explorer.js")
_VERSIONS = ("matformer_dist", "torch", "deepspeed", "megatron-core", "transformers")


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the report of a run to `output` (default RUN/report.html) and return its path.

    The page is one file that loads nothing. A run that is still training, was never evaluated or
    has not been searched gives a page that says which command fills the gap. Raises UserError
    where config.yaml or metrics.jsonl is missing or any input is broken.
    """
    run_dir = Path(run_dir)
    output = Path(output) if output is not None else run_dir / "report.html"
    page = render(read_run(run_dir))
    if not output.parent.is_dir() or output.is_dir():
        raise UserError(
            f"cannot write the report to {output}: it must be a file in a directory that exists"
        )
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        # A path of undecodable bytes is no UTF-8: it is shown with question marks.
        unfinished.write_text(page, encoding="utf-8", errors="replace")
        os.replace(unfinished, output)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"cannot write the report to {output}: {error.strerror}") from None
    return output


def render(run: Run) -> str:
    """The whole page as text."""
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "compact": text.compact,
        "fixed": text.fixed,
        "percent": text.percent,
        "file_size": text.file_size,
        "interval": text.interval,
        "percent_interval": text.percent_interval,
        "milliseconds": text.milliseconds,
        "script_json": script_json,
    }
    points, retrieval = join_points(run), read_rows(run)
    return environment.get_template("page.html").render(
        run=run,
        name=run.directory.resolve().name,
        css=(here / "page.css").read_text(encoding="utf-8"),
        javascript=[(here / name).read_text(encoding="utf-8") for name in _SCRIPTS],
        palette=palette(len(run.nesting)),
        state=_state(run),
        figures=_headline_figures(run),
        granularities=_granularities(run),
        warning=curves.broken_losses(run),
        learning=[c for c in (curves.loss_chart(run), curves.accuracy_chart(run)) if c],
        separations=[c for c in (curves.gap_chart(run), curves.agreement_chart(run)) if c],
        validations=_validations(run),
        points=points,
        tradeoffs=[*accuracy_charts(run, points), *loss_charts(run, points)],
        consistency=consistency_charts(run, points),
        explorer=explorer_data(run, points),
        slices=tables.slice_rows(run),
        submodels=tables.submodel_table(run),
        speculative=tables.speculative_rows(run),
        downstream=tables.downstream_table(run),
        retrieval=retrieval,
        retrievals=retrieval_charts(retrieval) if retrieval else [],
        machine_charts=machine.machine_charts(run),
        time_parts=machine.time_parts(run),
        slowest=machine.slowest_rank(run),
        prompts=_prompts(run),
        commands=commands(run),
        config=run.config.to_yaml(),
        versions=_versions(),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


@dataclass(frozen=True)
class Granularity:
    """A row of the table that opens the page."""

    name: str
    width: int
    share: float  # of d_ff
    parameters: float
    loss: float
    accuracy: float
    agreement: float

    @property
    def perplexity(self) -> float:
        return exp(self.loss) if self.loss < 100 else nan


def _granularities(run: Run) -> list[Granularity]:
    """Losses of the newest measurement: evaluation.json, unless training has gone on since."""
    model, outputs = run.config.model, run.outputs
    rows = []
    for i, (name, width) in enumerate(zip(run.nesting.names, run.nesting.widths, strict=True)):
        parameters, loss, accuracy, agreement = nan, nan, nan, nan
        evaluated = run.evaluation.uniform(name) if run.evaluation else None
        if outputs is not None:
            submodel = run.nesting.uniform(i, model.n_layers)
            parameters = count_parameters(model, outputs, submodel).total
        elif evaluated:
            parameters = evaluated.parameters
        if evaluated and _evaluation_is_newest(run):
            loss, accuracy = evaluated.loss, evaluated.accuracy
            agreement = evaluated.agreement
        elif line := run.last_validated:
            loss, accuracy, agreement = (
                of.get(name, nan) for of in (line.val_loss, line.val_accuracy, line.val_agreement)
            )
        share = width / run.nesting.d_ff
        rows.append(Granularity(name, width, share, parameters, loss, accuracy, agreement))
    return rows


def _evaluation_is_newest(run: Run) -> bool:
    validated = run.last_validated
    return run.evaluation is not None and (
        validated is None or run.evaluation.step >= validated.step
    )


def _state(run: Run) -> dict[str, Any]:
    """Where the run is, and where the losses of the opening table come from."""
    total = run.config.training.total_steps
    if _evaluation_is_newest(run):
        assert run.evaluation is not None
        source = f"measured at step {run.evaluation.step:,} by matformer evaluate"
    elif run.last_validated:
        source = f"measured at step {run.last_validated.step:,} during training"
    else:
        source = "not measured yet"
    return {"step": run.last.step, "total": total, "source": source}


def _headline_figures(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the figures at the top; only what was logged."""
    last = run.last
    training_s = machine.training_seconds(run)
    per_step = last.units / max(last.step, 1)
    per_second = statistics.median(
        [line.units_per_second for line in run.metrics if isfinite(line.units_per_second)] or [nan]
    )
    figures = [
        (
            f"{run.units} seen",
            text.compact(last.units),
            f"{text.compact(per_step)} a step",
        ),
        ("training time", text.duration(training_s), "steps only"),
        (f"{run.units} per second", text.compact(per_second), "median"),
    ]
    for field, name, show, remark in (
        ("model_tflops_per_second", "model speed", _flops_per_second, "median"),
        ("mfu", "model FLOP use", text.percent, "of the devices' peak, median"),
        ("peak_memory_bytes", "peak memory", text.file_size, "largest, per rank"),
    ):
        values = [v for line in run.metrics if isfinite(v := getattr(line, field))]
        if values and max(values) > 0:
            pick = max(values) if field == "peak_memory_bytes" else statistics.median(values)
            figures.append((name, show(pick), remark))
    return figures


def _flops_per_second(tflops: float) -> str:
    return text.compact(1e12 * tflops, "FLOP/s", billion="G")


def _validations(run: Run) -> dict[str, Any]:
    """Validation losses, and of images accuracies, as a table, at most TABLED_EVALUATIONS evenly
    chosen rows.
    """
    losses = list(curves.curves(run, "val_loss"))
    accuracies = list(curves.curves(run, "val_accuracy")) if run.is_vision else []
    steps = [(line.step, 0.0) for line in run.metrics if line.val_loss]
    by_step = {line.step: line for line in run.metrics}
    rows = []
    for step, _ in series.thin(steps, TABLED_EVALUATIONS):
        line = by_step[step]
        cells = [text.fixed(line.val_loss.get(name, nan), 4) for name in losses]
        cells += [text.percent(line.val_accuracy.get(name, nan)) for name in accuracies]
        rows.append((step, line.units, cells))
    names = [*losses, *(f"{name} accuracy" for name in accuracies)]
    return {"names": names, "rows": rows, "of": len(steps)}


def _prompts(run: Run) -> list[dict[str, Any]]:
    """Samples grouped by prompt, in their order, each group from the smallest submodel up."""
    sizes: dict[str, int] = {item.submodel: item.parameters for _, item in run.extracted}
    if run.evaluation:
        sizes |= {item.submodel: item.parameters for item in run.evaluation.submodels}
    groups: dict[str, list[Sample]] = {}
    for sample in run.samples:
        groups.setdefault(sample.prompt, []).append(sample)
    prompts = []
    for prompt, samples in groups.items():
        shown, cut = text.printable(prompt, SAMPLE_CHARACTERS)
        ordered = sorted(samples, key=lambda sample: sizes.get(sample.submodel, 0))
        texts = [_sample_row(run, sample, sizes.get(sample.submodel)) for sample in ordered]
        prompts.append({"prompt": shown, "cut": cut, "samples": texts})
    return prompts


def _sample_row(run: Run, sample: Sample, parameters: int | None) -> dict[str, Any]:
    continued = sample.text.removeprefix(sample.prompt)
    shown, cut = text.printable(continued, SAMPLE_CHARACTERS)
    return {
        "submodel": sample.submodel,
        "color": curves.color(run, sample.submodel),
        "parameters": nan if parameters is None else parameters,
        "text": shown,
        "cut": cut,
        "seconds": text.duration(sample.seconds),
        "speed": text.compact(sample.tokens_per_second),
    }


def _versions() -> list[tuple[str, str]]:
    """Versions of what is installed where the page is written."""
    found = []
    for package in _VERSIONS:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return found
