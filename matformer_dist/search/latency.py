"""Time of a decoded token, or of images, at every width, measured on the machine at hand, kept as
a table.

A layer's time depends on its own width alone, and a pass' is the sum over layers. So the uniform
submodels tell all: a layer at granularity j adds (t_j - t_0) / layers to t_0, the time of S.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)
from torch import Tensor

from matformer_dist.checkpoints.files import replace_file
from matformer_dist.config_file import AnyModelConfig
from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.errors import UserError
from matformer_dist.inference.device import processor_name
from matformer_dist.inference.held import LoadedModel
from matformer_dist.inference.loading import load_model
from matformer_dist.models.matformer import MatFormer
from matformer_dist.models.matlm import MatLM
from matformer_dist.models.matvit import MatViT
from matformer_dist.nesting import Submodel
from matformer_dist.submodels.parts import TORCH_DTYPES

FORMAT = 1
_WARM_UP, _ROUNDS = 3, 31


class LatencyTable(BaseModel):
    """What a table's file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: int = FORMAT
    device: str  # in words: processor or GPU, threads
    dtype: str  # fp32, bf16, fp16
    sequences: PositiveInt  # decoded together; of an encoder, images
    context: PositiveInt  # tokens before the one that is timed; of an encoder, an image's rows
    model: AnyModelConfig
    outputs: PositiveInt = Field(validation_alias=AliasChoices("outputs", "vocab_size"))
    widths: list[PositiveInt]  # FFN neurons of every layer
    token_ms: list[PositiveFloat]  # of a pass of the uniform submodels, as measured: medians

    @property
    def rising_ms(self) -> list[float]:
        """token_ms, but a wider submodel never faster: where it was, its time is the narrower's."""
        rising = list(self.token_ms)
        for i in range(1, len(rising)):
            rising[i] = max(rising[i], rising[i - 1])
        return rising

    def is_of(self, device: torch.device) -> bool:
        """Whether it was measured on this machine, with as many threads."""
        return self.device == _device(device)

    def describe(self) -> str:
        if isinstance(self.model, VisionModelConfig):
            images = f"{self.sequences} images together" if self.sequences > 1 else "one image"
            return f"{self.device}, {self.dtype}, {images}"
        together = f", {self.sequences} sequences together" if self.sequences > 1 else ""
        return f"{self.device}, {self.dtype}, behind {self.context} tokens{together}"


def latency_table(
    path: Path,
    loaded: LoadedModel,
    *,
    sequences: int | None,
    context: int | None,
    dtype: str | None = None,
    is_of_here: bool = False,
) -> LatencyTable:
    """The table at `path`, or one that is measured now and written there.

    sequences, context and dtype: None takes those of a table that is there; else 1, half of the
    model's context, and bf16 on a GPU, fp32 on a CPU. is_of_here: a table of another machine is
    measured again, in place of being taken as it is. UserError for a file that is no table, or one
    of another model, widths or settings.
    """
    model: Any = loaded.model.model
    _check_context(model, context)
    device = loaded.model.device
    table = read_latency(path) if path.exists() else None
    if table is None or (is_of_here and not table.is_of(device)):
        if table is not None:
            sequences, context = sequences or table.sequences, context or table.context
            dtype = dtype or table.dtype
        if not path.parent.is_dir():
            raise UserError(f"--latency-table {path}: there is no folder {path.parent}; make it")
        dtype = dtype or ("bf16" if device.type == "cuda" else "fp32")
        table = measure(loaded, sequences or 1, context or _usual_context(model), dtype)
        replace_file(path, (table.model_dump_json(indent=1) + "\n").encode())
        return table
    wanted = {
        "model": model,
        "outputs": loaded.model.outputs,
        "widths": list(loaded.submodel.nesting.widths),
        "sequences": sequences or table.sequences,
        "context": context or table.context,
        "dtype": dtype or table.dtype,
    }
    for name, value in wanted.items():
        if getattr(table, name) != value:
            raise UserError(
                f"the latency table {path} is of another {name} ({getattr(table, name)}; here it "
                f"is {value}); name another file, and it will be measured"
            )
    return table


def _check_context(model: AnyModelConfig, context: int | None) -> None:
    if context is None:
        return
    if isinstance(model, VisionModelConfig):
        raise UserError("--latency-context is for language models; leave it out")
    if not 1 <= context < model.max_seq_len:
        raise UserError(
            f"--latency-context {context} must be 1 to {model.max_seq_len - 1}: a token behind it "
            "must fit into the model's context"
        )


def _usual_context(model: AnyModelConfig) -> int:
    return model.max_seq_len // 2 if isinstance(model, LanguageModelConfig) else model.rows


def read_latency(path: Path) -> LatencyTable:
    """UserError for what is no table."""
    try:
        table = LatencyTable.model_validate(json.loads(path.read_bytes()))
        if len(table.token_ms) == len(table.widths) and table.format == FORMAT:
            return table
        said = f"format {table.format}, {len(table.token_ms)} times"
    except (OSError, ValueError, RecursionError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        said = str(first)
    raise UserError(
        f"{path} is no latency table ({said}); name another file, and it will be measured"
    )


@torch.no_grad()
def measure(loaded: LoadedModel, sequences: int, context: int, dtype: str) -> LatencyTable:
    """Medians of single passes of every uniform submodel, which take turns.

    loaded: of a run; it is read again where its weights are of another dtype.
    """
    device = loaded.model.device
    if loaded.model.dtype != TORCH_DTYPES[dtype]:
        source = f"{loaded.directory}@{loaded.step}"
        loaded = load_model(source, TORCH_DTYPES[dtype], device)
    model = loaded.model
    uniforms = loaded.submodel.nesting.uniforms(model.model.n_layers)[::-1]
    steps = [_timed(_pass(model, submodel, sequences, context), device) for submodel in uniforms]
    times: list[list[float]] = [[] for _ in steps]
    for i in range(_WARM_UP + _ROUNDS):
        for step, of_step in zip(steps, times, strict=True):
            elapsed = step()
            if i >= _WARM_UP:
                of_step.append(elapsed)
    return LatencyTable(
        device=_device(device),
        dtype=dtype,
        sequences=sequences,
        context=context,
        model=model.model,  # type: ignore[arg-type]  # of one of the tasks
        outputs=model.outputs,
        widths=list(loaded.submodel.nesting.widths),
        token_ms=[statistics.median(of_step) for of_step in times],
    )


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    processor = processor_name() or platform.machine()
    return f"CPU {processor}, {threads} {'thread' if threads == 1 else 'threads'}"


def _pass(
    model: MatFormer, submodel: Submodel, sequences: int, context: int
) -> Callable[[], object]:
    """A function that decodes one token behind `context` others; or that encodes images."""
    if isinstance(model, MatViT):
        of = model.model
        size = (sequences, of.channels, of.image_size, of.image_size)
        images = torch.zeros(size, dtype=model.dtype, device=model.device)
        return partial(model.logits, images, submodel)
    assert isinstance(model, MatLM)
    cache = model.new_cache(sequences, context + 1)
    token = torch.zeros(sequences, 1, dtype=torch.long, device=model.device)

    def decode() -> Tensor:
        cache.lengths = [context] * sequences
        return model.logits(token, submodel, cache)

    return decode


def _timed(run: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """A function that runs it and returns its ms."""

    def step() -> float:
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - begun)

    return step
