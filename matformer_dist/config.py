"""One tree of validated settings per run; config_file.py reads it.

What all tasks share stands here; config_language.py and config_vision.py add each task's own.
Every check that needs nothing but the settings themselves is made here, before a process group
or a file is touched, so that a mistake costs a second and one message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from matformer_dist.errors import UserError
from matformer_dist.nesting import Nesting

# Strict: `true` is no number here, and "12" is text.
Positive = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
NonNegative = Annotated[float, Field(ge=0, strict=True)]
AboveZero = Annotated[float, Field(gt=0, strict=True)]
BelowOne = Annotated[float, Field(ge=0, lt=1, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
_MOST_UNITS = 1 << 60  # tokens or images of a run: all are counted in 64 bits
Unit: TypeAlias = Literal["tokens", "images"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunConfig(Section):
    dir: Path  # everything the run writes


class ModelConfig(Section):
    """What every nested Transformer has; its embedding and head are a task's."""

    task: ClassVar[str]
    outputs_key: ClassVar[str]  # of the setting that says how many tokens or classes there are
    biases: ClassVar[bool]  # of attention and FFN
    causal: ClassVar[bool]  # whether a position sees only those before it and itself

    d_model: Positive
    n_layers: Positive
    n_heads: Positive
    n_kv_heads: Positive | None = None  # None: as many as n_heads
    kv_channels: Positive | None = None  # of a head; None: d_model / n_heads
    d_ff: Positive  # neurons of the widest granularity
    ffn: Literal["swiglu", "gelu"] = "swiglu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: AboveZero = 1e-5
    init_std: AboveZero = 0.02  # of weights at the start

    @property
    def output_std(self) -> float:
        """Std of projections into the residual stream, smaller the more of them add up."""
        return self.init_std / math.sqrt(2 * self.n_layers)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.d_model // self.n_heads

    def shape(self) -> dict[str, Any]:
        """All keys, those written out that None leaves to others."""
        return self.model_dump(mode="json") | {
            "n_kv_heads": self.kv_heads,
            "kv_channels": self.head_dim,
        }

    @property
    def attention_width(self) -> int:
        """Of all heads' queries together."""
        return self.n_heads * self.head_dim

    @property
    def known_outputs(self) -> int | None:
        """Tokens or classes, where the settings say how many."""
        found: int | None = getattr(self, self.outputs_key)
        return found

    def embedding_parameters(self, outputs: int) -> int:
        """Of what makes rows of a sample, for a model of `outputs` tokens or classes."""
        raise NotImplementedError

    def head_parameters(self, outputs: int) -> int:
        raise NotImplementedError

    def cached_values(self, positions: int) -> int:
        """What a sample leaves to be read again by what comes behind it."""
        raise NotImplementedError

    @property
    def embedding_flops(self) -> int:
        """Of one sample's matrix products."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"model.n_heads {self.n_heads} must be a multiple of model.n_kv_heads "
                f"{self.kv_heads}: every key-value head serves the same number of query heads"
            )
        if self.kv_channels is None and self.d_model % self.n_heads:
            raise ValueError(
                f"model.d_model {self.d_model} over model.n_heads {self.n_heads} must be a whole "
                "head size"
            )
        return self


class NestingConfig(Section):
    fractions: list[AboveZero | str] | None = None  # of d_ff; default 1/8, 1/4, 1/2, 1
    widths: list[Positive] | None = None  # or explicit widths, the last equal to d_ff
    names: list[str] | None = None

    def build(self, d_ff: int) -> Nesting:
        if self.fractions is not None and self.widths is not None:
            raise UserError("nesting.fractions and nesting.widths are both set; keep one")
        if self.widths is None:
            fractions = self.fractions
            if fractions is None:
                fractions = ["1/8", "1/4", "1/2", 1]
            return Nesting.from_fractions(d_ff, fractions, self.names)
        if self.widths[-1:] != [d_ff]:
            raise UserError(
                f"nesting.widths {self.widths} must end with model.d_ff, which is {d_ff}"
            )
        return Nesting.from_widths(self.widths, self.names)


class ObjectiveConfig(Section):
    """How a step's sequences are spread over granularities; see training/objective.py."""

    kind: Literal["joint", "per_sequence", "sampled", "sandwich"] = "per_sequence"
    weights: dict[str, NonNegative] | None = None  # joint: lambda per granularity name
    probabilities: dict[str, NonNegative] | None = None  # per_sequence, sampled, sandwich's middle
    z_loss: NonNegative = 0.0
    distillation: NonNegative = 0.0  # KL to XL, relative to the cross-entropy's weight
    temperature: AboveZero = 1.0

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        shared = self.kind in ("joint", "sandwich")
        if self.distillation and not shared:
            raise ValueError(
                f"objective.distillation {self.distillation:g} needs XL to see the same tokens as "
                f"the smaller granularities; objective.kind {self.kind} does not do that, joint "
                "and sandwich do"
            )
        if self.weights is not None and not shared:
            raise ValueError(
                f"objective.weights are for joint and sandwich; with objective.kind {self.kind} "
                "set objective.probabilities"
            )
        if self.probabilities is not None and self.kind == "joint":
            raise ValueError(
                "objective.probabilities have no meaning with objective.kind joint, which trains "
                "every granularity on every token; set objective.weights"
            )
        return self


