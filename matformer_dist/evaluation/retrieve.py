"""Adaptive retrieval of a run's vision encoder: `matformer retrieve`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from matformer_dist.checkpoints.files import check_output, replace_json
from matformer_dist.config_file import UNREAD_DATA, load_config
from matformer_dist.config_images import ImageDataConfig
from matformer_dist.config_vision import VisionConfig
from matformer_dist.counting import count_parameters, forward_flops
from matformer_dist.data.images.classes import ClassNames, check_same_classes
from matformer_dist.data.images.datasets import ValidationImages
from matformer_dist.data.images.finding import Part, find_images
from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.errors import UserError
from matformer_dist.evaluation.images import Images
from matformer_dist.evaluation.neighbours import check_neighbours
from matformer_dist.evaluation.retrieval import KS, QueryEncoder, measure_retrieval
from matformer_dist.inference.device import choose_device
from matformer_dist.inference.loading import load_vision_model
from matformer_dist.inference.vision import LoadedVisionModel
from matformer_dist.nesting import Segment, Submodel, SubmodelKind
from matformer_dist.submodels.entry import is_extracted
from matformer_dist.submodels.retrieval_results import (
    NESTED,
    RETRIEVAL,
    Backend,
    RetrievalResult,
)


@dataclass(frozen=True)
class ImagesAsked:
    """Where gallery and queries come from; None: the run's training and validation images, whose
    numbers may be limited.
    """

    gallery: str | None = None
    queries: str | None = None
    gallery_images: int | None = None
    query_images: int | None = None


def retrieve(
    run: str,
    submodels: Sequence[str] = (),
    *,
    independents: Sequence[str] = (),
    images: ImagesAsked = ImagesAsked(),
    ks: Sequence[int] = KS,
    backend: Backend | None = None,
    device: str | None = None,
    output: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, RetrievalResult]:
    """XL of RUN[@STEP] embeds the gallery, its submodels the queries: the uniform ones, the paper's
    heuristic's, and `submodels`. Writes RUN/retrieval.json, or `output`. Queries that are the
    gallery's own images do not find themselves.

    independents: runs of encoders that were trained apart, for contrast. UserError for what is no
    vision encoder, for images of other classes, and encoders that take other images.
    """
    check_output(output)
    if is_extracted(Path(run)):
        raise UserError(f"{run} is an extracted model; give the run, whose XL embeds the gallery")
    where = choose_device(device)
    loaded, config = _load(run, where, reads_own_images=images.gallery is None)
    asked = loaded.selection(submodels, heuristic=True)
    encoders = [_encoder(loaded, config, one, kind) for one, kind in asked.items()]
    others = [_independent(name, loaded, config, where) for name in independents]
    gallery, queries, leave_one_out, words = _open(loaded, config, images)
    check_neighbours(max(ks, default=1), gallery.images, leave_one_out)
    measured = measure_retrieval(
        encoders,
        gallery,
        queries,
        independents=others,
        ks=ks,
        leave_one_out=leave_one_out,
        backend=backend,
        progress=progress,
    )
    assert loaded.step is not None and loaded.checkpoint_sha256 is not None
    result = RetrievalResult.of(
        measured, step=loaded.step, checkpoint_sha256=loaded.checkpoint_sha256, data=words
    )
    file = output or loaded.directory / RETRIEVAL
    replace_json(file, result.model_dump(mode="json"))
    return file, result


def _load(
    run: str, device: torch.device, reads_own_images: bool = False
) -> tuple[LoadedVisionModel, VisionConfig]:
    """reads_own_images: those that an imported run leaves open."""
    loaded = load_vision_model(run, device=device)
    if_open = None if reads_own_images else UNREAD_DATA
    config = load_config(loaded.directory / "config.yaml", if_open=if_open)
    assert isinstance(config, VisionConfig), "its checkpoint is a vision encoder's"
    return loaded, config


def _encoder(
    loaded: LoadedVisionModel,
    config: VisionConfig,
    submodel: Submodel,
    kind: SubmodelKind,
    name: str = NESTED,
) -> QueryEncoder:
    flops = forward_flops(config.model, loaded.model.outputs, [Segment(submodel, 1)], config.sample)
    count = count_parameters(config.model, loaded.model.outputs, submodel)
    encoding = flops.total - flops.head
    without_head = count.total - count.head
    return QueryEncoder(loaded, submodel, kind, encoding, without_head, name)


def _independent(
    run: str, nested: LoadedVisionModel, ours: VisionConfig, device: torch.device
) -> QueryEncoder:
    """XL of a run that was trained apart."""
    if is_extracted(Path(run)):
        raise UserError(f"--independent {run} is an extracted model; give a run")
    loaded, config = _load(run, device)
    if loaded.directory.resolve() == nested.directory.resolve():
        raise UserError(
            f"--independent {run} is the run whose submodels are measured; give one that was "
            "trained apart"
        )
    if _preprocessing(config) != _preprocessing(ours):
        raise UserError(
            f"{run} takes other images than {ours.run.dir}: {_preprocessing(config)} and "
            f"{_preprocessing(ours)}; give encoders of the same image size, channels, mean and std"
        )
    return _encoder(loaded, config, loaded.submodel, "uniform", loaded.directory.name)


def _preprocessing(config: VisionConfig) -> Preprocessing:
    return Preprocessing.of(config.data, config.model.image_size, config.model.channels)


def _open(
    loaded: LoadedVisionModel, config: VisionConfig, asked: ImagesAsked
) -> tuple[_Labelled, _Labelled, bool, str]:
    """Gallery, queries, whether they are the same images, and both in words.

    UserError for the same images in other numbers, and classes of the run's own images that its
    model was not trained on; of others, what they are called is of no matter.
    """
    found = find_images(_settings(config.data, asked))
    if asked.gallery is None:
        assert isinstance(loaded.labels, ClassNames)
        check_same_classes(found.classes, loaded.labels)
    same = found.train.is_of(found.validation)
    if same and asked.gallery_images != asked.query_images:
        raise UserError(
            f"the queries are the gallery, {found.train.source.path}, whose images each find "
            "others then; give the same --gallery-images and --query-images, or none"
        )
    gallery = _labelled(config, found.train, asked.gallery_images)
    queries = _labelled(config, found.validation, asked.query_images)
    names = (asked.gallery or f"training images of {config.data.train}",
             asked.queries or "validation images")  # fmt: skip
    return gallery, queries, same, f"gallery: {names[0]}; queries: {names[1]}"


def _settings(data: ImageDataConfig, asked: ImagesAsked) -> ImageDataConfig:
    """Such that what is found for training is the gallery, and for validation the queries."""
    if asked.gallery is None and asked.queries is None:
        return data
    if asked.gallery is None or asked.queries is None:
        raise UserError(
            "--gallery and --queries name images in place of the run's; give both, or neither"
        )
    return data.model_copy(
        update={
            "train": asked.gallery,
            "validation": asked.queries,
            "split": None,
            "shuffle": "all",
        }
    )


def _labelled(config: VisionConfig, part: Part, most: int | None) -> _Labelled:
    images = ValidationImages(part, _preprocessing(config), most)
    return _Labelled(Images(images, config.training.micro_batch_size, config.data.workers))


class _Labelled:
    """Batches (images [b, C, H, H], labels [b]), the same each time."""

    def __init__(self, images: Images) -> None:
        self._images = images

    @property
    def images(self) -> int:
        return self._images.samples

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._images.micro_batches(torch.device("cpu")):
            yield images, labels[:, 0]

    def __len__(self) -> int:
        return len(self._images)
