"""Evaluation of a finished or running training run, in one process, from its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from matformer_dist.checkpoints.files import replace_file
from matformer_dist.checkpoints.universal import load_universal
from matformer_dist.checkpoints.verify import BackgroundCheck
from matformer_dist.config_file import load_config
from matformer_dist.counting import count_parameters, flops_per_token
from matformer_dist.data.datasets import build_datasets, micro_batches
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.evaluation.loss import SubmodelLoss, evaluate_submodels
from matformer_dist.evaluation.parts import Part, join
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Submodel, mix_n_match
from matformer_dist.run_directory import find_checkpoint


@dataclass(frozen=True)
class RunEvaluation:
    """What `evaluation.json` holds, or a part of it; see `evaluate_run`."""

    run: Path
    step: int
    tokens: int
    results: list[dict[str, Any]]
    is_whole: bool  # else the results are one part's, of which others are not there yet


def evaluate_run(
    run: str,
    notations: Sequence[str] = (),
    *,
    heuristic: bool = False,
    batches: int | None = None,
    part: Part | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunEvaluation:
    """Validation losses of the uniform submodels, those in `notations`, and the heuristic's.

    `run` is RUN, RUN@STEP or a checkpoint. `batches` of the run's global batch size (default: its
    evaluation.batches), so that the sequences are those that training evaluated. Writes
    evaluation.json into the run directory; with a `part` of the submodels, the last part to come to
    its end does so. `progress` is called with micro-batches done and in all. UserError for a
    missing run, a submodel that does not fit, or more parts than submodels.
    """
    checkpoint = find_checkpoint(run)
    directory = checkpoint.path.parent.parent
    config = load_config(directory / "config.yaml")
    nesting, layers = config.granularities, config.model.n_layers
    chosen = dict.fromkeys(nesting.uniforms(layers), "uniform")
    for notation in notations:
        chosen.setdefault(nesting.parse(notation, layers), "mix")
    if heuristic:
        for submodel in mix_n_match(nesting, layers):
            chosen.setdefault(submodel, "heuristic")
    mine = part.take(chosen) if part else chosen
    universal = load_universal(checkpoint)
    with BackgroundCheck(checkpoint):
        model = universal.build()
    size = config.training.micro_batch_size
    sequences = (batches or config.evaluation.batches) * config.training.global_batch_size
    count = sequences // size
    tokenizer = load_tokenizer(directory)
    _, validation = build_datasets(config, tokenizer, size, sequences)
    assert validation is not None

    def counted() -> Any:
        source = micro_batches(
            validation,
            consumed=0,
            micro_batch_size=size,
            data_parallel_rank=0,
            data_parallel_size=1,
        )
        for done, batch in enumerate(islice(source, count)):
            progress(done, count)
            yield batch
        progress(count, count)

    losses = _measure(model, counted(), list(mine), nesting.uniforms(layers)[0], len(nesting))
    results = [
        _entry(model, submodel, kind, losses[str(submodel)], config.training.seq_len)
        for submodel, kind in mine.items()
    ]
    tokens = next(iter(losses.values())).tokens
    written = {"step": checkpoint.step, "tokens": tokens}
    if part:
        seal = {
            "checkpoint": checkpoint.manifest.manifest_sha256,
            "submodels": list(map(str, chosen)),
        }
        joined = join(directory, part, {**written, **seal}, results)
    else:
        joined = results
    results = sorted(joined or results, key=lambda entry: entry["parameters"])
    if joined:
        content = json.dumps({**written, "submodels": results}, indent=1)
        replace_file(directory / "evaluation.json", content.encode())
    return RunEvaluation(directory, checkpoint.step, tokens, results, bool(joined))


@torch.no_grad()
def _measure(
    model: MatLM, batches: Any, submodels: list[Submodel], largest: Submodel, per_pass: int
) -> dict[str, SubmodelLoss]:
    return evaluate_submodels(
        lambda tokens, targets, plan: model(tokens, targets, plan)[1],
        batches,
        submodels,
        largest,
        per_pass=per_pass,
    )


def _entry(
    model: MatLM, submodel: Submodel, kind: str, result: SubmodelLoss, seq_len: int
) -> dict[str, Any]:
    count = count_parameters(model.model, model.vocab_size, submodel)
    return {
        "submodel": str(submodel),
        "kind": kind,
        "parameters": count.total,
        "non_embedding_parameters": count.non_embedding,
        "flops_per_token": flops_per_token(model.model, model.vocab_size, submodel, seq_len),
        "loss": result.loss,
        "agreement": result.agreement,
        "kl": result.kl,
    }
