"""Time of a decoded token at every width, measured on the machine at hand, kept as a table.

A layer's time depends on its own width alone, and a token's is the sum over layers. So the uniform
submodels tell all: a layer at granularity j adds (t_j - t_0) / layers to t_0, the time of S.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from matformer_dist.checkpoints.files import replace_file
from matformer_dist.config import ModelConfig
from matformer_dist.errors import UserError
from matformer_dist.inference.device import processor_name
from matformer_dist.inference.loading import LoadedModel, load_model
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
    sequences: PositiveInt  # decoded together
    context: PositiveInt  # tokens before the one that is timed
    model: ModelConfig
    vocab_size: PositiveInt
    widths: list[PositiveInt]  # FFN neurons of every layer
    token_ms: list[PositiveFloat]  # of the uniform submodels, as measured: medians

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
    model = loaded.model.model
    if context is not None and not 1 <= context < model.max_seq_len:
        raise UserError(
            f"--latency-context {context} must be 1 to {model.max_seq_len - 1}: a token behind it "
            "must fit into the model's context"
        )
    device = loaded.model.embedding.weight.device
    table = read_latency(path) if path.exists() else None
    if table is None or (is_of_here and not table.is_of(device)):
        if table is not None:
            sequences, context = sequences or table.sequences, context or table.context
            dtype = dtype or table.dtype
        if not path.parent.is_dir():
            raise UserError(f"--latency-table {path}: there is no folder {path.parent}; make it")
        dtype = dtype or ("bf16" if device.type == "cuda" else "fp32")
        table = measure(loaded, sequences or 1, context or model.max_seq_len // 2, dtype)
        replace_file(path, (table.model_dump_json(indent=1) + "\n").encode())
        return table
    wanted = {
        "model": model,
        "vocab_size": loaded.model.vocab_size,
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
    """Medians of single decoding steps of every uniform submodel, which take turns.

    loaded: of a run; it is read again where its weights are of another dtype.
    """
    weight = loaded.model.embedding.weight
    if weight.dtype != TORCH_DTYPES[dtype]:
        source = f"{loaded.directory}@{loaded.step}"
        loaded = load_model(source, TORCH_DTYPES[dtype], weight.device)
    model = loaded.model
    uniforms = loaded.submodel.nesting.uniforms(model.model.n_layers)[::-1]
    steps = [_decoding_step(loaded, submodel, sequences, context) for submodel in uniforms]
    times: list[list[float]] = [[] for _ in steps]
    for i in range(_WARM_UP + _ROUNDS):
        for step, of_step in zip(steps, times, strict=True):
            elapsed = step()
            if i >= _WARM_UP:
                of_step.append(elapsed)
    return LatencyTable(
        device=_device(weight.device),
        dtype=dtype,
        sequences=sequences,
        context=context,
        model=model.model,
        vocab_size=model.vocab_size,
        widths=list(loaded.submodel.nesting.widths),
        token_ms=[statistics.median(of_step) for of_step in times],
    )


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    processor = processor_name() or platform.machine()
    return f"CPU {processor}, {threads} {'thread' if threads == 1 else 'threads'}"


def _decoding_step(
    loaded: LoadedModel, submodel: Submodel, sequences: int, context: int
) -> Callable[[], float]:
    """A function that decodes one token behind `context` others, and returns its ms."""
    model = loaded.model
    device = model.embedding.weight.device
    cache = model.new_cache(sequences, context + 1)
    token = torch.zeros(sequences, 1, dtype=torch.long, device=device)

    def step() -> float:
        cache.lengths = [context] * sequences
        begun = time.perf_counter()
        model.logits(token, submodel, cache)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - begun)

    return step