class ParallelConfig(Section):
    # Ranks that share a copy of the model, best within a node. Pays where the model does not fit
    # a GPU, or the batch is too small to be dealt further. The loss works in halves of a chunk then
    # and gathers for one beside the products of the other.
    tensor: Positive = 1
    # Rows between attention, FFN and head cut over the tensor-parallel ranks: norms, residual sums
    # and what they keep are 1/tensor of what they were, for two all-gathers more a layer. Pays on
    # GPUs with fast links from tensor 2, most where memory limits the batch; not on a CPU.
    sequence: Switch = False


class ReadingConfig(Section):
    """How a rank reads its data."""

    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 1234
    # Processes a rank that read ahead; 0: the rank reads itself. Pay where time_ms.data of
    # metrics.jsonl is more than a few percent of a step with prefetch alone: slow file systems.
    workers: Annotated[int, Field(ge=0, le=256, strict=True)] = 0
    # Micro-batches that a thread reads, pins and copies to a GPU beside the training; 0: none.
    # Pays on a GPU, by a copy and a wait a micro-batch; a CPU shares its cores with the thread.
    prefetch: Annotated[int, Field(ge=0, le=1024, strict=True)] = 2


class OptimizerConfig(Section):
    # torch's fused AdamW, one pass over weights, gradients and moments, always pays; offloaded,
    # DeepSpeed's own on the host.
    name: Literal["adamw"] = "adamw"
    lr: AboveZero = 3e-4
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: AboveZero = 1e-8
    weight_decay: NonNegative = 0.1
    grad_clip: NonNegative = 1.0  # 0: no clipping


class ScheduleConfig(Section):
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Count = 0
    decay_fraction: Annotated[float, Field(gt=0, le=1, strict=True)] = (
        0.1  # wsd: share of steps at the end
    )
    min_lr: NonNegative = 0.0


