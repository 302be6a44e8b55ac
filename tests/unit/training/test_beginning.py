"""What a run begins with that takes the weights of another one (checkpoint.initial)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from matformer_dist.config_file import load_config
from matformer_dist.errors import UserError
from matformer_dist.models.building import build_model
from matformer_dist.models.matformer import MatFormer
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.layout import REPLICATED
from matformer_dist.parallel.topology import TensorParallel
from matformer_dist.run_directory import Manifest, find_checkpoint
from matformer_dist.training.beginning import Beginning, begin_from, resized_positions
from tests.unit.submodels.synthetic_run import model_config, random_model, write_run
from tests.unit.submodels.synthetic_vision_run import random_vit, vision_config, write_vision_run
from tests.with_timm import import_timm


def beginning(run: Path, *overrides: str, **manifest: Any) -> tuple[Beginning, MatFormer]:
    """Of a run with other settings, and a model of that, whole and as it is initialised."""
    checkpoint, config = find_checkpoint(run), load_config(run / "config.yaml", overrides)
    now = checkpoint.manifest.model_copy(
        update={"model": config.model, "nesting": config.granularities, **manifest}
    )
    found = begin_from(checkpoint, config, Manifest.model_validate(now.model_dump()))
    nestings = [config.granularities] * config.model.n_layers
    return found, build_model(config.model, nestings, now.outputs, Initializer(seed=9))


@pytest.mark.parametrize("task", ["language", "vision"])
def test_weights_are_the_other_runs_dealt_anew(task: str, tmp_path: Path) -> None:
    """From two ranks to four, and to another nesting over the same neurons."""
    if task == "language":
        before: MatFormer = random_model(model_config())
        write_run(tmp_path, before, tensor=2)  # type: ignore[arg-type]  # of that task
    else:
        before = random_vit(vision_config())
        write_vision_run(tmp_path, before, tensor=2)  # type: ignore[arg-type]
    found, now = beginning(tmp_path, "nesting.widths=[24,64]")
    assert not found.fresh and not found.notices
    assert not found.moments and found.optimizer_steps == 0
    weights, partitions = dict(before.named_parameters()), dict(now.named_parameters())
    assert weights.keys() == partitions.keys()
    for name, weight in weights.items():
        for rank in range(4):
            share = found.share(name, "fp32", TensorParallel(rank, 4)).clone()
            partition = getattr(partitions[name], "partition", REPLICATED)
            assert torch.equal(share, partition.deal(weight, rank, 4)), (name, rank)


def test_classes_of_other_names_get_a_fresh_head(tmp_path: Path) -> None:
    write_vision_run(tmp_path, random_vit(vision_config()))
    found, _ = beginning(tmp_path, labels_sha256="0" * 64, outputs=9)
    assert found.fresh == {"head.weight", "head.bias"}
    (notice,) = found.notices
    assert "begins anew: the 9 classes" in notice and "the 5 that the weights were" in notice
    assert found.whole["head.weight"].shape == (9, 32)


@pytest.mark.parametrize("grid", [2, 7])
@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_positions_of_another_image_size_are_those_of_timm(
    pooling: str, grid: int, tmp_path: Path
) -> None:
    timm = import_timm()
    vit = random_vit(vision_config(pooling=pooling))
    write_vision_run(tmp_path, vit)
    found, _ = beginning(tmp_path, f"model.image_size={4 * grid}")
    positions = dict(vit.named_parameters())["embedding.positions"].detach()
    share = found.share("embedding.positions", "fp32", TensorParallel(0, 1))
    before = f"{vit.model.grid} x {vit.model.grid}"
    assert found.notices == (
        f"learned positions of {before} patches are interpolated for {grid} x {grid}",
    )
    expected = timm.layers.resample_abs_pos_embed(
        positions[None], [grid, grid], num_prefix_tokens=int(pooling == "token")
    )[0]
    assert expected.shape == (grid**2 + (pooling == "token"), 32)
    torch.testing.assert_close(share, expected)
    assert torch.equal(resized_positions(positions, 3)[-9:], positions[-9:])  # of the same size


def test_another_model_is_refused(tmp_path: Path) -> None:
    write_vision_run(tmp_path / "v", random_vit(vision_config()))
    write_run(tmp_path / "l", random_model(model_config()))
    for run, override, says in (
        ("v", "model.pooling=mean", "model.pooling"),
        ("v", "model.patch_size=2", "model.patch_size"),
        ("l", "model.rope_theta=5", "model.rope_theta"),
    ):
        with pytest.raises(UserError, match=says):
            beginning(tmp_path / run, override)
    with pytest.raises(UserError, match=r"^checkpoint.initial .* is of task: language, this run"):
        beginning(tmp_path / "l", model=vision_config())
    with pytest.raises(UserError, match="the tokenizer"):
        beginning(tmp_path / "l", labels_sha256="0" * 64)
