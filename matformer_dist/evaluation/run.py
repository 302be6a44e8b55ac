"""Evaluation of a training run, from its checkpoint, or of a model that was taken out of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matformer_dist.checkpoints.files import check_output, replace_json
from matformer_dist.counting import count_parameters, flops_per_unit
from matformer_dist.evaluation.loss import measure_sequences, sparing
from matformer_dist.evaluation.measured import Measured
from matformer_dist.evaluation.parts import Part, join
from matformer_dist.evaluation.sources import Source, open_source
from matformer_dist.evaluation.validation import Validation, open_validation
from matformer_dist.inference.device import choose_device
from matformer_dist.nesting import Submodel

EVALUATION = "evaluation.json"
_AT_ONCE = 4  # submodels of a pass, XL among them


@dataclass(frozen=True)
class RunEvaluation:
    """What `evaluation.json` holds, or a part of it; see `evaluate_run`."""

    file: Path
    step: int
    unit: str  # tokens, or images
    units: int  # of validation
    results: list[dict[str, Any]]
    is_whole: bool  # else the results are one part's, of which others are not there yet
    note: str  # what there is to know beside the numbers; empty where nothing


def evaluate_run(
    source: str,
    notations: Sequence[str] = (),
    *,
    heuristic: bool = False,
    batches: int | None = None,
    data: str | Path | None = None,
    run: Path | None = None,
    part: Part | None = None,
    device: str | None = None,
    output: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunEvaluation:
    """Validation losses of the uniform submodels, those in `notations`, and the heuristic's.

    `source` is RUN, RUN@STEP, a checkpoint, or a `native` or `hf` model that was extracted, of
    which what it holds is evaluated. `batches` of the run's global batch size (default: its
    evaluation.batches), so that the samples are those that training evaluated; `data`: the prefix
    of other token files, or other images, to take them from; `run`: where an extracted model's run
    is now. Writes `output`, else evaluation.json in the directory of the run or model; with a
    `part` of the submodels, the last part to come to its end does so. Agreement and KL are with XL
    of the run, and NaN where its checkpoint is gone. `progress` is called with micro-batches done
    and in all. UserError for what is not there, a submodel that does not fit, or more parts than
    submodels.
    """
    check_output(output)
    model = open_source(source, notations, heuristic, run, choose_device(device), data)
    mine = part.take(model.chosen) if part else model.chosen
    validation = open_validation(model.config, model.labels, batches, data)
    measured = _measure(model, validation, list(mine), progress)
    results = [_entry(model, submodel, kind, measured[submodel]) for submodel, kind in mine.items()]
    units = next(iter(measured.values())).predictions
    written = {
        "step": model.step,
        model.config.unit: units,
        "bytes": validation.text_bytes,
        "data": None if data is None else str(data),
        "data_sha256": validation.digest,
    }
    file = output or model.directory / EVALUATION
    joined: list[dict[str, Any]] | None = results
    if part:
        seal = {"source": model.identity, "submodels": [*map(str, model.chosen)]}
        joined = join(model.directory, part, {**written, **seal}, results)
    results = sorted(joined or results, key=lambda entry: entry["parameters"])
    if joined:
        replace_json(file, {**written, "submodels": results})
    return RunEvaluation(
        file,
        model.step,
        model.config.unit,
        units,
        results,
        bool(joined),
        model.lacks_largest,
    )


@torch.no_grad()
def _measure(
    model: Source,
    validation: Validation,
    submodels: list[Submodel],
    progress: Callable[[int, int], None],
) -> Mapping[Submodel, Measured]:
    def counted() -> Iterator[tuple[Tensor, Tensor]]:
        for done, batch in enumerate(validation.micro_batches(model.device)):
            progress(done, len(validation))
            yield batch
        progress(len(validation), len(validation))

    found = measure_sequences(
        sparing(model.run_pass), counted(), submodels, model.largest, per_pass=_AT_ONCE
    )
    return {
        submodel: Measured(sequences.cpu(), validation.text_bytes)
        for submodel, sequences in found.items()
    }


def _entry(model: Source, submodel: Submodel, kind: str, measured: Measured) -> dict[str, Any]:
    of, outputs = model.config.model, model.outputs
    count = count_parameters(of, outputs, submodel)
    return {
        "submodel": str(submodel),
        "kind": kind,
        "parameters": count.total,
        "non_embedding_parameters": count.non_embedding,
        "flops": flops_per_unit(of, outputs, submodel, model.config.sample),
        **measured.described(),
    }
