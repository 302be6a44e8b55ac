"""What config.json says of a ViT, of whichever program: the model, its classes, its images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.importing.checkpoint_config import short
from matformer_dist.importing.checkpoint_weights import Kind
from matformer_dist.models.vit_names import ViTNames


@dataclass(frozen=True)
class ViTDescription:
    """names: of its weights, and `unused`, of such as may stand beside those and are left out.

    class_names: as the file has them, a list or by number; None where it names none. images: keys
    of a run's section `data`.
    """

    model: VisionModelConfig  # classes are rows of the head, None where it has none
    names: ViTNames
    unused: Sequence[str]
    class_names: Any
    images: dict[str, Any]
    notices: Sequence[str]
    kind: Kind


def not_square(config: Mapping[str, Any], keys: Iterable[str]) -> Iterator[str]:
    """What is wrong with sizes that are given by height and width."""
    for key in keys:
        if isinstance(side(config.get(key)), list):
            yield f"{key} is {short(config[key])}, allowed is a square"


def side(value: Any) -> Any:
    """Of a square that is given by its height and width, [16, 16] as 16; anything else as it is."""
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return value[0]
    return value
