"""MatLM: a nested decoder-only language model, all granularities of a batch in one pass.

Legend: b sequences of tokens, s positions, D d_model, V vocabulary; see matformer.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.models.block import norm
from matformer_dist.models.cache import KeyValueCache
from matformer_dist.models.head import Head
from matformer_dist.models.matformer import MatFormer
from matformer_dist.models.rotation import Rotation
from matformer_dist.nesting import Nesting, Segment, Submodel
from matformer_dist.parallel.layers import Initializer, VocabParallelEmbedding
from matformer_dist.parallel.topology import SINGLE, TensorParallel


class MatLM(MatFormer):
    """Inputs and targets are tokens [b, s]; every position is a prediction."""

    model: LanguageModelConfig
    embedding: VocabParallelEmbedding

    def __init__(
        self,
        model: LanguageModelConfig,
        nestings: Sequence[Nesting],
        vocab_size: int,
        init: Initializer,
        tensor: TensorParallel = SINGLE,
    ) -> None:
        embedding = VocabParallelEmbedding(
            "embedding", vocab_size, model.d_model, model.init_std, init, tensor
        )
        head = Head(model, vocab_size, init, tensor, tied=model.tied_embeddings, bias=False)
        super().__init__(model, nestings, embedding, norm(model, tensor), head, init, tensor)

    @property
    def vocab_size(self) -> int:
        return self.outputs

    @property
    def tied_weight(self) -> Tensor | None:
        return self.embedding.weight if self.model.tied_embeddings else None

    def hidden(
        self,
        inputs: Tensor,
        segments: Sequence[Segment],
        shared_tokens: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """tokens [b, s] -> final hidden rows [N, D], segment by segment.

        With a cache, tokens follow what it holds of each sequence, and it holds them afterwards.
        """
        s = inputs.shape[1]
        if cache is None:
            kept = None
            rotation = Rotation.of(torch.arange(s, device=inputs.device), self.model)
        else:
            kept = (cache, cache.begin(s))
            rotation = cache.rotation.at(kept[1].positions)
        x = self.embedding(inputs.flatten())
        x = self.through_layers(x, s, segments, shared_tokens, rotation, kept)
        if cache is not None:
            cache.end(s)
        return self.final_norm(x)

    def logits(
        self,
        tokens: Tensor,
        submodel: Submodel,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """tokens [b, s] -> next-token logits [b, s, V] of one submodel."""
        hidden = self.hidden(tokens, [Segment(submodel, tokens.shape[0])], cache=cache)
        return self.head.logits(hidden, self.tied_weight).view(*tokens.shape, -1)

    def new_cache(self, sequences: int, capacity: int) -> KeyValueCache:
        """An empty key-value cache for `capacity` positions of `sequences`."""
        weight = self.embedding.weight
        kv_heads = self.model.kv_heads // self.tensor.size
        shape = (sequences, kv_heads, capacity, self.model.head_dim)
        # Zeros: whatever else lay there, not-a-numbers too, would be weighed by the mask's 0.
        keys, values = ([weight.new_zeros(shape) for _ in self.layers] for _ in range(2))
        rotation = Rotation.of(torch.arange(capacity, device=weight.device), self.model)
        return KeyValueCache(keys, values, [0] * sequences, rotation)
