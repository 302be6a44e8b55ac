from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from matformer_dist.parallel.layers import Initializer, vocab_shard
from matformer_dist.parallel.layout import COLUMNS, REPLICATED, ROWS, Partition
from matformer_dist.parallel.topology import TensorParallel


def joined(partition: Partition, shards: list[Tensor], shape: torch.Size) -> Tensor:
    whole = torch.full(shape, torch.nan)
    for rank, shard in enumerate(shards):
        partition.put(whole, shard, rank, len(shards))
    return whole


def test_dealt_prefix_is_a_ranks_share_of_every_granularity() -> None:
    """Ring after ring: rank r's first m_i / T rows are its share of the first m_i neurons."""
    rings, ranks = (4, 4, 8, 16), 2
    full = torch.arange(32)
    shards = [Partition(0, rings).deal(full, rank, ranks) for rank in range(ranks)]
    assert shards[0].tolist() == [0, 1, 4, 5, 8, 9, 10, 11, *range(16, 24)]
    for width in (4, 8, 16, 32):
        held = torch.cat([shard[: width // ranks] for shard in shards])
        assert sorted(held.tolist()) == list(range(width))
        prefix = [shard[: width // ranks] for shard in shards]
        joint = joined(Partition(0, rings).first(width), prefix, torch.Size([width]))
        assert torch.equal(joint, full[:width].float())


@given(
    st.sampled_from([1, 2, 3, 4]), st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.integers(1, 3),
)  # fmt: skip
def test_joined_shards_match_the_whole(ranks: int, sizes: list[int], columns: int) -> None:
    rings = tuple(size * ranks for size in sizes)
    full = torch.randn(sum(rings), columns * ranks)
    for partition in (Partition(0, rings), ROWS, COLUMNS, REPLICATED):
        shards = [partition.deal(full, rank, ranks) for rank in range(ranks)]
        assert {partition.local_shape(full.shape, ranks)} == {tuple(s.shape) for s in shards}
        assert torch.equal(joined(partition, shards, full.shape), full)


@pytest.mark.parametrize(("vocab", "ranks"), [(7, 2), (7, 4), (8, 4), (9, 4), (5, 3)])
def test_vocabulary_of_any_size_is_padded_and_joined(vocab: int, ranks: int) -> None:
    full = torch.randn(vocab, 3)
    shards = [ROWS.deal(full, rank, ranks) for rank in range(ranks)]
    assert {ROWS.local_shape((vocab, 3), ranks)} == {tuple(shard.shape) for shard in shards}
    assert len({shard.shape for shard in shards}) == 1
    assert torch.equal(joined(ROWS, shards, full.shape), full)
    for rank, shard in enumerate(shards):
        first, size = vocab_shard(vocab, TensorParallel(rank, ranks))
        assert torch.equal(shard[:size], full[first : first + size])
        assert not shard[size:].any()


def test_initial_weights_match_at_every_tensor_parallel_size() -> None:
    init = Initializer(seed=3)
    partition = Partition(0, (4, 4, 8))
    whole = init.parameter("w", (16, 5), 0.02, partition, TensorParallel())
    for ranks in (2, 4):
        shards = [
            init.parameter("w", (16, 5), 0.02, partition, TensorParallel(rank, ranks)).detach()
            for rank in range(ranks)
        ]
        assert torch.equal(joined(partition, shards, whole.shape), whole)
    assert not torch.equal(init.parameter("v", (16, 5), 0.02, partition, TensorParallel()), whole)
    other = Initializer(seed=4).parameter("w", (16, 5), 0.02, partition, TensorParallel())
    assert not torch.equal(other, whole)