class TrainingConfig(Section):
    length_key: ClassVar[str]  # of what may stand in place of steps

    steps: Positive | None = None
    micro_batch_size: Positive  # samples per rank and forward pass
    global_batch_size: Positive  # samples per step, over all ranks
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: Count = 1234
    # What the backward pass makes again instead of keeping it. selective: norms and rotated queries
    # and keys, a third of what a layer keeps, at hardly any time; pays wherever memory
    # limits the micro-batch. full: whole layers, for a third more FLOPs; pays where selective does
    # not fit.
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    # The blocks, by torch.compile: norms, rotations and residual sums become few kernels. Pays on a
    # GPU for runs of more than some minutes, most where d_model is small; a CPU gains little. Of
    # rows cut by parallel.sequence the compiler keeps what was gathered: less is sent, more kept.
    # With selective activation checkpointing norms and rotations alone are compiled.
    compile: Switch = False
    operators: Literal["auto", "native", "reference"] = "auto"  # compiled or plain torch
    max_skipped_steps: Positive = 10  # in a row, for a loss or gradient that is not finite
    hang_timeout: AboveZero = 1800.0  # seconds without progress after which the job ends

    @property
    def total_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        return -(-getattr(self, self.length_key) // (self.global_batch_size * self.sample_units))

    @property
    def sample_units(self) -> int:
        """Of what the key `length_key` counts, in a sample."""
        raise NotImplementedError

    def micro_batches(self, data_size: int) -> int:
        """That each of `data_size` data-parallel ranks runs between two optimizer steps."""
        return self.global_batch_size // (self.micro_batch_size * data_size)

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if (self.steps is None) == (getattr(self, self.length_key) is None):
            raise ValueError(f"set exactly one of training.steps and training.{self.length_key}")
        units = self.total_steps * self.global_batch_size * self.sample_units
        if units > _MOST_UNITS:
            raise ValueError(
                f"training.{'steps' if self.steps else self.length_key} makes more than "
                f"{_MOST_UNITS:.3g} {self.length_key} in all, which is the most; set it lower"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"training.global_batch_size {self.global_batch_size} must be a multiple of "
                f"training.micro_batch_size {self.micro_batch_size}"
            )
        return self


class EvaluationConfig(Section):
    every: Count = 0  # steps; 0: only at the end
    batches: Positive | None  # of training.global_batch_size samples, whatever the ranks
    submodels: list[str] = []  # Mix'n'Match submodels beside the uniform ones


class CheckpointConfig(Section):
    every: Count = 0  # steps; 0: only at the end
    keep_last: Positive = 2
    keep_every: Positive | None = None  # steps: these are never deleted
    resume: str = "auto"  # auto, never, or the path of a checkpoint
    # RUN[@STEP] whose weights a run begins with that has no checkpoint of its own: step, optimizer
    # and data begin anew. See training/beginning.py for what may be another there.
    initial: str | None = None
    async_save: Switch = False  # write beside the training, from a copy in host memory

    @model_validator(mode="after")
    def _check(self) -> CheckpointConfig:
        if self.initial is not None and self.resume not in ("auto", "never"):
            raise ValueError(
                f"checkpoint.initial {self.initial} and checkpoint.resume {self.resume} both say "
                "where to begin; keep initial for the weights alone, or resume to go on with step "
                "and optimizer too"
            )
        return self


class LoggingConfig(Section):
    every: Positive = 10  # steps between lines of metrics.jsonl
    tensorboard: Switch = True
    wandb: Switch = False
    wandb_project: str = "matformer"
    peak_tflops: AboveZero | None = None  # of one device, for MFU; None: known GPUs have theirs


class Sample(NamedTuple):
    """What a model reads at once: a sequence of tokens, or an image."""

    positions: int  # rows of it that go through the layers
    predictions: int  # rows of it that the head sees: of a sequence all, of an image one


class Config(Section):
    """The settings of any task; see LanguageConfig and VisionConfig."""

    unit: ClassVar[Unit]  # what training is counted in: as many a sample as it has predictions

    task: str
    run: RunConfig
    model: ModelConfig
    nesting: NestingConfig = NestingConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: ReadingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    deepspeed: dict[str, Any] = {}  # merged over the dictionary that is derived from the rest

    @property
    def sample(self) -> Sample:
        raise NotImplementedError

    @property
    def samples_in_words(self) -> str:
        raise NotImplementedError

    def units(self, samples: int) -> int:
        """Tokens of so many sequences, or images."""
        return samples * self.sample.predictions

    @property
    def granularities(self) -> Nesting:
        return self.nesting.build(self.model.d_ff)

    @property
    def zero_optimization(self) -> Mapping[str, Any]:
        """That part of the section `deepspeed`."""
        return self.deepspeed.get("zero_optimization") or {}

    @property
    def zero_stage(self) -> int:
        """What DeepSpeed cuts over data-parallel ranks: 0 nothing, 1 optimizer states, 2 gradients
        too, 3 weights too.
        """
        return int(self.zero_optimization.get("stage", 1))

    def offloads(self, what: Literal["optimizer", "param"]) -> bool:
        """Whether DeepSpeed keeps optimizer states, or weights, on the host."""
        section = self.zero_optimization.get(f"offload_{what}") or {}
        return bool(section.get("device", "none") != "none")

    @model_validator(mode="after")
    def _check(self) -> Config:
        self._check_zero()
        tensor = self.parallel.tensor
        nesting = self.granularities
        for name, value in (("n_heads", self.model.n_heads), ("n_kv_heads", self.model.kv_heads)):
            if value % tensor:
                raise ValueError(
                    f"model.{name} {value} does not divide over parallel.tensor {tensor} ranks; "
                    f"use a parallel.tensor that divides {value}, or change the heads"
                )
        if self.model.d_ff % tensor:
            raise ValueError(
                f"model.d_ff {self.model.d_ff} does not divide over parallel.tensor {tensor} "
                f"ranks; the nearest that does is {round(self.model.d_ff / tensor) * tensor}"
            )
        nesting.check_dealable(tensor)
        self._check_sequence()
        for field in ("weights", "probabilities"):
            _check_shares(f"objective.{field}", getattr(self.objective, field), nesting)
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(
                f"schedule.min_lr {self.schedule.min_lr:g} is above optimizer.lr "
                f"{self.optimizer.lr:g}, the peak it falls from; set it to at most that"
            )
        for notation in self.evaluation.submodels:
            try:
                nesting.parse(notation, self.model.n_layers)
            except UserError as error:
                raise ValueError(f"evaluation.submodels: {error}") from None
        return self

    def _check_zero(self) -> None:
        zero = self.zero_optimization
        if not isinstance(zero, Mapping):
            raise ValueError(
                f"deepspeed.zero_optimization is {zero!r}; it must hold keys, such as stage: 2"
            )
        stage = zero.get("stage", 1)
        if type(stage) is not int or not 0 <= stage <= 3:
            raise ValueError(
                f"deepspeed.zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3"
            )

    def _check_sequence(self) -> None:
        """Every micro-batch's rows must divide over the ranks, whatever its segments."""
        if not self.parallel.sequence:
            return
        tensor = self.parallel.tensor
        if tensor == 1:
            raise ValueError(
                "parallel.sequence is true, but cuts rows over the ranks of parallel.tensor, which "
                "is 1; set parallel.tensor from 2, or parallel.sequence=false"
            )
        self._check_rows(tensor)

    def _check_rows(self, tensor: int) -> None:
        raise NotImplementedError

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _check_shares(key: str, shares: dict[str, float] | None, nesting: Nesting) -> None:
    if shares is None:
        return
    if set(shares) != set(nesting.names):
        raise ValueError(
            f"{key} names {', '.join(shares) or 'nothing'}; it must name every granularity once: "
            f"{', '.join(nesting.names)}"
        )
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"{key} sum to {sum(shares.values()):g}; they must sum to 1")
