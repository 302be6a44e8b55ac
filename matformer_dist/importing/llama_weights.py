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
within a head. Pickles are never read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.errors import UserError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32", "BF16", "F16"}  # fp32 holds all of these exactly
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_IGNORED = ".rotary_emb.inv_freq"  # buffers that old versions saved; they follow from the config


class LlamaWeights:
    """A checkpoint's weights on disk; only headers are read before a weight is asked for.

    UserError where files are missing, damaged, pickles, or hold other weights than `model` has.
    """

    def __init__(self, directory: Path, model: LanguageModelConfig, vocab_size: int) -> None:
        self.directory = directory
        self.model = model
        self._files = _files_by_weight(directory)
        self._check_layers()
        self._check(_shapes(model, vocab_size))

    def layer(self, i: int) -> dict[str, Tensor]:
        """fp32 weights of layer i, under the names they have in a Block."""
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        q, k, v = (self.read(f"{attention}.{letter}_proj.weight") for letter in "qkv")
        gate, up = self.read(f"{mlp}.gate_proj.weight"), self.read(f"{mlp}.up_proj.weight")
        return {
            "attention_norm.weight": self.read(f"model.layers.{i}.input_layernorm.weight"),
            "attention.w_qkv": _group(q, k, v, self.model),
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
        path = self.directory / self._files[name]
        try:
            with safe_open(path, framework="pt") as opened:
                weight: Tensor = opened.get_tensor(name).to(torch.float32)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {name} in {path} ({error}); download it again") from None
        if not weight.isfinite().all():
            raise UserError(
                f"{name} in {path} holds values that are not finite; the file is damaged, or the "
                "model's training had failed: choose another checkpoint"
            )
        return weight

    def _check_layers(self) -> None:
        parts = (name.split(".") for name in self._files if name.startswith("model.layers."))
        held = len({part[2] for part in parts if len(part) > 2})
        if held < self.model.n_layers:
            raise UserError(
                f"{self.directory} does not hold the weights that its config.json describes: "
                f"num_hidden_layers is {self.model.n_layers}, the files hold {held} layers; "
                "download it again, or choose another checkpoint"
            )

    def _check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Names, shapes and dtypes, from the files' headers."""
        held = {name for name in self._files if not name.endswith(_IGNORED)}
        if self.model.tied_embeddings and _HEAD in held:
            self._check_tied()
            held.remove(_HEAD)
        missing, strange = sorted(set(expected) - held), sorted(held - set(expected))
        if missing or strange:
            lists = [f"lacks {_some(missing)}"] * bool(missing)
            lists += [f"holds {_some(strange)}, which a Llama does not have"] * bool(strange)
            raise UserError(
                f"{self.directory} does not hold the weights that its config.json describes: it "
                f"{' and '.join(lists)}; download it again, or choose another checkpoint"
            )
        for file in sorted({self._files[name] for name in expected}):
            for name, shape, dtype in _header(self.directory / file):
                if name in expected and self._files[name] == file:
                    _check_header(self.directory / file, name, shape, dtype, expected[name])

    def _check_tied(self) -> None:
        """A head beside a tied embedding must be the same: else one of them would be lost."""
        if not self.read(_HEAD).equal(self.read(_EMBEDDING)):
            raise UserError(
                f"{self.directory}: config.json says tie_word_embeddings true, but {_HEAD} and "
                f"{_EMBEDDING} differ; set it to false there if the head is meant"
            )


def _shapes(model: LanguageModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Their names, and shapes, of every weight of a Llama."""
    D, F, heads = model.d_model, model.d_ff, model.attention_width
    kv = model.kv_heads * model.head_dim
    of_layer: dict[str, tuple[int, ...]] = {
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
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(model.n_layers)
        for name, shape in of_layer.items()
    }
    shapes |= {_EMBEDDING: (vocab_size, D), "model.norm.weight": (D,)}
    return shapes if model.tied_embeddings else {**shapes, _HEAD: (vocab_size, D)}


def _files_by_weight(directory: Path) -> dict[str, str]:
    """The file of every weight."""
    if (directory / _SINGLE).exists():
        return {name: _SINGLE for name, _, _ in _header(directory / _SINGLE)}
    if not (directory / _INDEX).exists():
        raise UserError(_without_safetensors(directory))
    try:
        files: dict[str, str] = json.loads((directory / _INDEX).read_text())["weight_map"]
        if not all(Path(file).name == file for file in files.values()):
            raise ValueError("a shard lies in another folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"cannot read {directory / _INDEX} ({type(error).__name__}: {error}); download it again"
        ) from None
    for file in sorted(set(files.values())):
        inside = {name for name, _, _ in _header(directory / file)}
        missing = sorted(name for name in files if files[name] == file and name not in inside)
        if missing:
            raise UserError(
                f"{directory / file} lacks {_some(missing)}, which {_INDEX} says it holds; "
                "download it again"
            )
    return files


def _without_safetensors(directory: Path) -> str:
    pickles = [
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern)
    ]
    if not pickles:
        return (
            f"{directory} holds neither {_SINGLE} nor {_INDEX}; give the folder of a Hugging Face "
            "checkpoint in safetensors"
        )
    return (
        f"{directory} holds its weights in {_some(sorted(pickles))}, pickles, which can run any "
        "code when they are read; only safetensors are imported. Where you trust them, convert "
        "them with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
    )


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of every tensor of a file."""
    try:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                part = opened.get_slice(name)
                yield name, tuple(part.get_shape()), part.get_dtype()
    except (OSError, UnicodeError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); download it again") from None


def _check_header(
    path: Path, name: str, shape: tuple[int, ...], dtype: str, expected: tuple[int, ...]
) -> None:
    if shape != expected:
        raise UserError(
            f"{name} in {path} is {list(shape)}, config.json makes it {list(expected)}; the two "
            "do not belong together: download them again"
        )
    if dtype not in _DTYPES:
        raise UserError(
            f"{name} in {path} is {dtype}, allowed are {', '.join(sorted(_DTYPES))}; choose a "
            "checkpoint that is not quantised"
        )


def _group(q: Tensor, k: Tensor, v: Tensor, model: LanguageModelConfig) -> Tensor:
    """q [K * G * h, D], k and v [K * h, D] -> w_qkv [K * (G + 2) * h, D]."""
    by_head = [part.unflatten(0, (model.kv_heads, -1)) for part in (q, k, v)]
    return torch.cat(by_head, dim=1).flatten(0, 1)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
