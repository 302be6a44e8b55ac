"""Evaluation of a training run, from its checkpoint, or of a model that was taken out of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matformer_dist.checkpoints.files import replace_file
from matformer_dist.config import Config
from matformer_dist.config_file import load_config
from matformer_dist.counting import count_parameters, flops_per_token
from matformer_dist.errors import UserError
from matformer_dist.evaluation.loss import measure_sequences
from matformer_dist.evaluation.measured import Measured
from matformer_dist.evaluation.parts import Part, join
from matformer_dist.evaluation.validation import Validation
from matformer_dist.inference.loading import LoadedModel, load_model
from matformer_dist.nesting import Submodel, mix_n_match
from matformer_dist.submodels.entry import is_extracted, read_entry

EVALUATION = "evaluation.json"
_AT_ONCE = 4  # submodels of a pass, XL among them


@dataclass(frozen=True)
class RunEvaluation:
    """What `evaluation.json` holds, or a part of it; see `evaluate_run`."""

    directory: Path
    step: int
    tokens: int
    results: list[dict[str, Any]]
    is_whole: bool  # else the results are one part's, of which others are not there yet


def evaluate_run(
    source: str,
    notations: Sequence[str] = (),
    *,
    heuristic: bool = False,
    batches: int | None = None,
    data: Path | None = None,
    run: Path | None = None,
    part: Part | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunEvaluation:
    """Validation losses of the uniform submodels, those in `notations`, and the heuristic's.

    `source` is RUN, RUN@STEP, a checkpoint, or a `native` or `hf` model that was extracted; of an
    `hf` model, which holds one submodel alone, that one is evaluated. `batches` of the run's global
    batch size (default: its evaluation.batches), so that the sequences are those that training
    evaluated; `data`: the prefix of other token files to take them from; `run`: where an extracted
    model's run is now. Writes evaluation.json into the directory of the run or model; with a `part`
    of the submodels, the last part to come to its end does so. `progress` is called with
    micro-batches done and in all. UserError for what is not there, a submodel that does not fit, or
    more parts than submodels.
    """
    loaded = load_model(source, device=_device(device))
    config, step = _origin(loaded, run)
    chosen = _chosen(loaded, notations, heuristic)
    mine = part.take(chosen) if part else chosen
    validation = Validation.of(config, loaded.tokenizer, batches, data)
    measured = _measure(loaded, validation, list(mine), progress)
    results = [
        _entry(loaded, submodel, kind, measured[submodel], config.training.seq_len)
        for submodel, kind in mine.items()
    ]
    tokens = next(iter(measured.values())).tokens
    written = {"step": step, "tokens": tokens, "bytes": validation.text_bytes}
    joined: list[dict[str, Any]] | None = results
    if part:
        seal = {"source": str(source), "data": validation.digest, "submodels": [*map(str, chosen)]}
        joined = join(loaded.directory, part, {**written, **seal}, results)
    results = sorted(joined or results, key=lambda entry: entry["parameters"])
    if joined:
        content = json.dumps({**written, "submodels": results}, indent=1)
        replace_file(loaded.directory / EVALUATION, content.encode())
    return RunEvaluation(loaded.directory, step, tokens, results, bool(joined))


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _origin(loaded: LoadedModel, run: Path | None) -> tuple[Config, int]:
    """The configuration that says what is validated on, and the step of the weights."""
    if not is_extracted(loaded.directory):
        if run is not None:
            raise UserError(
                f"--run {run} is for extracted models; {loaded.directory} is a run: leave it out"
            )
        assert loaded.step is not None
        return load_config(loaded.directory / "config.yaml"), loaded.step
    entry = read_entry(loaded.directory)
    home = run or Path(entry["run"])
    if not (home / "config.yaml").exists():
        raise UserError(
            f"{loaded.directory} was extracted from {entry['run']}, and {home} holds no "
            "config.yaml, which says what to validate on; name the run by --run DIR"
        )
    return load_config(home / "config.yaml"), int(entry["step"])


def _chosen(loaded: LoadedModel, notations: Sequence[str], heuristic: bool) -> dict[Submodel, str]:
    """Submodels that the model holds, with their kind; the whole of it among them."""
    nesting, layers = loaded.submodel.nesting, loaded.model.model.n_layers
    chosen = {one: "uniform" for one in nesting.uniforms(layers) if loaded.holds(one)}
    chosen.setdefault(loaded.submodel, "mix")
    for notation in notations:
        chosen.setdefault(loaded.parse(notation), "mix")
    if heuristic:
        for submodel in filter(loaded.holds, mix_n_match(nesting, layers)):
            chosen.setdefault(submodel, "heuristic")
    return chosen


@torch.no_grad()
def _measure(
    loaded: LoadedModel,
    validation: Validation,
    submodels: list[Submodel],
    progress: Callable[[int, int], None],
) -> Mapping[Submodel, Measured]:
    model = loaded.model

    def counted() -> Any:
        for done, batch in enumerate(validation.micro_batches(model.embedding.weight.device)):
            progress(done, len(validation))
            yield batch
        progress(len(validation), len(validation))

    found = measure_sequences(
        lambda tokens, targets, plan: model(tokens, targets, plan)[1],
        counted(),
        submodels,
        loaded.submodel,
        per_pass=_AT_ONCE,
    )
    return {
        submodel: Measured(sequences.cpu(), validation.text_bytes)
        for submodel, sequences in found.items()
    }


def _entry(
    loaded: LoadedModel, submodel: Submodel, kind: str, measured: Measured, seq_len: int
) -> dict[str, Any]:
    model, vocab_size = loaded.model.model, loaded.model.vocab_size
    count = count_parameters(model, vocab_size, submodel)
    return {
        "submodel": str(submodel),
        "kind": kind,
        "parameters": count.total,
        "non_embedding_parameters": count.non_embedding,
        "flops_per_token": flops_per_token(model, vocab_size, submodel, seq_len),
        **measured.described(),
    }
