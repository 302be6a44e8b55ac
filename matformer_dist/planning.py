"""What a run will need, computed from its configuration alone. No torch here.

Legend: b micro-batch sequences, s positions, D d_model, F d_ff, V vocabulary, T tensor-parallel
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from matformer_dist.config import Config
from matformer_dist.counting import count_parameters


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs, by part, on its device; and those that ZeRO-Offload takes off."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    loss_bytes: int
    offloaded_bytes: int

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.loss_bytes
        )


def passes_per_sequence(config: Config) -> tuple[float, float]:
    """(copies of a sequence, FFN width relative to d_ff summed over copies) of a micro-batch."""
    nesting = config.granularities
    shares = [width / nesting.d_ff for width in nesting.widths]
    kind = config.objective.kind
    if kind == "joint":
        return float(len(shares)), sum(shares)
    if kind == "sandwich":
        middle = max(shares[1:-1], default=0.0)
        copies = min(3, len(shares))
        return float(copies), shares[0] * (len(shares) > 1) + middle + shares[-1]
    if kind == "sampled":
        return 1.0, 1.0  # the widest that can be drawn
    given = config.objective.probabilities
    probabilities = (
        [given[name] for name in nesting.names] if given else [1 / len(shares)] * len(shares)
    )
    return 1.0, sum(p * share for p, share in zip(probabilities, shares, strict=True))


def estimate_memory(
    config: Config, vocab_size: int, zero_stage: int, data_size: int, chunk_tokens: int
) -> MemoryEstimate:
    """Memory of one rank in a training step; activations without checkpointing recomputation."""
    model, training = config.model, config.training
    tensor = config.parallel.tensor
    nesting = config.granularities
    count = count_parameters(model, vocab_size, nesting.uniform(nesting.largest, model.n_layers))
    local = (count.total - count.norms) // tensor + count.norms
    element = 2 if training.precision == "bf16" else 4
    master = 4 if training.precision == "bf16" or zero_stage else 0  # ZeRO copies fp32 weights too
    states = local * (8 + master)
    gradients = local * 4
    parts = {
        "weights": local * element // (data_size if zero_stage >= 3 else 1),
        "gradients": gradients // (data_size if zero_stage >= 2 else 1),
        "optimizer": states // (data_size if zero_stage >= 1 else 1),
    }
    zero = config.deepspeed.get("zero_optimization") or {}
    offloaded = 0
    for part, key in (("optimizer", "offload_optimizer"), ("weights", "offload_param")):
        if (zero.get(key) or {}).get("device", "none") != "none":
            offloaded += parts[part]
            parts[part] = 0
    return MemoryEstimate(
        weights_bytes=parts["weights"],
        gradients_bytes=parts["gradients"],
        optimizer_bytes=parts["optimizer"],
        activations_bytes=_activation_bytes(config, element),
        loss_bytes=_loss_bytes(config, vocab_size, chunk_tokens),
        offloaded_bytes=offloaded,
    )


def _activation_bytes(config: Config, element: int) -> int:
    model, training, tensor = config.model, config.training, config.parallel.tensor
    copies, width = passes_per_sequence(config)
    tokens = training.micro_batch_size * training.seq_len
    residual = copies * model.d_model
    if training.activation_checkpointing == "full":
        per_layer = residual
    else:
        norms = 4 * residual  # the inputs and outputs of both norms
        qkv = copies * (model.attention_width + 2 * model.kv_heads * model.head_dim) / tensor
        context = copies * model.attention_width / tensor
        vectors = 2 if model.ffn == "swiglu" else 1
        ffn = vectors * width * model.d_ff / tensor
        per_layer = norms + 2 * qkv + context + ffn
    return int(tokens * element * (per_layer * model.n_layers + 2 * residual))


def _loss_bytes(config: Config, vocab_size: int, chunk_tokens: int) -> int:
    copies, _ = passes_per_sequence(config)
    tokens = config.training.micro_batch_size * config.training.seq_len
    local_vocab = -(-vocab_size // config.parallel.tensor)
    # fp32 logits of all granularities, and one more where the operators are plain torch
    chunk = min(chunk_tokens, tokens) * (copies + 1) * local_vocab * 4
    head_gradient = local_vocab * config.model.d_model * 4
    if config.training.precision == "bf16":
        head_gradient += head_gradient // 2  # it is summed up in fp32, then rounded
    return int(chunk + head_gradient)
