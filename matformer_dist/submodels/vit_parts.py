"""A vision encoder's weights as transformers' and timm's ViTs hold them (models/vit_names.py).

Legend: H heads, h head size, D d_model, F d_ff, m width, s rows of an image.

Both have one FFN width: narrower layers are filled up with neurons of zeros, biases too, which add
nothing since gelu(0) = 0. Both learn positions: fixed ones, of sincos, are written out as values.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.errors import UserError
from matformer_dist.models.patches import sincos_positions
from matformer_dist.models.vit_names import ViTNames
from matformer_dist.submodels.formats import has_plain_heads
from matformer_dist.submodels.parts import Part, Parts, Source, layer_of, transposed_neurons


def check_heads(model: VisionModelConfig, program: str) -> None:
    """UserError where the program's ViT has no such attention."""
    if has_plain_heads(model):
        return
    raise UserError(
        f"a ViT of {program} has as many key-value heads as heads, together as wide as the model; "
        f"this model has n_heads {model.n_heads}, n_kv_heads {model.kv_heads} and heads of "
        f"{model.head_dim} in a d_model of {model.d_model}; extract with --format native"
    )


def vit_parts(source: Source, names: ViTNames, padded: int) -> Parts:
    """Their tensors of each of the parent's weights, all FFNs filled up to `padded` neurons."""
    parts: dict[str, list[Part]] = {}
    for name, whole in source.universal.whole.items():
        layer, shape = layer_of(name), tuple(whole.shape)
        if layer is None:
            parts[name] = list(_outer_parts(source.vision_model, names, name, shape))
            continue
        _, _, inner = name.split(".", 2)
        width = source.submodel.widths[layer]
        made = _layer_parts(source.vision_model, names, inner, shape, width, padded)
        prefix = names.layer.format(layer)
        parts[name] = [part._replace(name=prefix + part.name) for part in made]
    return parts


def _outer_parts(
    model: VisionModelConfig, names: ViTNames, name: str, shape: tuple[int, ...]
) -> Iterator[Part]:
    D = model.d_model
    theirs = {
        "embedding.weight": (D, model.channels, model.patch_size, model.patch_size),
        "embedding.class_token": (1, 1, D),
        "embedding.positions": (1, model.rows, D),
    }.get(name, shape)
    yield Part(names.outer[name], theirs, partial(_shaped, theirs))
    if name == "embedding.bias" and model.positions == "sincos":
        positions = (1, model.rows, D)  # of no weight: written beside one that there always is
        yield Part(names.outer["embedding.positions"], positions, partial(_fixed, model))


def _layer_parts(
    model: VisionModelConfig,
    names: ViTNames,
    inner: str,
    shape: tuple[int, ...],
    width: int,
    padded: int,
) -> Iterator[Part]:
    """The tensors of `inner`, a weight of a layer, by their names in it."""
    if inner in ("attention.w_qkv", "attention.b_qkv"):
        kind = "weight" if inner == "attention.w_qkv" else "bias"
        each = 3 // len(names.qkv)  # of queries, keys and values, those that a tensor holds
        size = (each * shape[0] // 3, *shape[1:])
        for i, module in enumerate(names.qkv):
            which = slice(i * each, (i + 1) * each)
            yield Part(f"{module}.{kind}", size, partial(_of_heads, which, model.n_heads))
    elif inner in ("ffn.w_in", "ffn.b_in"):
        yield Part(names.inner[inner], (padded, *shape[1:]), partial(_of_neurons, width))
    elif inner == "ffn.w_out":
        yield Part(names.inner[inner], (shape[1], padded), partial(transposed_neurons, width))
    else:
        yield Part(names.inner[inner], shape, partial(_shaped, shape))


def _shaped(shape: tuple[int, ...], weight: Tensor) -> Tensor:
    return weight.view(shape)


def _fixed(model: VisionModelConfig, _: Tensor) -> Tensor:
    """[1, s, D]"""
    return sincos_positions(model)[None]


def _of_heads(which: slice, heads: int, qkv: Tensor) -> Tensor:
    """w_qkv [H * 3 * h, D] or b_qkv [H * 3 * h] -> what is chosen of queries, keys and values."""
    by_head = qkv.unflatten(0, (heads, 3, -1))[:, which]
    return by_head.transpose(0, 1).flatten(0, 2)


def _of_neurons(width: int, of_inputs: Tensor) -> Tensor:
    """w_in [F, D] or b_in [F] -> those of the first m neurons."""
    return of_inputs[:width]
