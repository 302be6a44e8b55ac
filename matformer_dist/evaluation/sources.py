"""What can be evaluated: runs, and what was extracted from them, ours or transformers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from matformer_dist.config import Config
from matformer_dist.config_file import UNREAD_DATA, load_config
from matformer_dist.config_language import LanguageConfig
from matformer_dist.data.labels import Labels
from matformer_dist.errors import UserError
from matformer_dist.evaluation.loss import RunPass
from matformer_dist.inference.held import LoadedModel
from matformer_dist.inference.loading import load_model
from matformer_dist.inference.transformers_model import TransformersModel
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matlm import MatLM
from matformer_dist.models.matvit import MatViT
from matformer_dist.nesting import Submodel, SubmodelKind
from matformer_dist.run_directory import find_checkpoint
from matformer_dist.submodels.entry import is_extracted, read_entry

# Tokens [1, s] and a submodel -> logits [1, s, V].
_Logits: TypeAlias = Callable[[Tensor, Submodel], Tensor]


@dataclass(frozen=True)
class Source:
    """A model in memory, and what of it is evaluated.

    `labels` and `outputs`: of its head; `config`: of its run; `step`: of its weights; `largest`:
    XL, which others are to agree with; `chosen`: submodels and their kind; `run_pass`: what a pass
    gives, see MatFormer.forward, `largest`
    first.
    """

    directory: Path
    config: Config
    step: int
    labels: Labels
    outputs: int
    device: torch.device
    largest: Submodel
    chosen: dict[Submodel, SubmodelKind]
    run_pass: RunPass
    identity: str  # of the weights, or of the directory that they lie in
    lacks_largest: str = ""  # why nothing can agree with XL: agreements and KL are NaN


def open_source(
    name: str,
    notations: Sequence[str],
    heuristic: bool,
    run: Path | None,
    device: torch.device,
    data: str | Path | None = None,
) -> Source:
    """See evaluate_run, whose arguments these are."""
    directory = Path(name)
    if_open = None if data is None else UNREAD_DATA
    if is_extracted(directory):
        return _extracted(directory, notations, heuristic, run, device, if_open)
    if run is not None:
        raise UserError(f"--run {run} is for extracted models, and {name} is a run; leave it out")
    checkpoint = find_checkpoint(name)
    loaded = load_model(checkpoint.path, device=device)
    return Source(
        loaded.directory,
        load_config(loaded.directory / "config.yaml", if_open=if_open),
        checkpoint.step,
        loaded.labels,
        loaded.model.outputs,
        device,
        loaded.submodel,
        loaded.selection(notations, heuristic),
        loaded.run_pass,
        checkpoint.manifest.manifest_sha256,
    )


def _extracted(
    directory: Path,
    notations: Sequence[str],
    heuristic: bool,
    run: Path | None,
    device: torch.device,
    if_open: Mapping[str, Mapping[str, Any]] | None,
) -> Source:
    """Agreement and KL are with XL of the run that it was taken out of, if it is not XL itself."""
    entry = read_entry(directory)
    config = _config(directory, entry, run, if_open)
    run, step = run or Path(entry["run"]), int(entry["step"])
    model: LoadedModel | TransformersModel
    logits: _Logits
    if entry["format"] == "native":
        model = load_model(directory, torch.float32, device)
        outputs = model.model.outputs
        logits = _logits_of(model)
    elif entry["format"] == "hf" and isinstance(config, LanguageConfig):
        model = TransformersModel(directory, torch.float32, device)
        outputs = model.model.config.vocab_size
        logits = model.logits
    else:
        raise UserError(
            f"{directory} is in format {entry['format']}, which other programs run; evaluate the "
            "run, or extract with --format native" + (" or hf" if config.unit == "tokens" else "")
        )
    largest, largest_logits, lacks = model.submodel, logits, ""
    if min(largest.widths) < config.granularities.d_ff:
        largest = config.granularities.uniform(config.granularities.largest, config.model.n_layers)
        try:
            whole = load_model(f"{run}@{step}", device=device)
            largest_logits = _logits_of(whole)
            if whole.checkpoint_sha256 != entry.get("checkpoint_sha256"):
                lacks = f"no agreement with XL: {run}@{step} holds other weights by now"
        except UserError as error:
            lacks = f"no agreement with XL, which is not to be had: {error}"
        except torch.OutOfMemoryError:
            lacks = f"no agreement with XL, which does not fit the memory of {device} beside it"
    run_pass: RunPass
    if isinstance(model, LoadedModel) and largest == model.submodel:
        run_pass = model.run_pass
    else:
        run_pass = partial(_pass_by_logits, logits, None if lacks else largest_logits)
    return Source(
        directory,
        config,
        step,
        model.labels,
        outputs,
        device,
        largest,
        model.selection(notations, heuristic),
        run_pass,
        str(directory),
        lacks,
    )


def _config(
    directory: Path,
    entry: Mapping[str, Any],
    run: Path | None,
    if_open: Mapping[str, Mapping[str, Any]] | None,
) -> Config:
    """Of the run, which says what to validate on."""
    file = (run or Path(entry["run"])) / "config.yaml"
    if not file.exists() and run is None:
        raise UserError(
            f"{directory} was extracted from a run at {entry['run']}, which holds no config.yaml "
            "now; that says what to validate on: name the run by --run DIR"
        )
    if not file.exists():
        raise UserError(f"--run {run} holds no config.yaml; give the directory of the run")
    config = load_config(file, if_open=if_open)
    nesting, layers = config.granularities, config.model.n_layers
    if (list(nesting.widths), layers) != (entry["nesting"]["widths"], len(entry["widths"])):
        raise UserError(
            f"{directory} was not extracted from {file.parent}, whose model has {layers} layers of "
            f"the widths {list(nesting.widths)}; name its own run by --run DIR"
        )
    return config


def _pass_by_logits(
    own: _Logits, largest: _Logits | None, tokens: Tensor, targets: Tensor, plan: Pass
) -> Tensor:
    """As LoadedModel.run_pass, by whole logits, a sequence at a time; the first segment is XL."""
    first, *others = [segment.submodel for segment in plan.segments]
    found: list[list[Tensor]] = [[] for _ in plan.segments]
    for row, of in zip(tokens.split(1), targets, strict=True):
        reference = None if largest is None else _logs(largest(row, first))
        own_logs = [_logs(own(row, submodel)) for submodel in others]
        for rows, logs in zip(found, [reference, *own_logs], strict=True):
            rows.append(_sums(logs, reference, of))
    return torch.stack([row for rows in found for row in rows])


def _logits_of(loaded: LoadedModel) -> _Logits:
    """An image is one position."""
    model = loaded.model
    if isinstance(model, MatViT):
        return lambda images, submodel: model.logits(images, submodel)[:, None]
    assert isinstance(model, MatLM)
    return lambda tokens, submodel: model.logits(tokens, submodel)


def _logs(logits: Tensor) -> Tensor:
    """Logits [1, s, V] of any dtype -> log-probabilities [s, V]."""
    return logits[0].float().log_softmax(-1)


def _sums(logs: Tensor | None, largest: Tensor | None, targets: Tensor) -> Tensor:
    """Of log-probabilities [s, V], XL's, and targets [s], as MatFormer.forward has them: [5]."""
    sums = torch.full((5,), nan, dtype=torch.float64, device=targets.device)
    sums[3] = len(targets)
    if logs is not None:
        sums[0] = F.nll_loss(logs, targets, reduction="none").double().sum()
        sums[4] = (logs.argmax(-1) == targets).sum()
    if logs is not None and largest is not None:
        sums[1] = (logs.argmax(-1) == largest.argmax(-1)).sum()
        sums[2] = (largest.exp() * (largest - logs)).sum(-1).double().sum()
    return sums
