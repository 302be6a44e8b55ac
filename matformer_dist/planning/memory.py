"""Bytes of one rank on its device in a training step.

Legend: R rows, D d_model, V vocabulary, T tensor-parallel ranks, N sum of rows x width of the
segments on one rank, k input vectors of a neuron, e bytes of an element.

A step's need is the largest of several moments: activations are most at the end of the forward
pass, gradients at the end of the backward pass. What is held of weights is planning/states.py's;
the rest follows from models/ and ops/. tests/distributed/test_plan.py holds the sum against all
bytes that real ranks allocate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matformer_dist.planning.layout import PlannedRun
from matformer_dist.planning.states import States, states_of
from matformer_dist.units import short_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part, at the moment of a step that needs most; and those that live on the host.

    gradients: with the buffers they are sent from. workspace: of the pass that is running, the
    loss' or one layer's.
    """

    moment: str
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    workspace_bytes: int
    offloaded_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes on the device, by name."""
        return {
            "weights": self.weights_bytes,
            "gradients": self.gradients_bytes,
            "optimizer": self.optimizer_bytes,
            "activations": self.activations_bytes,
            "workspace": self.workspace_bytes,
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {short_bytes(n)}" for name, n in self.parts().items() if n)
        text = f"about {short_bytes(self.total_bytes)} a rank {self.moment}: {parts}"
        if self.offloaded_bytes:
            text += f"; offloaded to the host {short_bytes(self.offloaded_bytes)}"
        return text


def estimate_memory(run: PlannedRun) -> MemoryEstimate:
    """Of a step behind the first: the moment when most is allocated."""
    return max(memory_by_moment(run), key=lambda estimate: estimate.total_bytes)


def memory_by_moment(run: PlannedRun) -> list[MemoryEstimate]:
    """Of a step behind the first, in the order of the moments."""
    states = states_of(run)
    return [
        MemoryEstimate(
            moment=moment,
            weights_bytes=states.weights + gathered,
            gradients_bytes=states.gradients + gradients,
            optimizer_bytes=states.optimizer,
            activations_bytes=activations,
            workspace_bytes=workspace,
            offloaded_bytes=states.offloaded,
        )
        for moment, gathered, gradients, activations, workspace in _moments(run, states)
    ]


def _moments(run: PlannedRun, states: States) -> Iterator[tuple[str, int, int, int, int]]:
    """(when, weights that are gathered, gradients, activations, workspace)"""
    model, e = run.config.model, run.element_bytes
    layers = model.n_layers
    hidden = run.head_rows * run.head_width * e  # whole on every rank, in the loss
    head = run.local_outputs * run.head_width
    # The first layer may have fewer rows; all others are alike.
    in_layers = _kept_by_layer(run, 0) + (layers - 1) * _kept_by_layer(run, 1)
    kept = in_layers + _norm_input(run, run.head_rows)
    in_layer = _in_layer(run) + (
        _saved_by_layer(run, layers - 1)
        if run.config.training.activation_checkpointing == "full"
        else 0
    )
    if run.config.training.activation_checkpointing == "selective":
        in_layer += run.own_rows(run.rows) * model.d_model * e  # a norm, made again
    live, carried = states.gathered, states.carried
    yield "in the loss", live, carried, kept, hidden + _loss_bytes(run)
    # The losses' gradients are scaled into new memory before the first layer's turn, beside those
    # of soft targets.
    yield (
        "as the backward pass begins",
        live,
        carried + states.bucket,
        kept,
        (3 if run.softens_targets else 2) * (hidden + head * e),
    )
    # A tied weight's gradient waits for the embedding's.
    waiting = head * (states.gradient_bytes if run.matrices["head"] else e)
    yield (
        "in the last layer, backward",
        live,
        carried + states.bucket + waiting,
        in_layers,
        in_layer,
    )
    # All but those of the first layer, whose turn it is, and of the embedding, which is last.
    layer = (run.matrices["attention"] + run.matrices["ffn"]) // layers
    others = sum(run.matrices.values()) - run.matrices["embedding"] - layer
    come = others * states.gradient_bytes + states.bucket
    first = _kept_by_layer(run, 0)
    yield "in the first layer, backward", live, max(carried, come), first, in_layer
    yield "as gradients are reduced", live, states.reduced, 0, 0
    yield "in the optimizer's step", 0, states.stepped, 0, 0


def _kept_by_layer(run: PlannedRun, index: int) -> int:
    """Activations that layer `index` keeps for its backward pass."""
    if run.config.training.activation_checkpointing == "full":
        kept = run.own_rows(_attention_rows(run, index))
        return kept * run.config.model.d_model * run.element_bytes
    if run.config.training.activation_checkpointing == "selective":
        return _products_of_layer(run, index)
    return _saved_by_layer(run, index)


def _products_of_layer(run: PlannedRun, index: int) -> int:
    """What selective checkpointing leaves of it: rows once for each norm; queries, keys and values
    as they come from the GEMM, the context, its log-sum-exp in fp32; the FFN's pre-activations.
    """
    model, tensor = run.config.model, run.tensor
    rows = _attention_rows(run, index)
    heads = 2 * model.attention_width + 2 * model.kv_heads * model.head_dim
    inputs = 2 if model.ffn == "swiglu" else 1
    residual = run.own_rows(rows + run.rows) * model.d_model
    elements = residual + rows * heads // tensor + inputs * run.neurons
    return run.element_bytes * elements + 4 * rows * (model.n_heads // tensor)


def _saved_by_layer(run: PlannedRun, index: int) -> int:
    """What its operators save: products, whose rows are the norms' outputs; the norms' inputs and
    statistics; queries and keys turned.
    """
    model, rows = run.config.model, _attention_rows(run, index)
    norms = 4 * (rows + run.rows) + sum(
        _norm_input(run, of_norm, run.compiles_blocks) for of_norm in (rows, run.rows)
    )
    turned = 0
    if run.reads_text:
        turned = rows * (model.attention_width + model.kv_heads * model.head_dim) // run.tensor
    return _products_of_layer(run, index) + norms + run.element_bytes * turned


def _norm_input(run: PlannedRun, rows: int, is_compiled: bool = False) -> int:
    """What a norm saves of its input; on a CPU, torch's own RMSNorm keeps it twice, in fp32."""
    twice = run.config.model.norm == "rmsnorm" and run.device == "cpu" and not is_compiled
    width = run.config.model.d_model * (8 if twice else run.element_bytes)
    return run.own_rows(rows) * width


