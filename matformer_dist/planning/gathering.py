"""What ZeRO 3 gathers of the weights that it has cut, in one forward and backward pass.

DeepSpeed (0.19) gathers a module's weights before it runs, forward and backward, and the next ones
of the pass ahead, up to `stage3_prefetch_bucket_size` elements at a time. Behind the module they go
again, unless they were met by what gathers ahead, or their next use is fewer than
`stage3_max_reuse_distance` elements of weights away. Weights of up to
`stage3_param_persistence_threshold` elements stay, and are gathered behind the optimizer's step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from matformer_dist.planning.layout import PlannedRun

_DEFAULTS = {
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
Weights = Mapping[str, int]  # elements of each


@dataclass(frozen=True)
class Gathering:
    """count, elements: of a micro-batch. kept: of weights that stay, as (count, elements) a step.

    live: the most elements that are there at once, with the buffer that some of them come in.
    """

    count: int
    elements: int
    live: int
    kept: tuple[int, int]


def gathering_of(run: PlannedRun) -> Gathering:
    """Of the weights of a rank that has its share of them, over `run.data_size` ranks."""
    options = {**_DEFAULTS, **run.config.zero_optimization}
    limit = int(options["stage3_param_persistence_threshold"])
    trace = [
        {name: -(-size // run.data_size) * run.data_size for name, size in module.items()}
        for module in _trace(run)
    ]
    kept = {name: n for module in trace for name, n in module.items() if n <= limit}
    count, elements, live = _follow(trace, kept, options)
    return Gathering(count, elements, live, (len(kept), sum(kept.values())))


def _trace(run: PlannedRun) -> list[Weights]:
    """Weights of the modules in turn, forward and backward: the model, which has a tied weight for
    its own, and blocks before what they hold.
    """
    embedding, *in_layers, norm, head = (module.weights for module in run.modules)
    tied = {} if head else embedding
    head = head or tied
    layers = [in_layers[i : i + 4] for i in range(0, len(in_layers), 4)]
    block: Weights = {}
    forward: list[Weights] = [tied, embedding]
    for layer in layers:
        forward += [block, *layer]
    forward += [norm, head]
    backward: list[Weights] = [tied, head, norm]
    for layer in reversed(layers):
        again = layer[:3] if run.config.training.activation_checkpointing == "full" else []
        backward += [block, *again, *layer[::-1]]
    return forward + backward + [embedding]


def _follow(
    trace: Sequence[Weights], kept: Weights, options: Mapping[str, Any]
) -> tuple[int, int, int]:
    """(how many gathers, their elements, most elements at once with their buffer)"""
    reuse, bucket, most_live = (
        int(options[f"stage3_{name}"])
        for name in ("max_reuse_distance", "prefetch_bucket_size", "max_live_parameters")
    )
    coming = deque((*weight, i) for i, module in enumerate(trace) for weight in module.items())
    passed = [0, *accumulate(sum(module.values()) for module in trace)]
    turns: dict[str, deque[int]] = {}
    for name, _, turn in coming:
        turns.setdefault(name, deque()).append(turn)
    met: dict[str, int] = {}  # the last turn for which a weight was fetched, or found to be there
    there = dict(kept)
    count = elements = 0
    most = sum(there.values())

    def gather(wanted: Weights) -> None:
        nonlocal count, elements, most
        size = sum(wanted.values())
        if wanted:
            count += 1
            elements += size
            there.update(wanted)
            # Several come in one buffer and are copied out of it.
            most = max(most, sum(there.values()) + (size if len(wanted) > 1 else 0))

    stay = kept.keys() | trace[0].keys()  # the model has its turn until the end
    for turn, weights in enumerate(trace):
        gather({name: size for name, size in weights.items() if name not in there})
        for _ in range(sum(met.get(name, -1) < turn for name in weights)):
            name, _, at = coming.popleft()
            met[name] = at
        room = min(most_live + sum(kept.values()) - sum(there.values()), bucket)
        gather(dict(_ahead(coming, there, met, room)))
        for name in weights:
            turns[name].popleft()
            again = turns[name][0] if turns[name] else None
            is_near = again is not None and passed[again] - passed[turn + 1] < reuse
            if name not in stay and not is_near and met[name] <= turn + 1:
                del there[name]
    return count, elements, most


def _ahead(
    coming: deque[tuple[str, int, int]], there: Weights, met: dict[str, int], limit: int
) -> Iterator[tuple[str, int]]:
    """Takes from what is coming until `limit` elements that are not there are found."""
    found: set[str] = set()
    size = 0
    while coming and size < limit:
        name, elements, turn = coming.popleft()
        met[name] = max(met.get(name, -1), turn)
        if name not in there and name not in found:
            found.add(name)
            size += elements
            yield name, elements
