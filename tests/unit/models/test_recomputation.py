"""What a layer keeps for its backward pass, and what it computes twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.models.block import Block
from matformer_dist.models.recomputation import Again, made_again
from matformer_dist.models.rotation import Rotation
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.topology import SINGLE

POSITIONS, SEQUENCES, D = 16, (1, 2, 1, 2), 48
NESTING = Nesting.from_widths([16, 32, 64, 128])
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped-query": {"n_kv_heads": 2},
    "paper": {"ffn": "gelu", "norm": "layernorm"},
}


class LivingTensors(TorchDispatchMode):
    """Counts the bytes of what was made inside and still lives."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        self._given |= _storages((args, kwargs)).keys() - self._made.keys()
        result = func(*args, **kwargs)
        for cdata, made in _storages(result).items():
            if cdata not in self._given:
                self._made[cdata] = made
        return result

    def bytes(self) -> int:
        return sum(size for reference, size in self._made.values() if not reference.expired())


def _storages(tree: Any) -> dict[int, tuple[StorageWeakRef, int]]:
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {storage._cdata: (StorageWeakRef(storage), storage.nbytes()) for storage in storages}


class Layer:
    def __init__(self, variant: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = LanguageModelConfig(
            d_model=D, n_layers=1, n_heads=4, d_ff=128, max_seq_len=POSITIONS, **VARIANTS[variant]
        )
        self.block = Block("layer", self.model, NESTING, Initializer(seed=1), SINGLE).to(dtype)
        self.rotation = Rotation.of(torch.arange(POSITIONS), self.model)
        self.rows = [POSITIONS * count for count in SEQUENCES]
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(sum(self.rows), D, generator=generator).to(dtype).requires_grad_()

    def __call__(self, mode: str) -> Tensor:
        rest = (POSITIONS, self.rotation, self.rows, list(reversed(NESTING.widths)), 1, None)
        if mode == "full":
            y: Tensor = checkpoint(self.block, self.x, *rest, use_reentrant=False)
            return y
        return self.block(self.x, *rest, mode == "selective")

    def kept_bytes(self, mode: str) -> int:
        """Beside the layer's input and output."""
        with LivingTensors() as living:
            y = self(mode)
        kept = living.bytes() - y.untyped_storage().nbytes()
        y.sum().backward()
        del y
        self.x.grad = None
        for parameter in self.block.parameters():
            parameter.grad = None
        assert living.bytes() == 0, "all is freed"
        return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_keeps_products_alone(variant: str, dtype: torch.dtype) -> None:
    layer = Layer(variant, dtype)
    rows, model = sum(layer.rows), layer.model
    residual = rows * D  # behind attention
    qkv = rows * (model.attention_width + 2 * model.kv_heads * model.head_dim)
    context = rows * model.attention_width
    vectors = 2 if model.ffn == "swiglu" else 1
    ffn = vectors * sum(map(int.__mul__, layer.rows, reversed(NESTING.widths)))
    log_sums = rows * model.n_heads * 4  # of attention, in fp32
    expected = (residual + qkv + context + ffn) * dtype.itemsize + log_sums
    assert layer.kept_bytes("selective") == expected
    assert layer.kept_bytes("full") == 0
    # The norms' results, and queries and keys once more.
    turned = rows * (model.attention_width + model.kv_heads * model.head_dim)
    assert layer.kept_bytes("none") >= expected + (2 * residual + turned) * dtype.itemsize
    assert expected < 0.75 * layer.kept_bytes("none")


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_product_is_computed_twice(variant: str) -> None:
    layer, flops = Layer(variant), {}
    for mode in ("none", "selective", "full"):
        with FlopCounterMode(display=False) as counter:
            layer(mode).sum().backward()
        flops[mode] = counter.get_total_flops()
    assert flops["selective"] == flops["none"]
    assert flops["full"] == pytest.approx(flops["none"] * 4 / 3, rel=0.02)


def test_a_view_of_a_value_is_made_again_as_it_was() -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    made = []

    def make() -> Tensor:
        made.append(1)
        return x.detach().exp().transpose(0, 2)

    value = x.exp().transpose(0, 2)
    with made_again(Again(value, make)):
        y = (value[1:, :, 2] * value[1:, :, 2]).sum()
    (gradient,) = torch.autograd.grad(y, x)
    expected = torch.zeros_like(x)
    expected[2, :, 1:] = 2 * (2 * x.detach()[2, :, 1:]).exp()
    torch.testing.assert_close(gradient, expected)
    assert made
