"""The weights of a Llama-architecture checkpoint, read as MatLM's, a tensor at a time.

Legend: K key-value heads, G query heads per key-value head, h head size, D d_model, F d_ff,
V vocabulary.

| theirs, in safetensors                   | ours                                             |
|------------------------------------------|--------------------------------------------------|
| q [K * G * h, D], k and v [K * h, D]     | w_qkv [K * (G + 2) * h, D], a key-value head's   |
|                                          | queries, key and value side by side              |
| gate and up [F, D]                       | w_in [F, 2 * D], a neuron to a row               |
| down [D, F]                              | w_out [F, D], transposed                         |
| o, norms, embedding, head                | as they are                                      |

The inverse is submodels/transformers_format.py. Rotary pairs are laid out alike, so no row moves
within a head.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.errors import UserError
from matformer_dist.importing.checkpoint_weights import CheckpointWeights, Kind, Shape, by_head

_KIND = Kind(
    "a Llama",
    "num_hidden_layers",
    "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)",
)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_IGNORED = ".rotary_emb.inv_freq"  # buffers that old versions saved; they follow from the config


class LlamaWeights:
    """A checkpoint's weights on disk; only headers are read before a weight is asked for.

    UserError where files are missing, damaged, pickles, or hold other weights than `model` has.
    """

    def __init__(self, directory: Path, model: LanguageModelConfig, vocab_size: int) -> None:
        self.model = model
        self._weights = CheckpointWeights(directory, _KIND)
        self._weights.check_layers("model.layers.", model.n_layers)
        unused = {name for name in self._weights.names if name.endswith(_IGNORED)}
        if model.tied_embeddings and _HEAD in self._weights.names:
            self._check_tied()
            unused.add(_HEAD)
        self._weights.check(_shapes(model, vocab_size), unused)

    def layer(self, i: int) -> dict[str, Tensor]:
        """fp32 weights of layer i, under the names they have in a Block."""
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        q, k, v = (self.read(f"{attention}.{letter}_proj.weight") for letter in "qkv")
        gate, up = self.read(f"{mlp}.gate_proj.weight"), self.read(f"{mlp}.up_proj.weight")
        return {
            "attention_norm.weight": self.read(f"model.layers.{i}.input_layernorm.weight"),
            "attention.w_qkv": by_head(q, k, v, self.model.kv_heads),
            "attention.w_out": self.read(f"{attention}.o_proj.weight"),
            "ffn_norm.weight": self.read(f"model.layers.{i}.post_attention_layernorm.weight"),
            "ffn.w_in": torch.cat([gate, up], dim=1),
            "ffn.w_out": self.read(f"{mlp}.down_proj.weight").T.contiguous(),
        }

    def embedding(self) -> Tensor:
        """[V, D]"""
        return self.read(_EMBEDDING)

    def final_norm(self) -> Tensor:
        """[D]"""
        return self.read("model.norm.weight")

    def head(self) -> Tensor:
        """[V, D], where it is not tied to the embedding."""
        return self.read(_HEAD)

    def read(self, name: str) -> Tensor:
        """One of their weights, in fp32; UserError where values are not finite."""
        return self._weights.read(name)

    def _check_tied(self) -> None:
        """A head beside a tied embedding must be the same: else one of them would be lost."""
        if not self.read(_HEAD).equal(self.read(_EMBEDDING)):
            raise UserError(
                f"{self._weights.directory}: config.json says tie_word_embeddings true, but "
                f"{_HEAD} and {_EMBEDDING} differ; set it to false there if the head is meant"
            )


def _shapes(model: LanguageModelConfig, vocab_size: int) -> dict[str, Shape]:
    """Their names, and shapes, of every weight of a Llama."""
    D, F, heads = model.d_model, model.d_ff, model.attention_width
    kv = model.kv_heads * model.head_dim
    of_layer: dict[str, Shape] = {
        "input_layernorm": (D,),
        "self_attn.q_proj": (heads, D),
        "self_attn.k_proj": (kv, D),
        "self_attn.v_proj": (kv, D),
        "self_attn.o_proj": (D, heads),
        "post_attention_layernorm": (D,),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    shapes: dict[str, Shape] = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(model.n_layers)
        for name, shape in of_layer.items()
    }
    shapes |= {_EMBEDDING: (vocab_size, D), "model.norm.weight": (D,)}
    return shapes if model.tied_embeddings else {**shapes, _HEAD: (vocab_size, D)}
