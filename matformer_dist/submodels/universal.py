"""A universal model's whole weights, read from a checkpoint on one machine without a GPU.

Whatever tensor-parallel degree and ZeRO stage it was trained with, weights come back whole and
in canonical order: rings put together, vocabulary padding gone. They are read one at a time,
from files mapped into memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from matformer_dist.config import ModelConfig
from matformer_dist.errors import UserError
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.layout import REPLICATED, Partition
from matformer_dist.parallel.topology import SINGLE, TensorParallel
from matformer_dist.run_directory import Checkpoint
from matformer_dist.submodels.deepspeed_files import Pieces, rank_pieces

_UNSET = Initializer(seed=None)


@dataclass(frozen=True)
class UniversalModel:
    """A trained universal model on disk; `load_universal` opens one."""

    checkpoint: Checkpoint
    model: ModelConfig
    nesting: Nesting
    vocab_size: int
    ranks: list[Pieces]  # by tensor-parallel rank
    whole: dict[str, nn.Parameter]  # shapes and partitions by MatLM's names, without memory
    local: dict[str, nn.Parameter]  # the same on one rank

    def weight(self, name: str) -> Tensor:
        """The whole fp32 weight `name` on the CPU; UserError where the checkpoint is cut short."""
        parameter = self.whole[name]
        partition: Partition = getattr(parameter, "partition", REPLICATED)
        if partition.dim is None:
            return self._shard(name, 0)
        shards = [self._shard(name, rank) for rank in range(len(self.ranks))]
        return partition.join(shards, parameter.shape[partition.dim])

    def _shard(self, name: str, rank: int) -> Tensor:
        shape = self.local[name].shape
        pieces = self.ranks[rank].get(name)
        flat = torch.cat(pieces) if pieces else torch.empty(0)
        if flat.numel() < shape.numel():
            raise UserError(
                f"the checkpoint {self.checkpoint.path} holds {flat.numel()} of the "
                f"{shape.numel()} values of {name} on tensor-parallel rank {rank}; choose another"
            )
        return flat[: shape.numel()].view(shape)

    def build(self) -> MatLM:
        """The universal model in memory, fp32 on the CPU."""
        model = MatLM(
            self.model, [self.nesting] * self.model.n_layers, self.vocab_size, _UNSET, SINGLE
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.weight(name))
        return model


def load_universal(checkpoint: Checkpoint) -> UniversalModel:
    """Open a checkpoint; UserError where its files are damaged."""
    manifest = checkpoint.manifest
    model, nesting, vocab_size = manifest.model, manifest.nesting, manifest.vocab_size
    layout = manifest.layout

    def parameters(tensor: TensorParallel) -> dict[str, nn.Parameter]:
        with torch.device("meta"):
            layers = [nesting] * model.n_layers
            return dict(MatLM(model, layers, vocab_size, _UNSET, tensor).named_parameters())

    ranks = [
        rank_pieces(
            checkpoint.path,
            rank,
            zero_stage=layout.zero_stage,
            data_ranks=layout.data,
            precision=manifest.precision,
        )
        for rank in range(layout.tensor)
    ]
    local = parameters(TensorParallel(0, layout.tensor))
    return UniversalModel(checkpoint, model, nesting, vocab_size, ranks, parameters(SINGLE), local)
