"""Settings of a language model's run: `task: language`, which is the default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from matformer_dist.config import (
    AboveZero,
    Config,
    EvaluationConfig,
    ModelConfig,
    NonNegative,
    Positive,
    ReadingConfig,
    Sample,
    Section,
    Switch,
    TrainingConfig,
    Unit,
)
from matformer_dist.errors import UserError


class RopeScaling(Section):
    """Slower rotations for texts longer than those of training; see models/rotation.py."""

    kind: Literal["linear", "llama3"]
    factor: Annotated[float, Field(ge=1, strict=True)]
    original_max_seq_len: Positive | None = None  # llama3: the context before
    low_freq_factor: AboveZero = 1.0  # llama3: turns in it, up to which all of `factor` holds
    high_freq_factor: AboveZero = 4.0  # llama3: from which none of it does

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        if self.kind == "llama3" and self.original_max_seq_len is None:
            raise ValueError("model.rope_scaling of kind llama3 needs original_max_seq_len")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor {self.low_freq_factor:g} must be below "
                f"high_freq_factor, which is {self.high_freq_factor:g}"
            )
        return self


class LanguageModelConfig(ModelConfig):
    task: ClassVar[str] = "language"
    outputs_key: ClassVar[str] = "vocab_size"
    biases: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    tied_embeddings: Switch = False
    vocab_size: Positive | None = None  # None: the tokenizer's
    max_seq_len: Positive = 2048
    rope_theta: AboveZero = 10000.0
    rope_scaling: RopeScaling | None = None

    def embedding_parameters(self, outputs: int) -> int:
        return outputs * self.d_model

    def head_parameters(self, outputs: int) -> int:
        return 0 if self.tied_embeddings else outputs * self.d_model

    def cached_values(self, positions: int) -> int:
        """Keys and values."""
        return 2 * self.n_layers * self.kv_heads * self.head_dim * positions

    @property
    def embedding_flops(self) -> int:
        return 0

    @model_validator(mode="after")
    def _check(self) -> LanguageModelConfig:
        if self.kv_channels is not None and self.kv_channels % 2:
            raise ValueError(
                f"model.kv_channels {self.kv_channels} must be even (rotary embeddings turn pairs)"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.d_model {self.d_model} over model.n_heads {self.n_heads} must be a whole, "
                "even head size (rotary embeddings turn pairs)"
            )
        return self


class LanguageDataConfig(ReadingConfig):
    train: list[tuple[AboveZero, str]] = Field(min_length=1)
    validation: list[tuple[AboveZero, str]] | None = None
    split: tuple[NonNegative, NonNegative] = (99.0, 1.0)  # of train, where validation is not set
    tokenizer: Path  # a .model file of SentencePiece, a tokenizer.json, or the folder of one

    @model_validator(mode="after")
    def _check(self) -> LanguageDataConfig:
        if self.validation is None and not all(self.split):
            raise ValueError(
                f"data.split is {list(self.split)}; both shares, of training and of validation, "
                "must be above 0, for example [99, 1], unless data.validation names data sets"
            )
        return self


class LanguageEvaluationConfig(EvaluationConfig):
    batches: Positive = 4


class LanguageTrainingConfig(TrainingConfig):
    length_key: ClassVar[str] = "tokens"

    tokens: Positive | None = None  # instead of steps
    seq_len: Positive

    @property
    def sample_units(self) -> int:
        return self.seq_len


class LanguageConfig(Config):
    unit: ClassVar[Unit] = "tokens"

    task: Literal["language"] = "language"
    model: LanguageModelConfig
    data: LanguageDataConfig
    training: LanguageTrainingConfig
    evaluation: LanguageEvaluationConfig = LanguageEvaluationConfig()

    @property
    def sample(self) -> Sample:
        return Sample(self.training.seq_len, self.training.seq_len)

    @property
    def samples_in_words(self) -> str:
        return f"sequences of {self.training.seq_len} tokens"

    @model_validator(mode="after")
    def _check_length(self) -> LanguageConfig:
        if self.training.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"training.seq_len {self.training.seq_len} is longer than model.max_seq_len "
                f"{self.model.max_seq_len}"
            )
        return self

    def _check_rows(self, tensor: int) -> None:
        seq_len = self.training.seq_len
        if seq_len % tensor:
            raise ValueError(
                f"training.seq_len {seq_len} does not divide over parallel.tensor {tensor} ranks, "
                f"as parallel.sequence needs; the nearest that does is "
                f"{max(1, round(seq_len / tensor)) * tensor}, or set parallel.sequence=false"
            )


def as_language(config: Config, what: str) -> LanguageConfig:
    """UserError where the run is of another task; `what` says who asks, as in "generate"."""
    if isinstance(config, LanguageConfig):
        return config
    raise UserError(
        f"{what} is for language models, and {config.run.dir} is a run of task: {config.task}"
    )
