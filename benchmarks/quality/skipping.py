"""launch/train.py, where a step leaves alone the neurons that no sequence of it ran.

AdamW moves every neuron at every step: one outside a sampled prefix has no gradient then, but
momentum of earlier ones, and weight decay. Here its weights and moments stay as they were.

    python -m benchmarks.quality.skipping --config FILE [section.key=value ...]     (one process)
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from itertools import islice
from unittest.mock import patch

from torch import Tensor

from matformer_dist.models.forward_pass import Pass
from matformer_dist.training.engine import Engine

_train_step = Engine.train_step


def train_step(
    engine: Engine,
    micro_batches: Iterator[tuple[Tensor, Tensor]],
    passes: Iterator[Pass],
    lr: float,
) -> list[tuple[Pass, Tensor]]:
    plans = list(islice(passes, engine.accumulation))
    kept = [(part, part.clone()) for part in _untouched(engine, plans)]
    results = _train_step(engine, micro_batches, iter(plans), lr)
    for part, before in kept:
        part.copy_(before)
    return results


def _untouched(engine: Engine, plans: list[Pass]) -> Iterator[Tensor]:
    """Of weights and moments, the rows of neurons behind the widest prefix that is run."""
    submodels = [segment.submodel for plan in plans for segment in plan.segments]
    state = engine.deepspeed.optimizer.state
    for i, layer in enumerate(engine.deepspeed.module.layers):
        width = max(submodel.widths[i] for submodel in submodels)
        for weight in (layer.ffn.w_in, layer.ffn.w_out):
            moments = state[weight].values() if weight in state else ()
            for tensor in (weight.data, *moments):
                if tensor.shape == weight.shape:  # not the number of steps
                    yield tensor[width:]


if __name__ == "__main__":
    with patch.object(Engine, "train_step", train_step):
        runpy.run_path("launch/train.py", run_name="__main__")
