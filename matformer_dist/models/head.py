"""The head of a MatFormer: the output projection, and the losses over it.

Legend: N rows that this rank holds, R rows of all segments, D d_model, V outputs (tokens of the
vocabulary, or classes), T tensor-parallel ranks, B samples in flight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matformer_dist.config import ModelConfig
from matformer_dist.counting import HEAD_BIAS_COLUMNS, check_outputs
from matformer_dist.models.forward_pass import Pass
from matformer_dist.ops.multi_granularity_loss import multi_granularity_loss
from matformer_dist.ops.soft_targets import soft_target_correction
from matformer_dist.ops.vocab_shard import VocabShard
from matformer_dist.parallel.layers import Initializer, column_linear, copy_to_ranks, vocab_shard
from matformer_dist.parallel.layout import ROWS
from matformer_dist.parallel.topology import TensorParallel

IGNORED_TARGET = -100


class Head(nn.Module):
    """The output projection and the losses over it, vocabulary cut over T ranks.

    | operand | whole  | local                     |                                          |
    |---------|--------|---------------------------|------------------------------------------|
    | weight  | [V, D] | [ceil(V/T), D]            | rows, the last rank's padded             |
    | hidden  | [R, D] | the whole                 | backward: all-reduces its gradient       |
    |         |        | or cut rows, [R/T, D]     | gathered; backward: reduce-scatters it   |
    | logits  | [R, V] | a chunk's [c, ceil(V/T)]  | forward: an all-gather for each half of  |
    |         |        |                           | a chunk, of a few numbers a row          |

    Where embeddings are tied, it works on the embedding's weight, which the caller passes in. A
    bias [V] is cut as the weight is, and works as one more column of it, on rows of ones.
    """

    def __init__(
        self,
        model: ModelConfig,
        outputs: int,
        init: Initializer,
        tensor: TensorParallel,
        *,
        tied: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.tensor = tensor
        first, size = vocab_shard(outputs, tensor)
        check_outputs(outputs, tensor.size)  # of all ranks, so that all stop
        gather = tensor.start_gather if tensor.size > 1 else None
        self.shard = VocabShard(offset=first, size=size, gather=gather)
        self.outputs = outputs
        if tied:
            self.register_parameter("weight", None)
        else:
            self.weight = init.parameter(
                "head.weight", (outputs, model.d_model), model.init_std, ROWS, tensor
            )
        if bias:
            self.bias = init.parameter("head.bias", (outputs,), 0.0, ROWS, tensor)
        else:
            self.register_parameter("bias", None)

    def forward(
        self,
        hidden: Tensor,
        tied: Tensor | None,
        targets: Tensor,
        plan: Pass,
        kept: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """hidden [N, D], targets [b, predictions] -> total loss, statistics [B, 5]; see
        MatFormer.forward. kept: share of its own target where samples are mixed (see mixing.py);
        the loss of statistics is to the soft target then.
        """
        hidden, weight = self._operands(hidden, tied)
        s = targets.shape[1]
        rows = [segment.sequences * s for segment in plan.segments]
        flat = targets.flatten()
        valid = (flat != IGNORED_TARGET).sum().clamp(min=1)
        if plan.shared_tokens:
            flat = flat.repeat(len(rows))
        hidden = copy_to_ranks(hidden, self.tensor)
        scale = valid.reciprocal().to(torch.float32)
        out = multi_granularity_loss(
            hidden,
            weight,
            flat,
            rows=rows,
            ce_weights=plan.ce_weights,
            z_weights=plan.z_weights,
            kl_weights=plan.kl_weights,
            scale=scale,
            temperature=plan.temperature,
            shared_tokens=plan.shared_tokens,
            ignore_index=IGNORED_TARGET,
            vocab=self.shard,
        )
        counted = (flat != IGNORED_TARGET).to(out.nll.dtype)
        agrees = correct = torch.zeros_like(counted)
        if out.best is not None:
            best = out.best.view(len(rows), rows[0])
            agrees = counted * (best == best[:1]).flatten()
            correct = counted * (out.best == flat)
        total, nll = out.total, out.nll
        if plan.soft is not None:
            softened = self._softened(hidden, weight, targets, plan.soft.smoothing, kept)
            parts = zip(softened.split(rows), plan.ce_weights, strict=True)
            total = total + scale * sum(part.sum() * factor for part, factor in parts)
            nll = nll + softened.detach()
        columns = torch.stack([nll, agrees, out.kl, counted, correct], dim=1)
        return total, columns.view(-1, s, 5).sum(dim=1)

    def _softened(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, kept: float
    ) -> Tensor:
        """By how much a row's cross-entropy is more to its soft target than to its own [R]."""
        others = targets.flip(0).flatten() if kept < 1 else None
        return soft_target_correction(
            hidden,
            weight,
            targets.flatten(),
            others,
            share=kept,
            smoothing=smoothing,
            vocab_size=self.outputs,
            vocab=self.shard,
            ignore_index=IGNORED_TARGET,
        )

    def logits(self, hidden: Tensor, tied: Tensor | None) -> Tensor:
        """hidden [N, D] -> logits [R, V] of all rows and the whole vocabulary, on every rank."""
        hidden, weight = self._operands(hidden, tied)
        local = column_linear(hidden, weight, self.tensor)
        if self.tensor.size == 1:
            return local
        shards = self.tensor.gather(local)  # [T, R, V/T]
        return shards.transpose(0, 1).flatten(1)[:, : self.outputs]

    def _operands(self, hidden: Tensor, tied: Tensor | None) -> tuple[Tensor, Tensor]:
        """hidden [N, D'] and weight [V/T, D'], the bias among them."""
        weight = self.weight if tied is None else tied
        if self.bias is None:
            return hidden, weight
        ones = F.pad(hidden.new_ones(len(hidden), 1), (0, HEAD_BIAS_COLUMNS - 1))
        column = F.pad(self.bias[:, None], (0, HEAD_BIAS_COLUMNS - 1))
        return torch.cat([hidden, ones], dim=1), torch.cat([weight, column], dim=1)
