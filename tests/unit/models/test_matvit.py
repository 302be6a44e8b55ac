from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from matformer_dist.config import Sample
from matformer_dist.config_vision import PRESETS, VisionModelConfig
from matformer_dist.counting import count_parameters, forward_flops
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matvit import MatViT
from matformer_dist.models.patches import pool, sincos_positions
from matformer_dist.nesting import Nesting, Segment, Submodel
from matformer_dist.parallel.sequence import RowExchange
from matformer_dist.parallel.topology import SINGLE, TensorParallel
from tests.unit.models.small_models import CLASSES, LAYERS, NESTING, VISION, matvit, samples_of


def plain_vit(model: MatViT, images: Tensor, width: int) -> Tensor:
    """Logits of the ViT of arXiv 2010.11929 with the first `width` neurons of every FFN, by torch's
    own layers.
    """
    config, weights = model.model, dict(model.named_parameters())
    D, P = config.d_model, config.patch_size
    kernel = weights["embedding.weight"].view(D, config.channels, P, P)
    x = F.conv2d(images, kernel, weights["embedding.bias"], stride=P).flatten(2).transpose(1, 2)
    if config.pooling == "token":
        x = torch.cat([weights["embedding.class_token"].expand(len(x), 1, -1), x], dim=1)
    fixed = dict(model.named_buffers()).get("embedding.fixed")
    x = x + (weights["embedding.positions"] if fixed is None else fixed)
    for i in range(config.n_layers):
        layer = torch.nn.TransformerEncoderLayer(
            D, config.n_heads, width, 0.0, "gelu", config.norm_eps, batch_first=True,
            norm_first=True,
        ).double()  # fmt: skip
        layer.load_state_dict(_of_layer(weights, f"layers.{i}.", config, width))
        x = layer(x)
    pooled = x[:, 0] if config.pooling == "token" else x.mean(dim=1)
    pooled = F.layer_norm(
        pooled, (D,), weights["final_norm.weight"], weights["final_norm.bias"], config.norm_eps
    )
    return F.linear(pooled, weights["head.weight"], weights["head.bias"])


