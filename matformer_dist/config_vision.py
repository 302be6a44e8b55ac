"""Settings of a vision encoder's run: `task: vision`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from matformer_dist.config import (
    AboveZero,
    BelowOne,
    Config,
    EvaluationConfig,
    ModelConfig,
    NonNegative,
    ObjectiveConfig,
    Positive,
    Sample,
    TrainingConfig,
    Unit,
)
from matformer_dist.config_images import PRESETS as AUGMENTATIONS
from matformer_dist.config_images import ImageDataConfig

# Dosovitskiy et al., arXiv 2010.11929, table 1; S and Ti of Touvron et al., arXiv 2012.12877,
# table 1; `tiny` is for images of a few pixels.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 4, "n_heads": 4, "d_ff": 256, "patch_size": 2,
             "image_size": 8},
    "Ti/16": {"d_model": 192, "n_layers": 12, "n_heads": 3, "d_ff": 768},
    "S/16": {"d_model": 384, "n_layers": 12, "n_heads": 6, "d_ff": 1536},
    "B/16": {"d_model": 768, "n_layers": 12, "n_heads": 12, "d_ff": 3072},
    "L/16": {"d_model": 1024, "n_layers": 24, "n_heads": 16, "d_ff": 4096},
}  # fmt: skip


class VisionModelConfig(ModelConfig):
    """A plain ViT (arXiv 2010.11929): LayerNorm, GELU, biases, bidirectional attention.

    `preset` is a key of PRESETS; what stands beside it comes before it.
    """

    task: ClassVar[str] = "vision"
    outputs_key: ClassVar[str] = "classes"
    biases: ClassVar[bool] = True
    causal: ClassVar[bool] = False
    expanded_keys: ClassVar[tuple[str, ...]] = ("preset",)  # stand for others

    ffn: Literal["gelu"] = "gelu"
    norm: Literal["layernorm"] = "layernorm"
    norm_eps: AboveZero = 1e-6
    image_size: Positive = 224  # height and width, pixels
    patch_size: Positive = 16
    channels: Positive = 3
    classes: Positive | None = None  # None: the data's
    # token: what the head sees is a class token's row; mean: the mean of the patches'
    pooling: Literal["token", "mean"] = "token"
    positions: Literal["learned", "sincos"] = "learned"  # sincos: fixed, of the 2-D grid

    @property
    def grid(self) -> int:
        """Patches along each side of an image."""
        return self.image_size // self.patch_size

    @property
    def patch_values(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def rows(self) -> int:
        """Of an image: its patches, and the class token."""
        return self.grid**2 + (self.pooling == "token")

    def embedding_parameters(self, outputs: int) -> int:  # noqa: ARG002
        of_patches = (self.patch_values + 1) * self.d_model
        token = self.d_model if self.pooling == "token" else 0
        return of_patches + token + (self.rows * self.d_model if self.positions == "learned" else 0)

    def head_parameters(self, outputs: int) -> int:
        return outputs * (self.d_model + 1)

    def cached_values(self, positions: int) -> int:  # noqa: ARG002
        return 0

    @property
    def embedding_flops(self) -> int:
        return 2 * self.grid**2 * self.patch_values * self.d_model

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        own = {key: value for key, value in given.items() if key != "preset"}
        preset = given.get("preset")
        if preset is None:
            return own
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(
                f"model.preset {preset!r} is unknown; there are {', '.join(PRESETS)}, or leave it "
                "out and set d_model, n_layers, n_heads and d_ff"
            )
        return {**PRESETS[preset], **own}

    @model_validator(mode="after")
    def _check(self) -> VisionModelConfig:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size {self.image_size} must be a multiple of model.patch_size "
                f"{self.patch_size}; the nearest is "
                f"{max(1, round(self.image_size / self.patch_size)) * self.patch_size}"
            )
        if self.positions == "sincos" and self.d_model % 4:
            raise ValueError(
                f"model.d_model {self.d_model} must be a multiple of 4 for sincos (sines "
                "and cosines of both axes)"
            )
        return self


class VisionObjectiveConfig(ObjectiveConfig):
    """Beside the objective's own: soft targets, see ops/soft_targets.py and models/mixing.py."""

    label_smoothing: BelowOne = 0.0  # share of the target that all classes have alike
    # Beta(alpha, alpha) of the share that an image keeps beside another one; 0: no mixing
    mixup: NonNegative = 0.0  # left out: that of data.augmentation.kind
    cutmix: NonNegative = 0.0
    # Of the micro-batches; of mixup and cutmix each has half of them where both are on
    mixing_probability: Annotated[float, Field(ge=0, le=1, strict=True)] = 1.0

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)


class VisionEvaluationConfig(EvaluationConfig):
    batches: Positive | None = None  # None: all validation images


class VisionTrainingConfig(TrainingConfig):
    length_key: ClassVar[str] = "images"

    images: Positive | None = None  # instead of steps

    @property
    def sample_units(self) -> int:
        return 1


class VisionConfig(Config):
    unit: ClassVar[Unit] = "images"

    task: Literal["vision"]
    model: VisionModelConfig
    objective: VisionObjectiveConfig = VisionObjectiveConfig()
    data: ImageDataConfig = ImageDataConfig()
    training: VisionTrainingConfig
    evaluation: VisionEvaluationConfig = VisionEvaluationConfig()

    @property
    def sample(self) -> Sample:
        return Sample(self.model.rows, 1)

    def validation_images(self, batches: int | None = None) -> int | None:
        """Of `batches` of the global batch size, else of evaluation.batches; None: all."""
        asked = batches or self.evaluation.batches
        return asked and asked * self.training.global_batch_size

    @model_validator(mode="before")
    @classmethod
    def _take_mixup(cls, given: Any) -> Any:
        """Of the augmentation's preset, where the objective does not say it."""
        try:
            kind = given["data"]["augmentation"]["kind"]
            objective = {"mixup": AUGMENTATIONS[kind].mixup, **given.get("objective", {})}
        except (KeyError, TypeError):
            return given
        return {**given, "objective": objective}

    @property
    def samples_in_words(self) -> str:
        return f"images of {self.model.rows} rows"

    @model_validator(mode="after")
    def _check_mixing(self) -> VisionConfig:
        for key in ("mixup", "cutmix"):
            if getattr(self.objective, key) and self.training.micro_batch_size == 1:
                raise ValueError(
                    f"objective.{key} mixes the images of a micro-batch, and "
                    "training.micro_batch_size is 1; set it to 2 or more, or "
                    f"objective.{key}=0 (data.augmentation.kind may set mixup)"
                )
        return self

    def _check_rows(self, tensor: int) -> None:
        rows = self.model.rows
        if rows % tensor:
            raise ValueError(
                f"an image has {rows} rows here, which do not divide over parallel.tensor {tensor} "
                "ranks, as parallel.sequence needs; set parallel.sequence=false, or choose "
                "model.pooling, image_size and patch_size so that they do"
            )
