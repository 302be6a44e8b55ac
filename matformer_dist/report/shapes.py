"""The shapes of the files that a report reads; slices.json has its own in submodels/slices.py.

Keys that older commands did not write are optional: NaN, None or empty then. Units are tokens of a
language model, images of a vision encoder. Losses and KL are nats per unit, intervals hold 95%.
"""

from __future__ import annotations

import re
from math import nan
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from matformer_dist.nesting import SubmodelKind
from matformer_dist.submodels.result_files import Number


def _two_numbers(value: Any) -> Any:
    return (nan, nan) if value is None else value


def _whole_characters(value: Any) -> Any:
    return re.sub("[\ud800-\udfff]", "\ufffd", value) if isinstance(value, str) else value


Interval = Annotated[tuple[Number, Number], BeforeValidator(_two_numbers)]
# JSON can spell half a surrogate pair (a prompt of undecodable bytes), which no file can hold.
Text = Annotated[str, BeforeValidator(_whole_characters)]
PerName = Annotated[dict[Text, Number], Field(default_factory=dict)]


class Entry(BaseModel):
    # pydantic reserves model_*, which is how a metric of ours begins
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class SlowestRank(Entry):
    rank: int
    host: Text
    ratio: Number  # of its own work to the median rank's


class MetricsLine(Entry):
    step: int
    units: int = Field(validation_alias=AliasChoices("tokens", "images"))
    train_loss: PerName  # by submodel; objective sampled: only what ran in this step
    val_loss: PerName
    val_agreement: PerName
    val_accuracy: PerName
    grad_norm: Number = nan
    learning_rate: Number = nan
    units_per_second: Number = Field(
        nan, validation_alias=AliasChoices("tokens_per_second", "images_per_second")
    )
    model_tflops_per_second: Number = nan
    mfu: Number = nan
    step_ms: Number = nan
    time_ms: PerName  # by part of a step
    slowest_rank: SlowestRank | None = None
    peak_memory_bytes: Number = nan
    memory: PerName  # allocated_bytes, reserved_bytes, resident_bytes; and a rank


class Evaluated(Entry):
    submodel: Text
    kind: SubmodelKind
    parameters: int
    non_embedding_parameters: int
    flops: int = Field(validation_alias=AliasChoices("flops", "flops_per_token"))  # forward
    loss: Number
    loss_interval: Interval = (nan, nan)
    accuracy: Number = nan  # share of units where its first choice is the target
    accuracy_interval: Interval = (nan, nan)
    agreement: Number  # share of units where its first choice is XL's, given the same prefix
    agreement_interval: Interval = (nan, nan)
    kl: Number = nan  # KL(XL || submodel)
    kl_interval: Interval = (nan, nan)
    bits_per_byte: Number = nan


class Evaluation(Entry):
    step: int
    units: int = Field(validation_alias=AliasChoices("tokens", "images"))  # of validation
    data_sha256: Text = ""  # of the validation sequences, or images
    submodels: list[Evaluated]

    def uniform(self, name: str) -> Evaluated | None:
        return next((item for item in self.submodels if item.submodel == name), None)


class Draft(Entry):
    """Speculative decoding with one draft."""

    draft: Text
    cache: Text  # own, shared
    draft_tokens: int | Text  # between two verifications; auto
    acceptance: Number  # share of drafted tokens
    tokens_per_verify: Number
    tokens_per_second: Number
    speedup: Number  # over the verifier alone; below 1 where it is slower


class Speculative(Entry):
    step: int
    verifier: Text
    prompts: int
    new_tokens: int  # of each prompt
    temperature: Number = nan
    plain_tokens_per_second: Number  # of the verifier alone
    drafts: list[Draft]


class Score(Entry):
    value: Number
    stderr: Number = nan


class Task(Entry):
    """A task, or a group of them."""

    num_fewshot: int | None = None
    results: dict[Text, dict[Text, Score]]  # by submodel and metric


class Downstream(Entry):
    step: int | None = None
    limit: Number = nan  # documents of a task; NaN: all
    submodels: list[Text]
    tasks: dict[Text, Task]
    groups: dict[Text, Task]


class Extracted(Entry):
    submodel: Text
    widths: list[int]
    parameters: int
    non_embedding_parameters: int
    format: Text
    step: int
    run: Text
    bytes: int  # of the weight files
    loss: Number = nan
    accuracy: Number = nan


class Sample(Entry):
    submodel: Text
    prompt: Text
    text: Text
    seconds: Number = nan
    tokens_per_second: Number = nan
