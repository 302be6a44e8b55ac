"""What one pass over a nested model runs: segments of a batch, and how their losses add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matformer_dist.models.mixing import SoftTargets
from matformer_dist.nesting import Segment, Submodel


@dataclass(frozen=True)
class Pass:
    """What one pass over the model runs and how its losses add up; made by training/objective.py.

    `ce_weights`, `z_weights` and `kl_weights` weigh each segment's mean losses (see
    ops/multi_granularity_loss.py). With `shared_tokens`, every segment holds the same sequences,
    widest first, and the first is the teacher. `order` lists the sequences of a micro-batch as
    segments take them; None: as they come. Whoever hands a batch to the model puts it in order.
    """

    segments: tuple[Segment, ...]
    shared_tokens: bool
    ce_weights: tuple[float, ...]
    z_weights: tuple[float, ...]
    kl_weights: tuple[float, ...]
    temperature: float = 1.0
    order: tuple[int, ...] | None = None
    soft: SoftTargets | None = None  # of images; None: targets are hard

    @classmethod
    def evaluation(cls, submodels: Sequence[Submodel], sequences: int) -> Pass:
        """Losses of each submodel on the same sequences; agreement and KL are to the first."""
        n = len(submodels)
        segments = tuple(Segment(submodel, sequences) for submodel in submodels)
        return cls(segments, True, (1.0,) * n, (0.0,) * n, (0.0,) + (1.0,) * (n - 1))