def _of_layer(
    weights: dict[str, Any], prefix: str, config: VisionModelConfig, width: int
) -> dict[str, Tensor]:
    """Under torch's names: queries of all heads, then keys, then values."""

    def own(name: str) -> Tensor:
        return weights[prefix + name].detach()

    def by_kind(packed: Tensor) -> Tensor:
        return packed.unflatten(0, (config.n_heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    return {
        "self_attn.in_proj_weight": by_kind(own("attention.w_qkv")),
        "self_attn.in_proj_bias": by_kind(own("attention.b_qkv")),
        "self_attn.out_proj.weight": own("attention.w_out"),
        "self_attn.out_proj.bias": own("attention.b_out"),
        "linear1.weight": own("ffn.w_in")[:width],
        "linear1.bias": own("ffn.b_in")[:width],
        "linear2.weight": own("ffn.w_out")[:width].T,
        "linear2.bias": own("ffn.b_out"),
        "norm1.weight": own("attention_norm.weight"),
        "norm1.bias": own("attention_norm.bias"),
        "norm2.weight": own("ffn_norm.weight"),
        "norm2.bias": own("ffn_norm.bias"),
    }


@pytest.mark.parametrize("variant", VISION)
@pytest.mark.parametrize("granularity", [0, 2, 3])
def test_every_granularity_is_a_plain_vit(variant: str, granularity: int) -> None:
    model = matvit(**VISION[variant])
    images, _ = samples_of(model, 3)
    submodel = NESTING.uniform(granularity, LAYERS)
    expected = plain_vit(model, images, NESTING.widths[granularity])
    torch.testing.assert_close(model.logits(images, submodel), expected)


def test_every_patch_sees_every_other() -> None:
    model = matvit(pooling="mean")
    images, _ = samples_of(model, 1)
    rows = model.through_layers(model.embedding(images), 9, [Segment(_xl(), 1)], False)
    images[..., -1, -1] += 1  # of the last patch alone
    changed = model.through_layers(model.embedding(images), 9, [Segment(_xl(), 1)], False)
    assert ((rows - changed).abs().amax(dim=1) > 1e-9).all()


def _xl() -> Submodel:
    return NESTING.uniform(3, LAYERS)


def test_fixed_positions_tell_rows_and_columns_apart() -> None:
    model = VisionModelConfig(
        d_model=32, n_layers=1, n_heads=2, d_ff=16, image_size=12, patch_size=2, positions="sincos"
    )
    token, *patches = sincos_positions(model)
    grid = torch.stack(patches).view(6, 6, 32)
    assert not token.any()
    assert torch.equal(grid[0, :, :16], grid[5, :, :16])  # the first half says the column
    assert torch.equal(grid[:, 0, 16:], grid[:, 5, 16:])
    assert len(torch.unique(grid.flatten(0, 1), dim=0)) == 36
    column = torch.tensor([math.sin(3.0), math.cos(3.0)])
    assert torch.allclose(grid[2, 3, [0, 8]], column)


def test_fixed_positions_leave_rows_in_the_weights_dtype() -> None:
    """DeepSpeed casts weights, and leaves buffers in fp32."""
    model = matvit(positions="sincos").float()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    images, _ = samples_of(model, 2)
    assert model.embedding(images).dtype == torch.bfloat16
    assert model.logits(images, _xl()).isfinite().all()


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_cut_rows_are_pooled_as_exactly_as_whole_ones(pooling: str) -> None:
    """In fp64, and in bf16 rounded once: 1 / 9 itself is off by 2 in 1000 there."""
    model = matvit(pooling=pooling).model
    cut = TensorParallel(0, 1, rows=RowExchange(1, "of none"))
    x = torch.randn(40 * model.rows, 24, generator=torch.Generator().manual_seed(0)).double()
    exact = pool(x, model, SINGLE)
    torch.testing.assert_close(pool(x, model, cut), exact, rtol=1e-14, atol=1e-14)
    rounded = x.bfloat16()
    exact = pool(rounded.double(), model, SINGLE).bfloat16()
    assert torch.equal(pool(rounded, model, cut), exact)


def test_images_of_another_size_are_refused() -> None:
    model = matvit()
    with pytest.raises(ValueError, match=r"images are \[2, 3, 8, 8\]; this model reads \[b, 3, 6"):
        model.logits(torch.zeros(2, 3, 8, 8), _xl())


@pytest.mark.parametrize("shared", [False, True], ids=["per_sequence", "joint"])
def test_flop_counter_matches_the_formula(shared: bool) -> None:
    """But for the head, whose bias is a few columns more."""
    model = matvit(image_size=8)
    submodels = NESTING.uniforms(LAYERS)
    counts = (2, 2, 2, 2) if shared else (1, 2, 0, 3)
    segments = tuple(Segment(s, n) for s, n in zip(submodels, counts, strict=True))
    run = Pass(segments, shared, (0.25,) * 4, (0.0,) * 4, (0.0,) * 4)
    images, targets = samples_of(model, 2 if shared else 6)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = model.hidden(images, run.segments, run.shared_tokens)
        model.head(hidden, None, targets, run)[0].backward()
    expected = forward_flops(model.model, CLASSES, segments, Sample(17, 1), shared_tokens=shared)
    body = counter.get_total_flops() - _head_flops(model, sum(counts))
    # Images need no gradient, so their patches have no dX.
    assert body == 3 * expected.body + 2 * expected.embedding


def _head_flops(model: MatViT, rows: int) -> int:
    return 3 * 2 * rows * CLASSES * (model.model.d_model + 8)


def test_presets_are_those_of_their_papers() -> None:
    """Parameters as timm 1.0 counts them with 1000 classes, in millions."""
    millions = {"Ti/16": 5.717, "S/16": 22.051, "B/16": 86.568, "L/16": 304.327}
    for name, expected in millions.items():
        model = VisionModelConfig.model_validate({"preset": name})
        xl = Nesting.from_widths([model.d_ff]).uniform(0, model.n_layers)
        assert count_parameters(model, 1000, xl).total / 1e6 == pytest.approx(expected, abs=1e-3)
    assert {*millions, "tiny"} == set(PRESETS)
