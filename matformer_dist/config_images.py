"""Settings of image data: where images lie and what is done to them before a model sees them.

data/images/ reads them. Mixup, which joins images of a batch, is not made there but on the device:
its strength in a preset stands in PRESETS for the objective.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from matformer_dist.config import AboveZero, Count, ReadingConfig, Section, Switch

DIGITS = "digits"  # the data set that needs no files
MAX_MAGNITUDE = 30
_SPLIT = 0.02  # of data.train, where neither data.validation nor data.split is set

Share = Annotated[float, Field(gt=0, le=1, strict=True)]
Kind = Literal["none", "crop", "light1", "light2", "medium1", "medium2", "strong1", "strong2"]


class Preset(NamedTuple):
    """What a kind of augmentation stands for; keys that are set go before it."""

    crop_scale: tuple[float, float] | None  # area of random crops, of the image's; None: no crops
    flip: bool
    layers: int  # operations of RandAugment an image
    magnitude: int
    mixup: float  # alpha of Mixup's Beta(alpha, alpha); not applied to the data


_INCEPTION_CROP = (0.05, 1.0)
# From light1: Steiner et al., How to train your ViT? (arXiv 2106.10270), sec. 3.3. Their "none" is
# "crop" here, since they crop and flip always.
PRESETS: dict[Kind, Preset] = {
    "none": Preset(None, False, 0, 0, 0.0),
    "crop": Preset(_INCEPTION_CROP, True, 0, 0, 0.0),
    "light1": Preset(_INCEPTION_CROP, True, 2, 0, 0.0),
    "light2": Preset(_INCEPTION_CROP, True, 2, 10, 0.2),
    "medium1": Preset(_INCEPTION_CROP, True, 2, 15, 0.2),
    "medium2": Preset(_INCEPTION_CROP, True, 2, 15, 0.5),
    "strong1": Preset(_INCEPTION_CROP, True, 2, 20, 0.5),
    "strong2": Preset(_INCEPTION_CROP, True, 2, 20, 0.8),
}


class AugmentationConfig(Section):
    """Random changes of training images; see data/images/augmentation.py for their order."""

    kind: Kind = "none"  # a row of PRESETS; none: images as in validation
    # None, here and below: the preset's.
    crop_scale: tuple[Share, Share] | None = None  # least and largest area, of the image's
    crop_ratio: tuple[AboveZero, AboveZero] = (3 / 4, 4 / 3)  # width to height of crops
    flip: Switch | None = None  # left to right, every other image
    layers: Annotated[int, Field(ge=0, le=16, strict=True)] | None = None  # of RandAugment
    magnitude: Annotated[int, Field(ge=0, le=MAX_MAGNITUDE, strict=True)] | None = None
    # For images of some pixels, which crops would take to pieces: moved and turned at random by up
    # to so much, black where nothing is.
    shift: Count = 0  # pixels of the size that the model sees
    rotate: Annotated[float, Field(ge=0, le=180, strict=True)] = 0.0  # degrees

    @property
    def chosen(self) -> Preset:
        """The preset, with the keys that are set in the place of its own."""
        preset = PRESETS[self.kind]
        keys = ("crop_scale", "flip", "layers", "magnitude")
        own = {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
        return preset._replace(**own)

    @model_validator(mode="after")
    def _check(self) -> AugmentationConfig:
        for key in ("crop_scale", "crop_ratio"):
            bounds = getattr(self, key)
            if bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(
                    f"data.augmentation.{key} is {list(bounds)}; the first, the least, must not "
                    "be above the second"
                )
        layers = PRESETS[self.kind].layers if self.layers is None else self.layers
        if self.magnitude is not None and not layers:
            raise ValueError(
                f"data.augmentation.magnitude {self.magnitude} is RandAugment's, of which kind "
                f"{self.kind} has no layers; set data.augmentation.layers, 2 for example"
            )
        if self.layers and self.magnitude is None and not PRESETS[self.kind].layers:
            raise ValueError(
                f"data.augmentation.layers {self.layers} need data.augmentation.magnitude, from 0 "
                f"to {MAX_MAGNITUDE}, of which kind {self.kind} has none"
            )
        return self


class ImageDataConfig(ReadingConfig):
    """Labelled images; `seed` is that of order, split and augmentation. `workers` pay nearly
    always, since an image costs milliseconds to decode. `train` and `validation` are each one of

    - digits: scikit-learn's 1,797 grey images of 8 x 8 pixels, of which every fifth is validation's
      (./digits is a folder of that name),
    - a folder of class folders of images,
    - a folder, a file or a glob of Parquet files with a column of images and one of labels,
    - a folder, a file or a glob of WebDataset's shards (.tar), with images beside .cls or .json.
    """

    train: str = Field(default=DIGITS, min_length=1)
    validation: Annotated[str, Field(min_length=1)] | None = None  # None: digits' own, or `split`
    split: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None  # of train; None: 0.02
    image_column: str = "image"  # of Parquet files: bytes, or a struct with them, {bytes, path}
    label_column: str = "label"  # of Parquet files, and the key in .json: a number, or a name
    # In which order an epoch goes over the images. all: any follows any. row_groups: Parquet's row
    # groups in random order, the rows of 8 of them mixed; for files whose rows are mixed
    # already and do not fit in memory, where `all` would read a row group for every image.
    shuffle: Literal["all", "row_groups"] = "all"
    # Of each channel, for values from 0 to 1. None: ImageNet's for 3 channels, 0.5 for 1.
    mean: list[Annotated[float, Field(strict=True)]] | None = None
    std: list[AboveZero] | None = None
    # Side of validation's square crop from the middle, of the image's shorter side. 1 keeps what
    # small images have; 0.875 is customary for photographs at 224 pixels.
    crop_pct: Share = 1.0
    augmentation: AugmentationConfig = AugmentationConfig()

    @property
    def held_out(self) -> float:
        """Share of `train` that is validation's where `validation` is not set."""
        return _SPLIT if self.split is None else self.split

    @model_validator(mode="after")
    def _check(self) -> ImageDataConfig:
        if self.split is not None and (self.validation is not None or self.train == DIGITS):
            other = "data.train digits" if self.validation is None else "data.validation"
            raise ValueError(
                f"data.split {self.split:g} has no meaning beside {other}, which says what "
                "validation takes; take data.split out"
            )
        return self
