"""RUN/slices.json: submodels that `matformer search` measured, and the best of them by name.

Without torch: reports and commands read it. Losses and KL are nats per token, or image, on `units`
of them of the validation data; intervals hold 95%, by bootstrap over sequences, or images. Keys of
earlier versions are read too.
"""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import AliasChoices, Field

from matformer_dist.config import Unit
from matformer_dist.errors import UserError
from matformer_dist.nesting import Nesting, Submodel
from matformer_dist.submodels.result_files import Entry, Interval, Number, read_result

SLICES = "slices.json"
Cost: TypeAlias = Literal["params", "flops", "memory", "latency"]


class MeasuredSubmodel(Entry):
    """What a submodel costs, and how good it is."""

    submodel: str  # as Nesting.parse reads it
    widths: list[int]  # FFN neurons of each layer
    parameters: int
    non_embedding_parameters: int
    # Forward, of a token or an image, head included
    flops: int = Field(validation_alias=AliasChoices("flops", "flops_per_token"))
    memory_bytes: int  # weights and the key-value cache of one sequence
    latency_ms: float | None = None  # of a token, or a pass over images, by the latency table
    loss: float
    loss_interval: Interval
    agreement: float  # share of units where its first choice is XL's, given the same prefix
    kl: float  # KL(XL || submodel)
    accuracy: Number = nan  # share of units where its first choice is the target
    accuracy_interval: Interval = (nan, nan)

    def cost(self, kind: Cost) -> float | None:
        """In parameters, FLOPs, bytes or ms; None where latency was not measured."""
        return {
            "params": self.parameters,
            "flops": self.flops,
            "memory": self.memory_bytes,
            "latency": self.latency_ms,
        }[kind]


class Slice(MeasuredSubmodel):
    """The best submodel found within a budget."""

    name: str  # to select it by: 1.31M, 2.4GFLOP, 5.3MB, 12.5ms, or a granularity's
    kind: Cost  # of the budget
    budget: float
    found_by: Literal["uniform", "heuristic", "search"]
    heuristic: str  # the best of the paper's heuristic within the same budget
    gain: float  # loss of the heuristic's minus its own
    gain_interval: Interval


class Slices(Entry):
    """slices.json."""

    format: Literal[1] = 1
    step: int
    checkpoint_sha256: str  # of the manifest
    data: str = ""  # other data than the run's validation data, which was named
    data_sha256: str = ""  # of the validation sequences, or images
    seq_len: int
    unit: Unit = "tokens"
    units: int = Field(validation_alias=AliasChoices("units", "tokens"))
    dtype: str  # that memory_bytes are in: fp32, bf16, fp16
    latency_on: str = ""  # the machine and settings of latency_ms, in words
    slices: list[Slice]  # by kind, then budget
    measured: list[MeasuredSubmodel]  # all of them, the smallest first

    def named(self, name: str) -> Slice | None:
        return next((one for one in self.slices if one.name == name), None)


def read_slices(run_dir: Path) -> Slices | None:
    """None where the run has not been searched; UserError where the file is broken."""
    return read_result(
        run_dir / SLICES,
        Slices,
        "delete it and run `matformer search` again, which knows what was measured",
    )


def find_submodel(
    notation: str,
    nesting: Nesting,
    n_layers: int,
    run_dir: Path,
    checkpoint_sha256: str | None,
) -> Submodel:
    """The submodel of a notation (see Nesting.parse), or of a slice's name in `run_dir`.

    UserError for a slice that was chosen for other weights than this checkpoint's. None: an
    extracted model, which has no slices.
    """
    text = notation.strip()
    if text and not text[0].isdigit():  # as names of granularities never begin
        return nesting.parse(text, n_layers)
    found = read_slices(run_dir)
    if found and (chosen := found.named(text)):
        if checkpoint_sha256 not in (None, found.checkpoint_sha256):
            raise UserError(
                f"the slice {text} of {run_dir / SLICES} was chosen for other weights, those of "
                f"step {found.step}; search again, name the run as {run_dir}@{found.step} if they "
                f"are still there, or take {chosen.submodel} all the same"
            )
        return nesting.parse(chosen.submodel, n_layers)
    if found is None and checkpoint_sha256 is None:
        raise UserError(
            f"submodel {notation!r}: slices have names in the run that was searched, not in "
            f"{run_dir}; write the submodel as S:8,M:8, of {', '.join(nesting.names)}"
        )
    names = ", ".join(one.name for one in found.slices) if found else ""
    raise UserError(
        f"there is no slice {notation!r} in {run_dir / SLICES}; "
        + (f"its slices are {names}" if names else "`matformer search` makes them")
        + f"; or write a submodel as S:8,M:8, of {', '.join(nesting.names)}"
    )
