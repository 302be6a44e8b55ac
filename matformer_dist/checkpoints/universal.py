"""A universal model's whole weights, read from a checkpoint on one machine without a GPU.

Whatever tensor-parallel degree and ZeRO stage it was trained with, weights, and Adam's moments
of them, come back whole and in canonical order: rings put together, vocabulary padding gone. They
are read one at a time, from files mapped into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from matformer_dist.checkpoints.deepspeed_files import MOMENTS, RankStates, rank_states
from matformer_dist.checkpoints.memory import FRESH, FreshMemory
from matformer_dist.checkpoints.universal_files import read_value
from matformer_dist.config_file import AnyModelConfig
from matformer_dist.errors import UserError
from matformer_dist.models.building import build_model
from matformer_dist.models.matformer import MatFormer
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.layout import REPLICATED, Partition
from matformer_dist.parallel.topology import TensorParallel
from matformer_dist.run_directory import Checkpoint

_UNSET = Initializer(seed=None)


@dataclass(frozen=True)
class UniversalModel:
    """A trained universal model on disk; `load_universal` opens one."""

    checkpoint: Checkpoint
    model: AnyModelConfig
    nesting: Nesting
    outputs: int
    ranks: list[RankStates]  # by tensor-parallel rank; none where the files hold whole weights
    whole: dict[str, nn.Parameter]  # shapes and partitions by MatFormer's names, without memory

    def weight(self, name: str, *, rows: int | None = None, memory: FreshMemory = FRESH) -> Tensor:
        """The whole fp32 weight `name` on the CPU; UserError where the checkpoint is cut short.

        rows: only the first of them, up to a width of the nesting in an FFN, are read. memory: what
        the result may lie in.
        """
        return self.value(name, "fp32", rows=rows, memory=memory)

    @torch.no_grad()  # DeepSpeed saves parameters
    def value(
        self, name: str, state: str, *, rows: int | None = None, memory: FreshMemory = FRESH
    ) -> Tensor:
        """The same of any of STATES of a weight."""
        shape = tuple(self.whole[name].shape)
        partition = self.partition(name)
        if not self.ranks:
            return read_value(self.checkpoint.path, name, state, torch.Size(shape))[:rows]
        if rows is not None and rows < shape[0]:
            shape, partition = (rows, *shape[1:]), partition.first(rows)
        local, ranks = partition.local_shape(shape, len(self.ranks)), len(self.ranks)
        if partition.dim is None or ranks == 1:
            return self._shard(name, state, 0, local, memory)
        whole = memory.take("whole", shape)
        for rank in range(ranks):
            partition.put(whole, self._shard(name, state, rank, local, memory), rank, ranks)
        return whole

    @torch.no_grad()
    def share(
        self, name: str, state: str, tensor: TensorParallel, *, memory: FreshMemory = FRESH
    ) -> Tensor:
        """What a rank of any tensor-parallel group stores of a state of a weight."""
        partition = self.partition(name)
        if tensor.size == len(self.ranks):
            local = partition.local_shape(self.whole[name].shape, tensor.size)
            return self._shard(name, state, tensor.rank, local, memory)
        value = self.value(name, state, memory=memory)
        return partition.deal(value, tensor.rank, tensor.size)

    def partition(self, name: str) -> Partition:
        return getattr(self.whole[name], "partition", REPLICATED)

    def _shard(
        self, name: str, state: str, rank: int, shape: tuple[int, ...], memory: FreshMemory
    ) -> Tensor:
        """The first values of what a rank of the checkpoint's group stored, as `shape`."""
        size, at = prod(shape), 0
        pieces = self.ranks[rank].pieces[state].get(name, [])
        if pieces and len(pieces[0]) >= size:
            return pieces[0][:size].view(shape)
        flat = memory.take("shard", (size,))
        for piece in pieces:
            part = piece[: size - at]
            flat[at : at + len(part)].copy_(part)
            at += len(part)
        if at < size:
            raise UserError(
                f"the checkpoint {self.checkpoint.path} holds {at} of the {size} values of {name} "
                f"({state}) on tensor-parallel rank {rank}; choose another"
            )
        return flat.view(shape)

    fresh = ()  # no weight is to be left out, see training/resharding.py

    @property
    def moments(self) -> tuple[str, ...]:
        """Adam's, where the checkpoint has them."""
        return MOMENTS if self.checkpoint.manifest.has_optimizer else ()

    @property
    def optimizer_steps(self) -> int:
        """Steps that the optimizer has made; those skipped are not among them."""
        manifest = self.checkpoint.manifest
        return self.ranks[0].step if self.ranks else manifest.step - manifest.skipped_steps

    def build(self) -> MatFormer:
        """The universal model in memory, fp32 on the CPU."""
        model = build_model(self.model, [self.nesting] * self.model.n_layers, self.outputs, _UNSET)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.weight(name))
        return model


def load_universal(checkpoint: Checkpoint) -> UniversalModel:
    """Open a checkpoint; UserError where its files are damaged."""
    manifest = checkpoint.manifest
    model, nesting, outputs = manifest.model, manifest.nesting, manifest.outputs
    layout = manifest.layout

    ranks = []
    if layout.files == "ranks":
        ranks = [
            rank_states(checkpoint.path, rank, layout, manifest.precision)
            for rank in range(layout.tensor)
        ]
    with torch.device("meta"):
        built = build_model(model, [nesting] * model.n_layers, outputs, _UNSET)
    whole = dict(built.named_parameters())
    return UniversalModel(checkpoint, model, nesting, outputs, ranks, whole)
