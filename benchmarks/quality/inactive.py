"""launch/train.py, and what AdamW does to the neurons that a step does not run.

AdamW moves every neuron at every step: one outside a sampled prefix has no gradient then, but
momentum of earlier ones, and weight decay.

    python -m benchmarks.quality.inactive drift|skip --config FILE [section.key=value ...]

drift trains as always, and writes into RUN/inactive.json how far a step moves XL's own neurons: the
root of the mean square over their weights, by whether the step runs them. It has to see all steps,
so that it goes on with no run that was cut off. skip leaves weights and moments of what a step does
not run as they were. Both are for one process.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

from torch import Tensor
from torch.nn import Parameter

from benchmarks.quality.study import INACTIVE
from matformer_dist.config_file import load_config
from matformer_dist.models.forward_pass import Pass
from matformer_dist.training.engine import Engine

Moved = dict[bool, list[float]]  # each step's, by whether it runs the neurons that were watched
Around = Callable[[Engine, Sequence[Pass]], AbstractContextManager[None]]

_train_step = Engine.train_step


def step_within(around: Around) -> Callable[..., list[tuple[Pass, Tensor]]]:
    """Engine.train_step, within what `around` makes of the engine and the step's passes."""

    def train_step(
        engine: Engine,
        micro_batches: Iterator[tuple[Tensor, Tensor]],
        passes: Iterator[Pass],
        lr: float,
    ) -> list[tuple[Pass, Tensor]]:
        plans = list(islice(passes, engine.accumulation))
        with around(engine, plans):
            return _train_step(engine, micro_batches, iter(plans), lr)

    return train_step


def drift(moved: Moved) -> Around:
    """Adds to `moved` how far the step moves XL's own neurons."""

    @contextmanager
    def watched(engine: Engine, plans: Sequence[Pass]) -> Iterator[None]:
        *_, narrower, _ = engine.config.granularities.widths
        own = [weight.data[narrower:] for _, weight in _weights(engine)]
        before = [part.clone() for part in own]
        yield
        squares = [(a - b).square().mean().item() for a, b in zip(own, before, strict=True)]
        moved[max(_widths(plans)) > narrower].append(fmean(squares) ** 0.5)

    return watched


@contextmanager
def skip(engine: Engine, plans: Sequence[Pass]) -> Iterator[None]:
    """Puts back what the step does not run."""
    kept = [(part, part.clone()) for part in _untouched(engine, plans)]
    yield
    for part, before in kept:
        part.copy_(before)


def _weights(engine: Engine) -> Iterator[tuple[int, Parameter]]:
    """Of the FFNs, with their layer; a row is of one neuron."""
    for i, layer in enumerate(engine.deepspeed.module.layers):
        yield from ((i, weight) for weight in (layer.ffn.w_in, layer.ffn.w_out))


def _widths(plans: Sequence[Pass]) -> list[int]:
    """Of each layer, the widest prefix that is run."""
    submodels = [segment.submodel for plan in plans for segment in plan.segments]
    return [max(widths) for widths in zip(*(one.widths for one in submodels), strict=True)]


def _untouched(engine: Engine, plans: Sequence[Pass]) -> Iterator[Tensor]:
    """Of weights and moments, the rows of neurons behind the widest prefix that is run."""
    widths = _widths(plans)
    state = engine.deepspeed.optimizer.state
    for i, weight in _weights(engine):
        moments = state[weight].values() if weight in state else ()
        for tensor in (weight.data, *moments):
            if tensor.shape == weight.shape:  # not the number of steps
                yield tensor[widths[i] :]


def main() -> None:
    mode, _, configuration, *overrides = arguments = sys.argv[1:]
    if mode not in ("drift", "skip"):
        sys.exit(f"{mode!r} must be drift or skip")
    moved: Moved = defaultdict(list)
    around = skip if mode == "skip" else drift(moved)
    sys.argv = ["launch/train.py", *arguments[1:]]
    with patch.object(Engine, "train_step", step_within(around)):
        try:
            runpy.run_path("launch/train.py", run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
    if mode == "drift":
        config = load_config(Path(configuration), overrides)
        seen = len(moved[True]) + len(moved[False])
        if seen != config.training.total_steps:
            sys.exit(f"{seen} steps were seen, not all; remove {config.run.dir} and begin anew")
        means = {"run": fmean(moved[True]), "not_run": fmean(moved[False])}
        (config.run.dir / INACTIVE).write_text(json.dumps(means))


if __name__ == "__main__":
    main()
