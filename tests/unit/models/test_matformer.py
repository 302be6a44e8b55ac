"""What holds for the models of every task."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from matformer_dist.counting import count_parameters
from matformer_dist.models.building import build_model
from matformer_dist.models.forward_pass import Pass
from matformer_dist.nesting import Segment
from matformer_dist.parallel.layers import Initializer
from tests.unit.models.small_models import (
    LANGUAGE,
    LAYERS,
    NESTING,
    VISION,
    logits_of,
    loss_and_gradients,
    model_of,
    plan,
    samples_of,
)

VARIANTS = [*LANGUAGE, *VISION]


@pytest.mark.parametrize("variant", VARIANTS)
def test_joint_pass_matches_separate_passes(variant: str) -> None:
    """Sharing rows, the first attention and every GEMM changes neither loss nor gradients."""
    model = model_of(variant)
    samples = samples_of(model, 2)
    submodels = NESTING.uniforms(LAYERS)
    weights = [0.4, 0.3, 0.2, 0.1]
    joint = plan([Segment(s, 2) for s in submodels], True, weights)
    loss, gradients = loss_and_gradients(model, samples, joint)
    total, sums = torch.zeros((), dtype=torch.double), [torch.zeros_like(g) for g in gradients]
    for submodel, weight in zip(submodels, weights, strict=True):
        alone = plan([Segment(submodel, 2)], False, [weight])
        part, part_gradients = loss_and_gradients(model, samples, alone)
        total += part
        sums = [a + b for a, b in zip(sums, part_gradients, strict=True)]
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(gradients, sums)


@pytest.mark.parametrize("variant", ["llama", "vit"])
def test_per_sequence_pass_matches_separate_passes(variant: str) -> None:
    model = model_of(variant)
    inputs, targets = samples_of(model, 6)
    segments = [Segment(s, n) for s, n in zip(NESTING.uniforms(LAYERS), (1, 0, 3, 2), strict=True)]
    loss, statistics = model(inputs, targets, plan(segments, False, [1.0] * 4))
    start, total = 0, 0.0
    for segment in segments:
        rows = slice(start, start + segment.sequences)
        start += segment.sequences
        if segment.sequences:
            alone = plan([Segment(segment.submodel, segment.sequences)], False, [1.0])
            _, expected = model(inputs[rows], targets[rows], alone)
            torch.testing.assert_close(statistics[rows], expected)
            total += float(expected[:, 0].sum())
    assert len(statistics) == start
    assert float(loss.detach()) == pytest.approx(total / targets.numel())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("notation", ["S", "M", "XL", "S:1,L:1,XL:1", "XL:1,S:2"])
def test_submodel_in_place_matches_a_model_of_that_width(variant: str, notation: str) -> None:
    model = model_of(variant)
    inputs, _ = samples_of(model, 2)
    submodel = NESTING.parse(notation, LAYERS)
    nestings = [NESTING.truncate(i) for i in submodel.granularities]
    small = build_model(model.model, nestings, model.outputs, Initializer(None)).double()
    whole = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.copy_(whole[name][: len(parameter)])
    expected = logits_of(model, inputs, submodel)
    torch.testing.assert_close(logits_of(small, inputs, submodel), expected)
    count = count_parameters(model.model, model.outputs, submodel)
    assert sum(p.numel() for p in small.parameters()) == count.total


@pytest.mark.parametrize("variant", ["llama", "vit"])
def test_statistics_match_logits(variant: str) -> None:
    model = model_of(variant)
    inputs, targets = samples_of(model, 12)
    submodels = [NESTING.parse(text, LAYERS) for text in ("XL", "S", "XL:1,S:1,M:1")]
    with torch.no_grad():
        logs = [logits_of(model, inputs, submodel).log_softmax(-1) for submodel in submodels]
        targets = targets.clone()
        targets[4:, ::2] = logs[1].argmax(-1)[4:, ::2]  # else hardly any is correct
        targets[0, :4] = -100
        _, statistics = model(inputs, targets, Pass.evaluation(submodels, 12))
    valid = targets != -100
    for found, log in zip(statistics.split(12), logs, strict=True):
        nll = -log.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        agrees = log.argmax(-1) == logs[0].argmax(-1)
        kl = (logs[0].exp() * (logs[0] - log)).sum(-1)
        correct = log.argmax(-1) == targets
        expected = [(value * valid).sum(dim=1) for value in (nll, agrees, kl, valid, correct)]
        torch.testing.assert_close(found, torch.stack([e.double() for e in expected], dim=1))


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_checkpointing_changes_no_gradient(
    variant: str, mode: Literal["selective", "full"]
) -> None:
    model = model_of(variant)
    samples = samples_of(model, 2)
    joint = plan([Segment(s, 2) for s in NESTING.uniforms(LAYERS)], True, [0.25] * 4)
    loss, gradients = loss_and_gradients(model, samples, joint)
    model.activation_checkpointing = mode
    again, recomputed = loss_and_gradients(model, samples, joint)
    assert torch.equal(loss, again)
    torch.testing.assert_close(gradients, recomputed, rtol=0, atol=0)
