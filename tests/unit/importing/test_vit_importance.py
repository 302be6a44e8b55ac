"""The order of a ViT's neurons: against transformers' activations, and in what it does to S."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.errors import UserError
from matformer_dist.importing.calibration_images import of_images, read_images
from matformer_dist.importing.checkpoint_config import read_config
from matformer_dist.importing.import_model import import_model
from matformer_dist.importing.importance import activation_weighted, magnitude
from matformer_dist.importing.options import ImportOptions
from matformer_dist.importing.vit_config import read_vit_config
from matformer_dist.importing.vit_weights import ViTWeights
from tests.unit.importing.vit_checkpoints import load, random_hf, save_hf, some_images, xl_logits

PREPARED = Preprocessing(12, 3, (0.5,) * 3, (0.5,) * 3)


def weights_of(directory: Path) -> ViTWeights:
    return ViTWeights(directory, read_vit_config(directory, read_config(directory)))


def write_images(directory: Path, count: int = 6, size: int = 14) -> Path:
    directory.mkdir(parents=True)
    generator = np.random.default_rng(4)
    for i in range(count):
        pixels = generator.integers(0, 256, (size, size + i, 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
    return directory


def test_activations_match_transformers(tmp_path: Path) -> None:
    """Of every layer: so the hidden states that reach it are right, too."""
    vit = random_hf()
    directory = save_hf(vit, tmp_path / "hf")
    images = some_images()
    seen: list[Tensor] = []
    for layer in vit.vit.layers:
        layer.mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        vit(images)
    source = weights_of(directory)
    calibration = of_images(source.model, images, source.embedding())
    for i, expected in enumerate(seen):
        actual = calibration.through(source.layer(i))
        torch.testing.assert_close(actual, expected.abs().mean(dim=(0, 1)), rtol=1e-5, atol=1e-6)
    assert len(seen) == 3


def test_the_magnitude_of_a_neuron_without_a_gate() -> None:
    w_in = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    w_out = torch.tensor([[0.0, 1.0], [6.0, 8.0]])
    assert magnitude(w_in, w_out).tolist() == [5, 10]


@pytest.mark.parametrize("calibrated", [False, True])
def test_every_layer_is_ordered_by_its_own_importance(tmp_path: Path, calibrated: bool) -> None:
    """And biases go with their neurons."""
    directory = save_hf(random_hf(), tmp_path / "hf")
    folder = write_images(tmp_path / "images")
    options = ImportOptions(calibration=[folder] if calibrated else ())
    import_model(directory, tmp_path / "run", options)
    run, source = load(tmp_path / "run"), weights_of(directory)
    embedding = {name: weight.detach() for name, weight in run.embedding.named_parameters()}
    calibration = of_images(run.model, read_images([folder], PREPARED, 128), embedding)
    orders = []
    for i, layer in enumerate(run.layers):
        weights = {name: weight.detach() for name, weight in layer.state_dict().items()}
        importance = magnitude(weights["ffn.w_in"], weights["ffn.w_out"])
        if calibrated:
            activations = calibration.through(weights)
            importance = activation_weighted(activations, weights["ffn.w_out"])
        assert (importance.diff() <= 1e-6).all() and importance[0] > 1.5 * importance[-1]
        before = source.layer(i)
        found = (weights["ffn.w_out"][:, None] == before["ffn.w_out"][None]).all(2).int().argmax(1)
        assert sorted(found.tolist()) == list(range(64))
        assert weights["ffn.b_in"].equal(before["ffn.b_in"][found])
        assert weights["ffn.w_in"].equal(before["ffn.w_in"][found])
        orders.append(found.tolist())
    assert orders[0] != orders[1]


USEFUL = 8  # neurons a layer


def vit_of_few_neurons() -> Any:
    """Of which the others do next to nothing: half have small weights, half never fire."""
    vit = random_hf()
    with torch.no_grad():
        for layer in vit.vit.layers:
            fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
            fc1.weight[USEFUL:36] *= 0.01
            fc1.bias[USEFUL:36] = 0
            fc1.bias[36:] = -100.0
            order = torch.randperm(64, generator=torch.Generator().manual_seed(7))
            for weight in (fc1.weight, fc1.bias):
                weight.copy_(weight[order].clone())
            fc2.weight.copy_(fc2.weight[:, order].clone())
    return vit


def test_s_is_nearly_xl_in_order_of_importance(tmp_path: Path) -> None:
    """With images: weights alone do not know that a neuron never fires."""
    directory = save_hf(vit_of_few_neurons(), tmp_path / "hf")
    folder = write_images(tmp_path / "images")
    images = read_images([folder], PREPARED, 128)
    errors = {}
    for name, options in {
        "none": ImportOptions(order="none"),
        "magnitude": ImportOptions(),
        "images": ImportOptions(calibration=[folder], calibration_images=4),
    }.items():
        import_model(directory, tmp_path / "runs" / name, options)
        vit = load(tmp_path / "runs" / name)
        nesting = vit.layers[0].ffn.nesting  # type: ignore[union-attr]
        with torch.no_grad():
            small = vit.logits(images, nesting.uniform(0, 3))  # type: ignore[operator, union-attr]
        errors[name] = float((small - xl_logits(tmp_path / "runs" / name, images)).abs().max())
    assert errors["images"] < 0.05 < 0.3 < min(errors["none"], errors["magnitude"]), errors


def test_images_are_found_wherever_they_may_lie(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "flat", 3)
    nested = write_images(tmp_path / "classes" / "a" / "b", 2).parents[1]
    (nested / "notes.txt").write_text("no image")
    assert len(read_images([folder, nested], PREPARED, 128)) == 5
    assert len(read_images([folder / "0.png"], PREPARED, 128)) == 1
    grey = Preprocessing(8, 1, (0.5,), (0.5,))
    assert read_images([Path("digits")], grey, 7).shape == (7, 1, 8, 8)
    every_other = read_images([folder, nested], PREPARED, 2)
    assert every_other[1].equal(PREPARED(Image.open(folder / "2.png")))
    for paths, count, says in [
        ([tmp_path / "nowhere"], 1, "nothing is there"),
        ([folder], 0, "--calibration-images 0 must be above 0"),
    ]:
        with pytest.raises(UserError, match=says):
            read_images(paths, PREPARED, count)
    (folder / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read the calibration image .*1\.png: 8 bytes of"):
        read_images([folder], PREPARED, 3)


def test_few_images_are_said(tmp_path: Path) -> None:
    directory = save_hf(random_hf(), tmp_path / "hf")
    folder = write_images(tmp_path / "images")
    imported = import_model(directory, tmp_path / "run", ImportOptions(calibration=[folder]))
    assert imported.order == "neurons ordered by what they add over 6 calibration images"
    assert any("were 6 calibration images, 128 were asked" in one for one in imported.notices)


def test_calibration_that_overflows_is_refused(tmp_path: Path) -> None:
    vit = random_hf()
    with torch.no_grad():
        vit.vit.layers[1].mlp.fc1.weight.fill_(3e38)
    directory = save_hf(vit, tmp_path / "hf")
    folder = write_images(tmp_path / "images")
    with pytest.raises(UserError, match=r"calibration images are not finite .*run these images"):
        import_model(directory, tmp_path / "run", ImportOptions(calibration=[folder]))
    assert not (tmp_path / "run").exists()
