"""The names of the classes: what a label, and so a row of a classifier's head, means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from matformer_dist.errors import UserError

FILE = "classes.json"
_LARGEST_FILE_BYTES = 1 << 28


@dataclass(frozen=True)
class ClassNames:
    """Label n means `names[n]`. `source` is where they were found, for messages.

    UserError for fewer than two, the same name twice, an empty one, or one that is not valid
    Unicode.
    """

    names: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            found = f"the one class {self.names[0]!r}" if self.names else "no class"
            raise UserError(f"{self.source} holds {found}; a classifier needs two or more")
        seen: set[str] = set()
        for name in self.names:
            if not name or name in seen:
                problem = f"{name!a} twice" if name else "an empty one"
                raise UserError(
                    f"the class names of {self.source} hold {problem}; they must all differ"
                )
            seen.add(name)
            try:
                name.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"the class name {name!a} of {self.source} is not valid Unicode; rename it"
                ) from None

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def digest(self) -> str:
        """Equal digests mean that labels mean the same."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()

    @property
    def files(self) -> Mapping[str, bytes]:
        """The file, by name, that a run directory keeps them in."""
        text = json.dumps(self.names, ensure_ascii=False, indent=1)
        return {FILE: f"{text}\n".encode()}


def check_same_classes(found: ClassNames, trained_on: ClassNames) -> None:
    """UserError where labels of images mean something else than those of a model."""
    if found.digest != trained_on.digest:
        raise UserError(
            f"the classes of {found.source} are not those that the model was trained on, "
            f"{trained_on.source}; give images of the same classes, whose folders or labels have "
            "the same names"
        )


def load_class_names(path: str | Path) -> ClassNames:
    """A classes.json, or the folder of one; UserError where there is none, or it is damaged."""
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise ValueError("too large")
        names = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the class names {path}: {error.strerror}") from None
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} does not hold class names, which are a JSON list of texts")
    return ClassNames(tuple(names), str(path))
