"""Llama with a width of its own in every layer, for transformers.

Made for the exports of matformer_dist: every layer has attention and an FFN. Engines such as vLLM
have a DeciLMForCausalLM of their own.
"""

from __future__ import annotations

import copy

from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from .configuration_nemotron_nas import NemotronNasConfig


class DeciLMForCausalLM(LlamaForCausalLM):
    config_class = NemotronNasConfig

    def __init__(self, config: NemotronNasConfig) -> None:
        super().__init__(config)
        for layer, block in zip(self.model.layers, config.block_configs, strict=True):
            described = copy.copy(config)
            described.intermediate_size = block.ffn.intermediate_size
            layer.mlp = LlamaMLP(described)
        self.post_init()
