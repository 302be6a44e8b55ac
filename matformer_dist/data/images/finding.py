"""From what a user writes to sources of images, for training and for validation."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np

from matformer_dist.config_images import DIGITS, ImageDataConfig
from matformer_dist.data.images.classes import ClassNames
from matformer_dist.data.images.digits import DigitsSource
from matformer_dist.data.images.digits import Part as PartName
from matformer_dist.data.images.folder import FolderSource
from matformer_dist.data.images.order import Indices, held_out
from matformer_dist.data.images.packages import need_pillow
from matformer_dist.data.images.parquet import ParquetSource
from matformer_dist.data.images.source import ImageSource
from matformer_dist.data.images.tar_shards import TarSource
from matformer_dist.errors import UserError, as_user_error
from matformer_dist.parallel.agreement import on_main

_SUFFIXES = (".parquet", ".tar")
_MAY_BE = (
    "it may be digits, a folder of class folders of images, or a folder, a file or a glob of "
    ".parquet or of .tar files"
)


@dataclass(frozen=True)
class Part:
    """`samples`, ascending, of a source."""

    source: ImageSource
    samples: Indices

    def is_of(self, other: Part) -> bool:
        """Whether both are the same images, however their places are written."""
        ours, theirs = self.source, other.source
        if not np.array_equal(self.samples, other.samples):
            return False
        first, last = int(self.samples[0]), int(self.samples[-1])
        return np.array_equal(ours.labels, theirs.labels) and all(
            os.path.realpath(ours.file(one)) == os.path.realpath(theirs.file(one))
            for one in (first, last)
        )


@dataclass(frozen=True)
class FoundImages:
    train: Part
    validation: Part
    classes: ClassNames


def find_images(config: ImageDataConfig) -> FoundImages:
    """What data.train and data.validation hold, indexed and checked, but for the pixels.

    To be called on every rank if torch.distributed is initialised: the main rank looks, the others
    are sent what it finds. UserError, on all of them, for what is missing, damaged or labelled
    otherwise in validation than in training.
    """
    return on_main(lambda: _find(config))


def find_validation(config: ImageDataConfig, classes: ClassNames) -> Part:
    """What data.validation (where it is left out: digits) holds, for a model of these classes. Of
    training images nothing is asked: they may be elsewhere. See `find_images`.
    """
    return on_main(lambda: _own_validation(config, classes))


def _find(config: ImageDataConfig) -> FoundImages:
    need_pillow()
    train = _open(config, "train", config.train)
    classes = ClassNames(train.class_names(), train.path)
    train.check_labels(len(classes))
    everything = np.arange(len(train), dtype=np.int64)
    if config.shuffle == "row_groups" and train.groups is None:
        raise UserError(
            f"data.shuffle is row_groups, and data.train {config.train} has none, only Parquet "
            "files do; set data.shuffle to all"
        )
    if config.validation is None and config.train != DIGITS:
        used, held = held_out(len(train), config.held_out, config.seed)
        if not len(held) or not len(used):
            raise UserError(
                f"data.split {config.held_out:g} of the {len(train)} images of {config.train} "
                f"leaves {len(used)} for training and {len(held)} for validation; set another, or "
                "set data.validation"
            )
        validation = copy.copy(train)  # of its own, since another thread may read it
        return FoundImages(Part(train, used), Part(validation, held), classes)
    return FoundImages(Part(train, everything), _own_validation(config, classes), classes)


def _own_validation(config: ImageDataConfig, classes: ClassNames) -> Part:
    need_pillow()
    source = _open(config, "validation", config.validation or DIGITS)
    _check_classes(source, classes)
    return Part(source, np.arange(len(source), dtype=np.int64))


def _check_classes(source: ImageSource, classes: ClassNames) -> None:
    """Labels of validation must mean what those of training do."""
    names, numbers = source.names, tuple(map(str, range(len(classes))))
    if names is None and classes.names != numbers and sorted(classes.names) == sorted(numbers):
        raise UserError(
            f"the labels of {source.path} are bare numbers, and the classes of {classes.source} "
            f"are named by numbers in another order ({', '.join(classes.names[:4])}, ...), so what "
            "a number means is not clear; give both in one form, or name folders 000, 001, ..."
        )
    if names is not None and names != classes.names:
        new, missing = set(names) - set(classes.names), set(classes.names) - set(names)
        problem = "the same classes in another order"
        if new or missing:
            problem = "; ".join(
                f"{what} {', '.join(sorted(which)[:5])}{', ...' if len(which) > 5 else ''}"
                for what, which in (("classes of its own", new), ("not the classes", missing))
                if which
            )
        raise UserError(
            f"{source.path} has {problem}, compared with {classes.source}; both must have the same "
            "classes"
        )
    source.check_labels(len(classes))


def _open(config: ImageDataConfig, part: PartName, path: str) -> ImageSource:
    """UserError where it holds no images, or what is there is of no known kind."""
    if path == DIGITS:
        return DigitsSource(part)
    try:
        files = _shards(f"data.{part}", path)
        if not files:
            return FolderSource(path)
        if files[0].endswith(".tar"):
            source: ImageSource = TarSource(path, files, config.label_column)
        else:
            source = ParquetSource(path, files, config.image_column, config.label_column)
    except OSError as error:
        raise as_user_error(error) from None
    if not len(source):
        raise UserError(f"data.{part} {path} holds no images in its {len(files)} files; add some")
    return source


def _shards(key: str, path: str) -> Sequence[str]:
    """.parquet or .tar files, sorted; none where `path` is a folder without such."""
    if Path(path).is_dir():
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".")]
        found = sorted(os.path.join(path, name) for name in names if name.endswith(_SUFFIXES))
    else:
        found = sorted([path] if Path(path).exists() else glob(path, recursive=True))
        if not found:
            raise UserError(f"{key} is {path!r}, and nothing is there; {_MAY_BE}")
    kinds = {os.path.splitext(file)[1] for file in found}
    unknown = kinds - set(_SUFFIXES)
    if unknown:
        other = next(file for file in found if os.path.splitext(file)[1] in unknown)
        raise UserError(f"{key} {path} takes in {other}, which is of no known kind; {_MAY_BE}")
    if len(kinds) > 1:
        raise UserError(
            f"{key} {path} takes in .parquet and .tar files; name one kind by a glob, as in "
            "folder/*.tar"
        )
    return found
