"""What can be evaluated: runs, and what was extracted from them, ours or transformers'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from matformer_dist.config import Config
from matformer_dist.config_file import load_config
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.errors import UserError
from matformer_dist.evaluation.loss import RunPass
from matformer_dist.inference.held import HoldsSubmodels
from matformer_dist.inference.loading import LoadedModel, load_model
from matformer_dist.inference.transformers_model import TransformersModel
from matformer_dist.models.forward_pass import Pass
from matformer_dist.nesting import Submodel, mix_n_match
from matformer_dist.run_directory import find_checkpoint
from matformer_dist.submodels.entry import is_extracted, read_entry


@dataclass(frozen=True)
class Source:
    """A model in memory, and what of it is evaluated.

    `config`: of its run; `step`: of its weights; `chosen`: submodels and their kind; `run_pass`:
    what a pass gives, see MatLM.forward.
    """

    directory: Path
    config: Config
    step: int
    tokenizer: Tokenizer
    vocab_size: int
    device: torch.device
    largest: Submodel
    chosen: dict[Submodel, str]
    run_pass: RunPass
    identity: str  # equal for equal weights


def open_source(
    name: str, notations: Sequence[str], heuristic: bool, run: Path | None, device: torch.device
) -> Source:
    """See evaluate_run, whose arguments these are."""
    directory = Path(name)
    if not is_extracted(directory):
        if run is not None:
            raise UserError(
                f"--run {run} is for extracted models, and {name} is a run; leave it out"
            )
        checkpoint = find_checkpoint(name)
        loaded = load_model(checkpoint.path, device=device)
        config = load_config(loaded.directory / "config.yaml")
        identity = checkpoint.manifest.manifest_sha256
        return _ours(loaded, config, checkpoint.step, identity, notations, heuristic)
    entry = read_entry(directory)
    config, step = _config(directory, run or Path(entry["run"])), int(entry["step"])
    if entry["format"] == "native":
        loaded = load_model(name, device=device)
        return _ours(loaded, config, step, str(directory), notations, heuristic)
    if entry["format"] == "hf":
        return _of_transformers(directory, config, step, notations, heuristic, device)
    raise UserError(
        f"{name} is in format {entry['format']}, which llama.cpp runs; evaluate the run, or "
        "extract with --format native or hf"
    )


def _config(directory: Path, run: Path) -> Config:
    if (run / "config.yaml").exists():
        return load_config(run / "config.yaml")
    raise UserError(
        f"{directory} was extracted from a run at {run}, which holds no config.yaml now; that says "
        "what to validate on: name the run by --run DIR"
    )


def _ours(
    loaded: LoadedModel,
    config: Config,
    step: int,
    identity: str,
    notations: Sequence[str],
    heuristic: bool,
) -> Source:
    return Source(
        loaded.directory,
        config,
        step,
        loaded.tokenizer,
        loaded.model.vocab_size,
        loaded.model.embedding.weight.device,
        loaded.submodel,
        _chosen(loaded, notations, heuristic),
        loaded.run_pass,
        identity,
    )


def _chosen(
    model: HoldsSubmodels, notations: Sequence[str], heuristic: bool
) -> dict[Submodel, str]:
    """The uniform submodels that it holds, all of it, and what was asked for."""
    nesting, layers = model.submodel.nesting, len(model.submodel)
    chosen = {one: "uniform" for one in nesting.uniforms(layers) if model.holds(one)}
    chosen.setdefault(model.submodel, "mix")
    for notation in notations:
        chosen.setdefault(model.parse(notation), "mix")
    if heuristic:
        if not model.nested:
            raise UserError(
                f"{model.directory} is {model.submodel} alone; leave --heuristic out, or evaluate "
                "the run, a native model or one of format hf --nested"
            )
        for submodel in filter(model.holds, mix_n_match(nesting, layers)):
            chosen.setdefault(submodel, "heuristic")
    return chosen


def _of_transformers(
    directory: Path,
    config: Config,
    step: int,
    notations: Sequence[str],
    heuristic: bool,
    device: torch.device,
) -> Source:
    """A sequence at a time, whose logits transformers makes whole."""
    theirs = TransformersModel(directory, torch.float32, device)

    def run_pass(tokens: Tensor, targets: Tensor, plan: Pass) -> Tensor:
        found: list[Tensor] = []
        largest: list[Tensor] = []  # log-probabilities of each sequence
        for segment in plan.segments:
            theirs.choose(segment.submodel)
            for i, (row, of) in enumerate(zip(tokens.split(1), targets, strict=True)):
                logs = theirs.model(row, use_cache=False).logits[0].log_softmax(-1)
                if segment is plan.segments[0]:
                    largest.append(logs)
                found.append(_statistics(logs, largest[i], of))
        return torch.stack(found)

    return Source(
        directory,
        config,
        step,
        theirs.tokenizer,
        theirs.model.config.vocab_size,
        device,
        theirs.submodel,
        _chosen(theirs, notations, heuristic),
        run_pass,
        str(directory),
    )


def _statistics(logs: Tensor, largest: Tensor, targets: Tensor) -> Tensor:
    """Of log-probabilities [s, V], those of XL, and targets [s], as MatLM.forward has them: [4]."""
    nll = F.nll_loss(logs, targets, reduction="sum")
    agreed = (logs.argmax(-1) == largest.argmax(-1)).sum()
    kl = (largest.exp() * (largest - logs)).sum()
    return torch.stack([nll, agreed.to(nll), kl, torch.full_like(nll, len(targets))])
