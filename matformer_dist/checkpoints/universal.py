"""A universal model's whole weights, read from a checkpoint on one machine without a GPU.

Whatever tensor-parallel degree and ZeRO stage it was trained with, weights, and Adam's moments
of them, come back whole and in canonical order: rings put together, vocabulary padding gone. They
are read one at a time, from files mapped into memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from matformer_dist.checkpoints.deepspeed_files import RankStates, rank_states
from matformer_dist.checkpoints.universal_files import read_value
from matformer_dist.config import ModelConfig
from matformer_dist.errors import UserError
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.layout import REPLICATED, Partition
from matformer_dist.parallel.topology import SINGLE, TensorParallel
from matformer_dist.run_directory import Checkpoint

_UNSET = Initializer(seed=None)


@dataclass(frozen=True)
class UniversalModel:
    """A trained universal model on disk; `load_universal` opens one."""

    checkpoint: Checkpoint
    model: ModelConfig
    nesting: Nesting
    vocab_size: int
    ranks: list[RankStates]  # by tensor-parallel rank; none where the files hold whole weights
    whole: dict[str, nn.Parameter]  # shapes and partitions by MatLM's names, without memory
    local: dict[str, nn.Parameter]  # the same on one rank

    def weight(self, name: str) -> Tensor:
        """The whole fp32 weight `name` on the CPU; UserError where the checkpoint is cut short."""
        return self.value(name, "fp32")

    def value(self, name: str, state: str) -> Tensor:
        """The same of any of STATES of a weight."""
        if not self.ranks:
            return read_value(self.checkpoint.path, name, state, self.whole[name].shape)
        partition = self.partition(name)
        if partition.dim is None:
            return self._shard(name, state, 0)
        shards = [self._shard(name, state, rank) for rank in range(len(self.ranks))]
        return partition.join(shards, self.whole[name].shape[partition.dim])

    def share(self, name: str, state: str, tensor: TensorParallel) -> Tensor:
        """What a rank of any tensor-parallel group stores of a state of a weight."""
        if tensor.size == len(self.ranks):
            return self._shard(name, state, tensor.rank)
        return self.partition(name).deal(self.value(name, state), tensor.rank, tensor.size)

    def partition(self, name: str) -> Partition:
        return getattr(self.whole[name], "partition", REPLICATED)

    def _shard(self, name: str, state: str, rank: int) -> Tensor:
        shape = self.local[name].shape
        pieces = self.ranks[rank].pieces[state].get(name)
        flat = torch.cat(pieces) if pieces else torch.empty(0)
        if flat.numel() < shape.numel():
            raise UserError(
                f"the checkpoint {self.checkpoint.path} holds {flat.numel()} of the "
                f"{shape.numel()} values of {name} ({state}) on tensor-parallel rank {rank}; "
                "choose another"
            )
        return flat[: shape.numel()].view(shape)

    @property
    def optimizer_steps(self) -> int:
        """Steps that the optimizer has made; those skipped are not among them."""
        manifest = self.checkpoint.manifest
        return self.ranks[0].step if self.ranks else manifest.step - manifest.skipped_steps

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

    ranks = []
    if layout.files == "ranks":
        ranks = [
            rank_states(checkpoint.path, rank, layout, manifest.precision)
            for rank in range(layout.tensor)
        ]
    local = parameters(TensorParallel(0, layout.tensor))
    return UniversalModel(checkpoint, model, nesting, vocab_size, ranks, parameters(SINGLE), local)
