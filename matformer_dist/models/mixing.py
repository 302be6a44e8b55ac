"""Soft targets of images: mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899), label smoothing.

Legend: b images of a micro-batch, C channels, H height and width.

Image i is mixed with image b - 1 - i, by one share for a micro-batch; so of an odd number the
middle one stays as it is. What is drawn is a function
of (seed, step, micro-batch), so ranks that share a model agree and a resumed run repeats it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from torch import Tensor

from matformer_dist.config_vision import VisionObjectiveConfig


@dataclass(frozen=True)
class SoftTargets:
    """smoothing: share of the target that all classes have alike. kept: share of its own that an
    image, and its label, keeps. box: where a rectangle is cut in place of a blend, its middle as
    shares of height and width.
    """

    smoothing: float = 0.0
    kept: float = 1.0
    box: tuple[float, float] | None = None

    @classmethod
    def draw(cls, config: VisionObjectiveConfig, key: str) -> SoftTargets | None:
        """Of a micro-batch; None where its targets are hard."""
        found = random.Random(f"mixing:{key}")
        kinds = [kind for kind in ("mixup", "cutmix") if getattr(config, kind)]
        if not kinds or found.random() >= config.mixing_probability:
            return cls(config.label_smoothing) if config.label_smoothing else None
        kind = found.choice(kinds)
        alpha = getattr(config, kind)
        box = (found.random(), found.random()) if kind == "cutmix" else None
        return cls(config.label_smoothing, found.betavariate(alpha, alpha), box)

    def mix(self, images: Tensor) -> tuple[Tensor, float]:
        """images [b, C, H, H], mixed; and the share of its own label that each keeps."""
        if self.kept == 1:
            return images, 1.0
        others = images.flip(0)
        if self.box is None:
            return images * self.kept + others * (1 - self.kept), self.kept
        size = images.shape[-1]
        half = size * math.sqrt(1 - self.kept) / 2
        spans = [
            slice(max(0, round(at * size - half)), min(size, round(at * size + half)))
            for at in self.box
        ]
        mixed = images.clone()
        mixed[..., spans[0], spans[1]] = others[..., spans[0], spans[1]]
        cut = math.prod(span.stop - span.start for span in spans)
        return mixed, 1 - cut / size**2
