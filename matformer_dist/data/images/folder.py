"""A folder of class folders of images: the folders' names, sorted, are the classes.

Images may lie in folders of a class folder too. Files that are not named as images are passed
over, and so is all that begins with a dot.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from matformer_dist.data.images.packed import PackedTexts
from matformer_dist.data.images.source import EncodedSource
from matformer_dist.errors import LocalError, UserError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_PARTS = {"dev", "eval", "test", "train", "training", "val", "valid", "validation"}


class FolderSource(EncodedSource):
    """Class by class, the files of each in the order of their paths."""

    def __init__(self, path: str) -> None:
        classes, files, labels = _class_folders(path), [], []
        for label, name in enumerate(classes):
            found = sorted(_files(path, name))
            if not found:
                raise UserError(
                    f"the class folder {os.path.join(path, name)} holds no images "
                    f"({', '.join(SUFFIXES)}); add some, or take it out"
                )
            files += found
            labels += [label] * len(found)
        super().__init__(path, np.array(labels, np.int64), classes)
        self._files = PackedTexts(map(os.fsencode, files))

    def file(self, sample: int) -> str:
        return os.path.join(self.path, os.fsdecode(self._files[sample]))

    where = file

    def encoded(self, sample: int) -> bytes:
        file = Path(self.file(sample))
        if not stat.S_ISREG(file.stat().st_mode):  # to open a pipe waits for a writer
            raise LocalError(f"{file} is named as an image, and is no file; take it out")
        return file.read_bytes()


def _class_folders(path: str) -> list[str]:
    """Their names, sorted; UserError where `path` does not look like a folder of such."""
    with os.scandir(path) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".")]
    loose = sorted(entry.name for entry in seen if _is_image(entry.name) and entry.is_file())
    classes = sorted(entry.name for entry in seen if entry.is_dir())
    if loose:
        raise UserError(
            f"{path} holds images that are in no class folder ({loose[0]}); put each into the "
            "folder of its class"
        )
    if not classes:
        raise UserError(
            f"{path} holds no images: neither class folders, nor .parquet or .tar files"
        )
    if {name.lower() for name in classes} <= _PARTS:
        raise UserError(
            f"{path} holds {', '.join(classes)}, which are parts of a data set, not classes; name "
            f"one of them, such as {os.path.join(path, classes[-1])}"
        )
    return classes


def _files(path: str, name: str) -> Iterator[str]:
    """Paths, below `path`, of all images of the class folder `name`; UserError where a link leads
    back to a folder on the way to it.
    """
    for folder, folders, files in os.walk(
        os.path.join(path, name), followlinks=True, onerror=_raise
    ):
        folders[:] = [below for below in folders if not below.startswith(".")]
        for link in (os.path.join(folder, below) for below in folders):
            if os.path.islink(link) and _leads_back(link, below=os.path.join(path, name)):
                raise UserError(
                    f"{link} is a link to {os.path.realpath(link)}, on the way to it, so images "
                    "there would be found without end; take the link out"
                )
        below = os.path.relpath(folder, path)
        for file in files:
            if _is_image(file) and not file.startswith("."):
                yield os.path.join(below, file)


def _leads_back(link: str, below: str) -> bool:
    """Whether a folder on the way from `below` to the link lies in what that links to."""
    target, folder = os.path.realpath(link), link
    while folder != below:
        folder = os.path.dirname(folder)
        if os.path.commonpath([target, os.path.realpath(folder)]) == target:
            return True
    return False


def _is_image(file: str) -> bool:
    return file.lower().endswith(SUFFIXES)


def _raise(error: OSError) -> None:
    raise error
