from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from matformer_dist.config_vision import VisionObjectiveConfig
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.mixing import SoftTargets
from matformer_dist.nesting import Segment
from tests.unit.models.small_models import CLASSES, LAYERS, NESTING, matvit, samples_of


def drawn(count: int = 400, **settings: Any) -> list[SoftTargets | None]:
    config = VisionObjectiveConfig(**settings)
    return [SoftTargets.draw(config, f"1:{step}:0") for step in range(count)]


def test_hard_targets_stay_hard() -> None:
    assert drawn() == [None] * 400
    assert set(drawn(label_smoothing=0.1)) == {SoftTargets(0.1)}


def test_draws_follow_the_settings_and_repeat() -> None:
    found = drawn(mixup=0.2, cutmix=1.0, mixing_probability=0.5, label_smoothing=0.1)
    assert found == drawn(mixup=0.2, cutmix=1.0, mixing_probability=0.5, label_smoothing=0.1)
    every = [one for one in found if one is not None]
    assert len(every) == 400 and {one.smoothing for one in every} == {0.1}
    mixed = [one for one in every if one.kept < 1]
    assert 160 < len(mixed) < 240
    boxes = [one for one in mixed if one.box is not None]
    assert 60 < len(boxes) < 140
    blends = [one.kept for one in mixed if one.box is None]
    near_ends = sum(min(kept, 1 - kept) < 0.1 for kept in blends)
    assert near_ends > len(blends) / 2  # Beta(0.2, 0.2)
    evenly = sum(min(one.kept, 1 - one.kept) < 0.1 for one in boxes)
    assert evenly < len(boxes) / 2  # Beta(1, 1)


def test_mixup_blends_each_image_with_the_one_from_the_other_end() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    mixed, kept = SoftTargets(kept=0.75).mix(images)
    assert kept == 0.75
    assert torch.equal(mixed[:, 0, 0, 0], torch.tensor([0.75, 1.25, 1.75, 2.25]))


@pytest.mark.parametrize("box", [(0.5, 0.5), (0.0, 0.99), (1.0, 0.0)])
def test_cutmix_counts_the_pixels_that_were_cut(box: tuple[float, float]) -> None:
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    mixed, kept = SoftTargets(kept=0.6, box=box).mix(images)
    assert kept == pytest.approx(1 - float(mixed[0, 0].mean()))
    assert kept == pytest.approx(float(mixed[1, 0].mean()))
    assert 0.4 < kept < 1
    assert torch.equal(images[:, 0, 0, 0], torch.arange(2.0))  # not changed in place


@pytest.mark.parametrize("soft", [SoftTargets(0.2), SoftTargets(0.1, 0.7), SoftTargets(0, 0.7)])
@pytest.mark.parametrize("shared", [False, True], ids=["per_sequence", "joint"])
def test_the_loss_is_that_to_soft_targets(soft: SoftTargets, shared: bool) -> None:
    """Of torch's own cross-entropy to probabilities, and its gradients."""
    model = matvit()
    images, labels = samples_of(model, 4)
    if soft.kept == 1:
        labels[1] = -100
    submodels = NESTING.uniforms(LAYERS)
    counts = (4, 4, 4, 4) if shared else (1, 0, 2, 1)
    segments = tuple(Segment(s, n) for s, n in zip(submodels, counts, strict=True))
    weights = (0.4, 0.3, 0.2, 0.1)
    zeros = (0.0,) * 4
    plan = Pass(segments, shared, weights, zeros, zeros, soft=soft)
    loss, statistics = model(images, labels, plan)
    mixed, kept = soft.mix(images)
    hot = F.one_hot(labels[:, 0].clamp(min=0), CLASSES).double()
    targets = kept * hot + (1 - kept) * hot.flip(0) if kept < 1 else hot
    targets = (1 - soft.smoothing) * targets + soft.smoothing / CLASSES
    expected, start, rows = torch.zeros((), dtype=torch.double), 0, []
    for submodel, count, weight in zip(submodels, counts, weights, strict=True):
        part = slice(0, 4) if shared else slice(start, start + count)
        start += count
        if not count:
            continue
        nll = F.cross_entropy(model.logits(mixed[part], submodel), targets[part], reduction="none")
        nll = nll * (labels[part, 0] != -100)
        rows.append(nll)
        expected = expected + weight * nll.sum() / int((labels != -100).sum())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(statistics[:, 0], torch.cat(rows).detach())
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    )
