"""The collectives of one optimizer step, as one rank takes part in them.

Legend: b sequences of a micro-batch, s positions, R rows, D d_model, V vocabulary, T ranks of a
group.

What is sent follows from the layers (parallel/layers.py), the loss (ops/loss_operator.py) and
DeepSpeed's optimizers; tests/distributed/test_plan.py holds it against what real ranks send.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from matformer_dist.chunks import chunk_parts
from matformer_dist.planning.gathering import gathering_of
from matformer_dist.planning.layout import OUTPUT_BIASES, PlannedRun

Operation = Literal["all_reduce", "all_gather", "reduce_scatter"]
_TOGETHER = 500_000_000  # elements of gradients that DeepSpeed joins where ZeRO does not
_ROW_NUMBERS = 7  # of a row that the loss gathers, in fp32

# DeepSpeed's own of a step: numbers of one value each, as (bytes, how many). Norms and overflow.
# Stage 1 of bf16 is another optimizer of DeepSpeed's, but for one that is offloaded.
_OF_DATA_RANKS = {
    (0, "fp32"): [(4, 1)], (1, "fp32"): [(4, 2)], (2, "fp32"): [(4, 2)], (3, "fp32"): [(8, 2)],
    (1, "bf16"): [], (2, "bf16"): [(4, 2), (1, 1)], (3, "bf16"): [(8, 2)],
}  # fmt: skip
_OF_TENSOR_RANKS = {
    (0, "fp32"): [(4, 2)], (1, "fp32"): [(4, 2)], (2, "fp32"): [(4, 2)], (3, "fp32"): [(8, 2)],
    (1, "bf16"): [(4, 1)], (2, "bf16"): [(4, 2), (1, 1)], (3, "bf16"): [(8, 2)],
}  # fmt: skip


def _optimizer(run: PlannedRun) -> tuple[int, str]:
    stage, precision = run.config.zero_stage, run.config.training.precision
    return (2 if precision == "bf16" and stage == 1 and not run.sums_in_fp32 else stage), precision


@dataclass(frozen=True)
class Collective:
    """`count` collectives of a step over one group of ranks, and all their bytes.

    Bytes are of the whole tensor: the reduced one, the gathered one, the one that is scattered.
    """

    operation: Operation
    group: Literal["tensor", "data"]
    what: str
    count: int
    bytes: int


def traffic(run: PlannedRun) -> list[Collective]:
    """All collectives of a step; none over a group of one rank."""
    found = []
    if run.tensor > 1:
        found += list(_of_layers(run))
    if run.data_size > 1:
        found += list(_of_gradients(run))
    for group, size, numbers in (
        ("tensor", run.tensor, _OF_TENSOR_RANKS),
        ("data", run.data_size, _OF_DATA_RANKS),
    ):
        listed = numbers[_optimizer(run)]
        if size > 1 and listed:
            count, total = sum(n for _, n in listed), sum(size * n for size, n in listed)
            found.append(Collective("all_reduce", group, "norms", count, total))  # type: ignore[arg-type]
    return found


def _of_layers(run: PlannedRun) -> Iterator[Collective]:
    times = run.micro_batches
    for what, count, size in _row_sums(run):
        # Cut rows are gathered before a sum, and its result is scattered: both, forward and back.
        cut = run.config.parallel.sequence
        for operation in ("all_gather", "reduce_scatter") if cut else ("all_reduce",):
            yield Collective(operation, "tensor", what, times * count, times * size)  # type: ignore[arg-type]
    if run.config.parallel.sequence:
        yield from _of_cut_rows(run)
    chunks = sum(map(len, chunk_parts(run.loss_tokens, run.loss_chunk, halves=run.tensor > 1)))
    size = run.tensor * run.head_rows * _ROW_NUMBERS * 4
    yield Collective("all_gather", "tensor", "loss", times * chunks, times * size)
    if run.softens_targets:
        size = run.tensor * run.head_rows * 4
        yield Collective("all_gather", "tensor", "soft targets", times, times * size)


def _row_sums(run: PlannedRun) -> Iterator[tuple[str, int, int]]:
    """(what, how many, bytes) of the sums over rows that a micro-batch needs, forward and back."""
    layers = run.config.model.n_layers
    row = run.config.model.d_model * run.element_bytes
    whole, first = run.rows * row, run.first_rows * row
    attention = first + (layers - 1) * whole
    if not run.config.parallel.sequence and run.reads_text:
        yield "embedding", 1, first  # of a table that is cut over the ranks
    yield "attention, forward", layers, attention
    yield "FFN, forward", layers, layers * whole
    if run.config.training.activation_checkpointing == "full":
        # A block is computed again up to the last value that its backward pass needs.
        yield "attention, again", layers, attention
    yield "attention, backward", layers, attention
    yield "FFN, backward", layers, layers * whole
    if not run.config.parallel.sequence:
        yield "head, backward", 1, run.head_rows * run.head_width * run.element_bytes


def _of_cut_rows(run: PlannedRun) -> Iterator[Collective]:
    """What sequence parallelism sends beside: rows gathered again for dW, those that segments
    repeat, what is pooled, and gradients of which each rank has its rows' share.
    """
    model, times = run.config.model, run.micro_batches
    row = model.d_model * run.element_bytes
    whole, first = run.rows * row, run.first_rows * row
    layers = model.n_layers

    def of(operation: Operation, what: str, count: int, size: int) -> Collective:
        return Collective(operation, "tensor", what, times * count, times * size)

    if run.reads_text:
        yield of("reduce_scatter", "embedding", 1, first)
        yield of("all_gather", "embedding, backward", 1, first)
        yield of("all_gather", "head", 1, whole)
        yield of("reduce_scatter", "head, backward", 1, whole)
    else:
        yield of("all_reduce", "pooling", 1, 4 * run.head_rows * model.d_model)
        yield of("all_reduce", "head, backward", 1,
                 run.head_rows * run.head_width * run.element_bytes)  # fmt: skip
    attention = first + (layers - 1) * whole
    if not run.compiles_blocks:  # the compiler keeps what was gathered
        yield of("all_gather", "inputs, for their weights' gradients", 2 * layers,
                 attention + layers * whole)  # fmt: skip
    if run.config.training.activation_checkpointing == "full":
        # The FFN runs again up to its pre-activations.
        yield of("all_gather", "FFN, again", layers, layers * whole)
    if run.shared_tokens:
        again = run.config.training.activation_checkpointing == "full"
        yield of("all_gather", "repeated rows", 1 + again, (1 + again) * first)
        yield of("reduce_scatter", "repeated rows, backward", 1, first)
    sizes = list(_of_own_rows(run))
    yield of("all_reduce", "whole weights' gradients", len(sizes), 4 * sum(sizes))


def _of_own_rows(run: PlannedRun) -> Iterator[int]:
    """Elements of the weights that every rank holds, and uses on its own rows alone."""
    embedding, *in_layers, norm, _ = run.modules
    if not run.reads_text:
        yield from embedding.weights.values()
    for module in in_layers:
        for name, size in module.vectors.items():
            if module.kind == "norm" or name.endswith(OUTPUT_BIASES):
                yield size
    if run.reads_text:  # of images it sees pooled rows, which all ranks have
        yield from norm.vectors.values()


def _of_gradients(run: PlannedRun) -> Iterator[Collective]:
    stage, e = run.config.zero_stage, run.element_bytes
    times = run.micro_batches if stage >= 2 else 1
    count, size = times * len(_buckets(run)), times * run.parameters * e
    if stage == 3:
        sizes = [size for module in run.modules for size in module.weights.values()]
        size = times * e * sum(_padded(size, run.data_size) for size in sizes)
        yield Collective("reduce_scatter", "data", "gradients", count, size)
        yield from _of_cut_weights(run)
        return
    yield Collective("all_reduce", "data", "gradients", count, size)
    if stage:
        groups = [
            _padded(elements, 2 * run.data_size)
            for elements in (sum(run.matrices.values()), run.vectors)
        ]
        yield Collective("all_gather", "data", "weights", len(groups), e * sum(groups))


def _buckets(run: PlannedRun) -> list[int]:
    """Elements of the pieces in which all gradients are sent once."""
    stage = run.config.zero_stage
    if run.sums_in_fp32:
        # Flat, those with and those without weight decay.
        return _joined([sum(run.matrices.values()), run.vectors], _TOGETHER)
    if stage == 0:
        sizes = [size for module in run.modules for size in module.weights.values()]
        return _joined(sizes, _TOGETHER)
    found: list[int] = []
    for size in _as_they_come(run):
        if found and found[-1] + size <= run.bucket_elements:
            found[-1] += size
        else:
            found.append(size)
    return found


def _as_they_come(run: PlannedRun) -> list[int]:
    """Elements of weights in the order in which DeepSpeed puts gradients into buckets."""
    if run.config.zero_stage == 1:  # behind the last micro-batch; without weight decay last
        matrices = [size for module in run.modules for size in module.matrices.values()]
        return matrices + [size for module in run.modules for size in module.vectors.values()]
    found: list[int] = []
    for module in reversed(run.modules):
        sizes = list(module.weights.values())
        # Attention's output comes first; both weights of an FFN come together.
        found += sizes[::-1] if module.kind == "attention" else sizes
    return found


def _joined(sizes: list[int], enough: int) -> list[int]:
    """Sums of neighbours, each the first to be more than `enough`."""
    found = [0]
    for size in sizes:
        if found[-1] > enough:
            found.append(0)
        found[-1] += size
    return found


def _of_cut_weights(run: PlannedRun) -> Iterator[Collective]:
    gathering, e, times = gathering_of(run), run.element_bytes, run.micro_batches
    for what, count, elements in (
        ("weights", times * gathering.count, times * gathering.elements),
        ("small weights", *gathering.kept),
    ):
        if count:
            yield Collective("all_gather", "data", what, count, elements * e)


def _padded(elements: int, unit: int) -> int:
    return -(-elements // unit) * unit
