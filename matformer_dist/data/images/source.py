"""What all places of images have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from matformer_dist.data.images.decoding import BrokenImageError, decode_image
from matformer_dist.data.images.order import Indices
from matformer_dist.errors import LocalError, UserError

if TYPE_CHECKING:
    from PIL import Image

_MOST_CLASSES = 1 << 20


class ImageSource(ABC):
    """Images in a fixed order, each with a label; indexed without decoding any.

    labels  int64 [samples]
    names   of the classes that labels count, or None where labels are bare numbers
    groups  None, or ascending samples at which what is read together begins
    """

    groups: Indices | None = None

    def __init__(self, path: str, labels: Indices, names: Sequence[str] | None) -> None:
        self.path = path  # as the user has it, for messages
        self.labels = labels
        self.names = None if names is None else tuple(names)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def file(self, sample: int) -> str:
        """That it lies in."""

    @abstractmethod
    def where(self, sample: int) -> str:
        """For messages: its file, and what it is called there."""

    @abstractmethod
    def image(self, sample: int, channels: int) -> Image.Image:
        """In mode L (channels 1) or RGB (3); LocalError where it cannot be read."""

    def check_labels(self, classes: int) -> None:
        """UserError for a label that is not 0 to classes - 1, naming its file and sample."""
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= classes))
        if len(wrong):
            sample = int(wrong[0])
            raise UserError(
                f"label {self.labels[sample]} of {self.where(sample)} is none of the {classes} "
                f"classes, 0 to {classes - 1} ({len(wrong)} such labels are there); leave such "
                "samples out, or mend their labels"
            )

    def class_names(self) -> tuple[str, ...]:
        """`names`, or where there are none the numbers from 0 to the largest label."""
        if self.names is not None:
            return self.names
        largest = int(self.labels.max())
        if largest >= _MOST_CLASSES:
            raise UserError(
                f"label {largest} of {self.where(int(self.labels.argmax()))} would make as many "
                f"classes; number the classes from 0, below {_MOST_CLASSES:,}"
            )
        return tuple(str(number) for number in range(largest + 1))


class EncodedSource(ImageSource):
    """A source whose images are files' bytes."""

    @abstractmethod
    def encoded(self, sample: int) -> bytes:
        """An OSError or LocalError where they cannot be read."""

    def image(self, sample: int, channels: int) -> Image.Image:
        try:
            return decode_image(self.encoded(sample), channels)
        except BrokenImageError as error:
            raise LocalError(
                f"{self.where(sample)} holds no image that can be decoded: {error}; mend it, or "
                "leave it out"
            ) from None
        except OSError as error:
            raise LocalError(
                f"cannot read {self.where(sample)}: {error.strerror or error}; every rank must be "
                "able to read what the main rank has found"
            ) from None


def numbered(
    values: Sequence[int | str], where: Callable[[int], str]
) -> tuple[Indices, tuple[str, ...] | None]:
    """Labels and names of numbers (no names) or of names (theirs, sorted).

    UserError, by `where` of a sample, for numbers among names, and numbers beyond int64.
    """
    named = bool(values) and isinstance(values[0], str)
    for sample, value in enumerate(values):
        if isinstance(value, str) != named:
            raise UserError(
                f"the label of {where(sample)} is {value!r}, and that of {where(0)} is "
                f"{values[0]!r}; labels must all be numbers or all be names"
            )
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise UserError(f"the label of {where(sample)} is {value}; number classes from 0")
    if not named:
        return np.array(values, np.int64), None
    names = sorted({str(value) for value in values})
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[str(value)] for value in values], np.int64), tuple(names)
