"""A new run from the weights of another one: fine-tuning, and continued training.

Step, optimizer and data begin anew. Of a vision encoder the classes may be others, with a fresh
head then, and the image size, for which learned positions are interpolated. The nesting may be
another one over the same neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matformer_dist.checkpoints.memory import FRESH, FreshMemory
from matformer_dist.checkpoints.universal import UniversalModel, load_universal
from matformer_dist.config import Config
from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.errors import UserError
from matformer_dist.models.building import build_model
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.layout import REPLICATED
from matformer_dist.parallel.topology import TensorParallel
from matformer_dist.run_directory import Checkpoint, Manifest
from matformer_dist.training.setup import changes_of_model, check_task

_POSITIONS = "embedding.positions"
_HEAD = ("head.weight", "head.bias")


@dataclass(frozen=True)
class Beginning:
    """What `load_other_layout` asks for, of a checkpoint of another run."""

    source: UniversalModel
    grid: int  # of the new model's patches along a side; 0: of a text
    fresh: frozenset[str]  # weights that the new model begins with as they were initialised
    whole: Mapping[str, nn.Parameter]  # of the new model: shapes and partitions

    notices: tuple[str, ...]  # what the user should know
    moments = ()
    optimizer_steps = 0

    def share(
        self, name: str, state: str, tensor: TensorParallel, *, memory: FreshMemory = FRESH
    ) -> Tensor:
        """What a rank of the new model stores of a weight."""
        value = self.source.value(name, state, memory=memory)
        shape = self.whole[name].shape
        if name == _POSITIONS and value.shape != shape:
            value = resized_positions(value, self.grid)
        partition = getattr(self.whole[name], "partition", REPLICATED)
        return partition.deal(value, tensor.rank, tensor.size)


def begin_from(checkpoint: Checkpoint, config: Config, now: Manifest) -> Beginning:
    """UserError where the checkpoint is of a model that this one cannot begin from.

    now: what the manifest of a checkpoint of the new run would say.
    """
    saved = checkpoint.manifest
    check_task(f"checkpoint.initial {checkpoint.path}", saved, now)
    wrong = list(changes_of_model(saved.model, now.model, _free(saved)))
    if saved.model.task == "language" and saved.labels_sha256 != now.labels_sha256:
        wrong.append("the tokenizer (its SHA-256 differs)")
    if wrong:
        raise UserError(
            f"checkpoint.initial {checkpoint.path} is of another model: {'; '.join(wrong)}; set "
            "these as they were, or choose another checkpoint"
        )
    with torch.device("meta"):
        nestings = [config.granularities] * config.model.n_layers
        model = build_model(config.model, nestings, now.outputs, Initializer(seed=None))
    fresh = frozenset(_HEAD if saved.labels_sha256 != now.labels_sha256 else ())
    grid = config.model.grid if isinstance(config.model, VisionModelConfig) else 0
    return Beginning(
        load_universal(checkpoint),
        grid,
        fresh,
        dict(model.named_parameters()),
        tuple(_notices(saved, now)),
    )


def _notices(saved: Manifest, now: Manifest) -> Iterator[str]:
    if saved.labels_sha256 != now.labels_sha256:
        yield (
            f"the head begins anew: the {now.outputs:,} classes of data.train are not, by their "
            f"names and order, the {saved.outputs:,} that the weights were trained on"
        )
    grids = [getattr(one.model, "grid", 0) for one in (saved, now)]
    if grids[0] != grids[1] and getattr(now.model, "positions", "") == "learned":
        before, after = (f"{grid} x {grid}" for grid in grids)
        yield f"learned positions of {before} patches are interpolated for {after}"


def _free(saved: Manifest) -> tuple[str, ...]:
    return ("image_size",) if isinstance(saved.model, VisionModelConfig) else ()


def resized_positions(positions: Tensor, grid: int) -> Tensor:
    """Learned positions of g * g patches, behind a class token's if there is one, [s, D], as those
    of `grid` * grid patches: bicubic, with antialiasing, as timm does it.
    """
    before = int(len(positions) ** 0.5)
    token, patches = positions.split([len(positions) - before**2, before**2])
    image = patches.T.reshape(1, -1, before, before)
    resized = F.interpolate(
        image, (grid, grid), mode="bicubic", antialias=True, align_corners=False
    )
    return torch.cat([token, resized.flatten(2)[0].T])
