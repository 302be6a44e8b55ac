"""A plain ViT of transformers or timm, as an import reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from matformer_dist.config_vision import VisionConfig
from matformer_dist.data.images.classes import ClassNames, load_class_names
from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.errors import UserError
from matformer_dist.importing.calibration import Calibration
from matformer_dist.importing.calibration_images import of_images, read_images
from matformer_dist.importing.checkpoint_config import read_config
from matformer_dist.importing.class_names import class_names
from matformer_dist.importing.options import ImportOptions
from matformer_dist.importing.source import Source, run_config
from matformer_dist.importing.timm_config import read_timm_config
from matformer_dist.importing.vit_config import read_vit_config
from matformer_dist.importing.vit_description import ViTDescription
from matformer_dist.importing.vit_weights import ViTWeights
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.layout import ROWS
from matformer_dist.parallel.topology import SINGLE
from matformer_dist.run_directory import CLASSES_FILE

CALIBRATION_IMAGES = 128
_NOTE = """\
# An imported model. Set data.train to the images to go on with. Their classes must be those of
# {classes};
# for others begin a run of its own from this one (checkpoint.initial).
# Batch, learning rate and augmentation below are where to begin, not advice.
"""


def is_vision(config: dict[str, Any]) -> bool:
    """Whether config.json is that of a vision encoder, of any kind."""
    return "architecture" in config or "patch_size" in config or config.get("model_type") == "vit"


class VisionSource(Source):
    config: VisionConfig
    labels: ClassNames

    def __init__(self, directory: Path, output: Path, options: ImportOptions) -> None:
        """UserError for what cannot be imported, and where options do not fit it."""
        options.check_task(directory, "vision")
        self.options = options
        content = read_config(directory)
        read = read_timm_config if "architecture" in content else read_vit_config
        described = read(directory, content)
        self.weights = ViTWeights(directory, described)
        self.fresh_head = described.model.classes is None
        self.labels, notices = _labels(directory, described, options)
        self.outputs = len(self.labels)
        self.config = _config(described, options, output, self.outputs)
        model = self.config.model
        self.preprocessing = Preprocessing.of(self.config.data, model.image_size, model.channels)
        self.note = _NOTE.format(classes=output / CLASSES_FILE)
        self.images: Tensor | None = None
        self._notices = [*described.notices, *notices]
        if self.weights.unused:
            self._notices.append(
                f"{', '.join(sorted(self.weights.unused))} are left out: a classifier does not use "
                "them"
            )

    def read_samples(self) -> None:
        try:
            self.images = read_images(self.options.calibration, self.preprocessing, self._asked)
        except UserError as error:
            raise UserError(f"the calibration images cannot be used: {error}") from None
        if len(self.images) <= self._asked // 2:
            self._notices.append(
                f"there were {len(self.images):,} calibration images, {self._asked:,} were asked "
                "for"
            )

    @property
    def _asked(self) -> int:
        count = self.options.calibration_images
        return CALIBRATION_IMAGES if count is None else count

    @property
    def samples_in_words(self) -> str:
        return "" if self.images is None else f"{len(self.images):,} calibration images"

    def embedding(self) -> dict[str, Tensor]:
        return self.weights.embedding()

    def calibration(self, embedding: dict[str, Tensor]) -> Calibration:
        assert self.images is not None
        return of_images(self.config.model, self.images, embedding)

    def layer(self, i: int) -> dict[str, Tensor]:
        return self.weights.layer(i)

    def behind_layers(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.weights.final_norm().items():
            yield f"final_norm.{name}", weight
        head = self._head() if self.fresh_head else self.weights.head()
        for name, weight in head.items():
            yield f"head.{name}", weight

    def _head(self) -> dict[str, Tensor]:
        """As a run's own begins."""
        init, model = Initializer(self.config.training.seed), self.config.model
        sizes = {"weight": (self.outputs, model.d_model), "bias": (self.outputs,)}
        stds = {"weight": model.init_std, "bias": 0.0}
        return {
            name: init.parameter(f"head.{name}", size, stds[name], ROWS, SINGLE).detach()
            for name, size in sizes.items()
        }

    def notices(self) -> list[str]:
        return self._notices


def _labels(
    directory: Path, described: ViTDescription, options: ImportOptions
) -> tuple[ClassNames, list[str]]:
    """Of the head, or a fresh one; UserError where they do not fit it, or there are none."""
    chosen = None if options.classes is None else load_class_names(options.classes)
    count = described.model.classes
    if count is None:
        if chosen is None:
            raise UserError(
                f"{directory} holds a ViT without a classifier; give the names of the classes that "
                "it is to tell apart, a JSON list of texts, by --classes FILE: it gets a fresh head"
            )
        notice = (
            f"the checkpoint has no classifier: the head of {len(chosen)} classes is fresh, and to "
            "be trained"
        )
        return chosen, [notice]
    if chosen is None:
        return class_names(described.class_names, count, str(directory / "config.json"))
    if len(chosen) != count:
        raise UserError(
            f"--classes {options.classes} names {len(chosen)} classes, and the classifier in "
            f"{directory} has {count}; leave it out, and for other classes begin a run from the "
            "imported one (checkpoint.initial=RUN), which gives it a fresh head"
        )
    return chosen, []


def _config(
    described: ViTDescription, options: ImportOptions, output: Path, classes: int
) -> VisionConfig:
    """The run's settings; UserError where the nesting does not fit the model."""
    tree = {
        "task": "vision",
        "model": {**described.model.model_dump(), "classes": classes},
        "data": {"train": "unset", **described.images},
        "training": {"steps": 1000, "micro_batch_size": 32, "global_batch_size": 512},
    }
    config = run_config(tree, output, options)
    assert isinstance(config, VisionConfig)
    return config
