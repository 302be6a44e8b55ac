from __future__ import annotations

import pytest

from matformer_dist.config import Sample
from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.counting import count_parameters, forward_flops
from matformer_dist.nesting import Nesting, Segment

VOCAB = 256_000
PAPER = [  # d_model, total parameters XL L M S, non-embedding XL L M S, in millions (table T4)
    (256, (78, 74, 72, 71), (12.6, 8.4, 6.3, 5.3)),
    (512, (180, 164, 157, 152), (50, 33.7, 25.3, 21.1)),
    (768, (310, 272, 253, 244), (113, 75, 56, 47)),
    (1024, (463, 397, 363, 346), (201, 134, 100, 84)),
    (1536, (850, 696, 620, 582), (453, 302, 227, 189)),
    (3072, (2600, 2000, 1700, 1500), (1810,)),
]


def paper_model(d_model: int) -> LanguageModelConfig:
    return LanguageModelConfig(
        d_model=d_model,
        n_layers=16,
        n_heads=16,
        d_ff=4 * d_model,
        ffn="gelu",
        norm="layernorm",
        tied_embeddings=True,
        max_seq_len=1024,
    )


@pytest.mark.parametrize(("d_model", "total", "non_embedding"), PAPER)
def test_parameter_counts_match_paper_table_4(
    d_model: int, total: tuple[float, ...], non_embedding: tuple[float, ...]
) -> None:
    model = paper_model(d_model)
    submodels = Nesting.from_fractions(model.d_ff, ["1/8", "1/4", "1/2", 1]).uniforms(16)
    counts = [count_parameters(model, VOCAB, submodel) for submodel in submodels]
    # The paper prints two to four digits; 2.6B's smaller granularities only two.
    relative = 0.03 if d_model == 3072 else 0.009
    assert [c.total / 1e6 for c in counts] == pytest.approx(total, rel=relative)
    printed = [c.non_embedding / 1e6 for c in counts][: len(non_embedding)]
    assert printed == pytest.approx(non_embedding, rel=0.013)


def test_joint_body_matches_paper_2_58_of_xl() -> None:
    """Sec. E.1: four granularities cost 4x attention + 1.875x FFN = 2.58x XL's weights' FLOPs."""
    model = paper_model(256)
    nesting = Nesting.from_fractions(model.d_ff, ["1/8", "1/4", "1/2", 1])
    xl, *_ = submodels = nesting.uniforms(16)
    # One position: the score products, which the paper leaves out, vanish.
    joint = forward_flops(model, VOCAB, [Segment(s, 1) for s in submodels], Sample(1, 1))
    alone = forward_flops(model, VOCAB, [Segment(xl, 1)], Sample(1, 1))
    assert joint.body / alone.body == pytest.approx(31 / 12, rel=2e-3)


def test_shared_tokens_save_the_first_layers_attention() -> None:
    model = paper_model(256)
    nesting = Nesting.from_fractions(model.d_ff, ["1/4", 1])
    segments = [Segment(submodel, 3) for submodel in nesting.uniforms(16)]
    plain = forward_flops(model, VOCAB, segments, Sample(64, 64))
    shared = forward_flops(model, VOCAB, segments, Sample(64, 64), shared_tokens=True)
    assert shared.ffn == plain.ffn and shared.head == plain.head
    assert shared.attention == plain.attention * 31 // 32


def test_parameter_count_matches_gated_grouped_query_by_hand() -> None:
    model = LanguageModelConfig(
        d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, kv_channels=24, d_ff=96, max_seq_len=8
    )
    nesting = Nesting.from_widths([32, 96])
    count = count_parameters(model, 100, nesting.parse("S:1,XL:1", 2))
    assert count.attention == 2 * (64 * 96 + 2 * 64 * 48 + 96 * 64)
    assert count.ffn == 3 * 64 * (32 + 96)
    assert count.norms == 5 * 64
    assert count.embedding == count.head == 6400