def _attention_rows(run: PlannedRun, index: int) -> int:
    return run.rows if index else run.first_rows


def _in_layer(run: PlannedRun) -> int:
    """Temporary bytes of a layer's backward pass: of its FFN or its attention."""
    model, e, tensor = run.config.model, run.element_bytes, run.tensor
    widest = run.segments[0][1] // tensor
    inputs = 2 if model.ffn == "swiglu" else 1
    weights = run.matrices["ffn"] // model.n_layers
    # d_act, which is ragged; act and d_h, which have the widest segment's rows throughout
    ffn = run.neurons + (1 + inputs) * run.rows * widest + weights
    kv_width = model.kv_heads * model.head_dim
    attention = run.rows * (3 * model.attention_width + 3 * kv_width) // tensor
    attention += run.matrices["attention"] // model.n_layers
    # The residual's gradient, and the branch's.
    own, whole = run.own_rows(run.rows) * model.d_model, run.rows * model.d_model
    if run.config.parallel.sequence:
        # The branch's input too, gathered, and gradients whole before they are summed: the FFN's
        # of its output stays beside that of its input.
        in_sum = whole if run.device == "cpu" else 0  # gloo's reduce-scatter works in a copy
        return e * (2 * own + max(3 * whole + ffn, 2 * whole + attention) + in_sum)
    return e * (own + whole + max(ffn, attention))


def _loss_bytes(run: PlannedRun) -> int:
    """Beyond the hidden rows: their gradient, the head's in fp32, and a chunk's logits; or, behind
    the chunks, the head's gradient once more, rounded. A head with a bias is there again, with the
    bias for a column.
    """
    e = run.element_bytes
    head = run.local_outputs * run.head_width
    rows = run.loss_chunk * (run.head_rows // run.loss_tokens)
    # Where a GEMM of bf16 has no fp32 result, operands are copied to fp32.
    copies = e == 2 and run.device == "cpu"
    chunk = rows * (4 * run.local_outputs + (4 + (4 if copies else e)) * run.head_width)
    rounded = e * head if e == 2 else 0
    operand = (4 * head if copies else 0) + (e * head if run.config.model.biases else 0)
    numbers = run.head_rows * (12 + 16 + 12 + 8)  # losses' weights, losses, copies, best ids
    return e * run.head_rows * run.head_width + 4 * head + operand + max(chunk, rounded) + numbers
