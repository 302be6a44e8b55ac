"""ViTs of transformers that MatViT cannot hold, and options that do not fit: one message each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from matformer_dist.errors import UserError
from matformer_dist.importing.import_model import import_model
from matformer_dist.importing.options import ImportOptions
from tests.unit.importing.checkpoints import edit_config, random_llama, save
from tests.unit.importing.vit_checkpoints import random_hf, save_hf, transformers

SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(random_hf(), tmp_path_factory.mktemp("vit") / "hf", "1GB")


def refused(checkpoint: Path, options: ImportOptions | None = None) -> str:
    run = checkpoint.with_name("run")
    with pytest.raises(UserError) as error:
        import_model(checkpoint, run, options or ImportOptions())
    assert not run.exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "dinov2"}, "model_type is 'dinov2', allowed is 'vit'"),
        ({"model_type": "deit"}, "model_type is 'deit', allowed is 'vit'"),
        (
            {"architectures": ["ViTForMaskedImageModeling"]},
            "allowed is ['ViTForImageClassification'] or ['ViTModel']",
        ),
        ({"hidden_size": ...}, "it does not set hidden_size"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new', allowed is 'gelu'"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu', allowed is 'gelu'"),
        ({"qkv_bias": False}, "qkv_bias is False, allowed is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"image_size": [12, 16]}, "image_size is [12, 16], allowed is a square"),
        ({"image_size": 14}, "image_size 14 must be a multiple of patch_size 4"),
        ({"num_attention_heads": 5}, "hidden_size 32 over num_attention_heads 5"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0"),
        ({"id2label": {"0": "ant"}}, "is [5], config.json makes it [1]; the two do not"),
        (
            {"id2label": {"one": "ant", "2": "b", "3": "c", "4": "d", "5": "e"}},
            "which is neither a list of texts nor an object by number",
        ),
    ],
)
def test_what_matvit_does_not_compute_is_named(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    directory = tmp_path / "hf"
    shutil.copytree(checkpoint, directory)
    edit_config(directory, **changes)
    assert says in refused(directory)


@pytest.mark.parametrize(
    ("kind", "mean", "says"),
    [
        ({"num_channels": 4}, [0.5] * 4, "images have 1 channel (grey) or 3 (RGB), not 4"),
        ({"num_channels": 1}, [0.5] * 3, "data.mean has 3 values"),
        ({"id2label": {0: "ant"}}, [0.5] * 3, "config.json holds the one class 'ant'; a classif"),
    ],
)
def test_images_and_classes_that_runs_do_not_have_are_refused(
    tmp_path: Path, kind: dict[str, Any], mean: list[float], says: str
) -> None:
    directory = save_hf(random_hf(**kind), tmp_path / "hf", image_mean=mean, image_std=mean)
    assert says in refused(directory)


def test_all_of_it_is_named_at_once(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    edit_config(tmp_path / "hf", hidden_act="relu", qkv_bias=False, patch_size=[4, 2])
    message = refused(tmp_path / "hf")
    assert "hidden_act is 'relu', allowed is 'gelu'; qkv_bias is False" in message
    assert "patch_size is [4, 2], allowed is a square. Its weights would" in message


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    from matformer_dist.importing.vit_config import read_vit_config

    theirs = transformers.ViTConfig()
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = {"model_type": "vit", **{key: getattr(theirs, key) for key in needed}}
    ours = read_vit_config(tmp_path, config).model
    assert ours.norm_eps == theirs.layer_norm_eps and ours.init_std == theirs.initializer_range
    assert (ours.image_size, ours.patch_size) == (theirs.image_size, theirs.patch_size)
    assert (ours.channels, ours.classes) == (theirs.num_channels, theirs.num_labels)
    assert (ours.head_dim, ours.pooling, ours.positions) == (64, "token", "learned")


@pytest.mark.parametrize(
    ("name", "weight", "says"),
    [
        ("vit.embeddings.mask_token", (1, 1, 32), "holds vit.embeddings.mask_token, which a plain"),
        ("classifier.bias", None, "lacks classifier.bias"),
        (
            "vit.embeddings.position_embeddings",
            (1, 9, 32),
            "is [1, 9, 32], config.json makes it [1",
        ),
    ],
)
def test_weights_that_are_not_the_models_are_named(
    tmp_path: Path, name: str, weight: tuple[int, ...] | None, says: str
) -> None:
    directory = save_hf(random_hf(), tmp_path / "hf", "1GB")
    weights = load_file(directory / SINGLE)
    weights.pop(name, None)
    if weight is not None:
        weights[name] = torch.zeros(weight)
    save_file(weights, directory / SINGLE)
    assert says in refused(directory)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    directory = save_hf(random_hf(), tmp_path / "hf", "1GB")
    (directory / SINGLE).rename(directory / "pytorch_model.bin")
    message = refused(directory)
    assert "pytorch_model.bin, pickles" in message
    assert "AutoModelForImageClassification.from_pretrained(DIR).save_pretrained(NEW)" in message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (ImportOptions(tokenizer=Path("x")), "--tokenizer x is for language models, and"),
        (ImportOptions(seq_len=8), "--seq-len 8 is for language models"),
        (ImportOptions(text_key="body"), "--text-key body is for language models"),
        (ImportOptions(calibration_images=3), "--calibration-images 3 needs images"),
        (
            ImportOptions(calibration=[Path("x")], calibration_tokens=3),
            "--calibration-tokens 3 is for language models",
        ),
        (ImportOptions(calibration=[Path("nowhere")]), "the calibration images cannot be used: "),
        (ImportOptions(widths=[8, 32]), "must end with model.d_ff, which is 64"),
        (ImportOptions(classes=Path("nowhere.json")), "cannot read the class names nowhere.json"),
    ],
)
def test_options_that_do_not_fit_are_named(
    checkpoint: Path, options: ImportOptions, says: str
) -> None:
    assert says in refused(checkpoint, options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (ImportOptions(classes=Path("x")), "--classes x is for vision encoders, and"),
        (
            ImportOptions(calibration=[Path("x")], calibration_images=3),
            "--calibration-images 3 is for vision encoders",
        ),
    ],
)
def test_options_of_images_are_not_for_text(
    tmp_path: Path, options: ImportOptions, says: str
) -> None:
    assert says in refused(save(random_llama(), tmp_path / "hf"), options)


def test_configs_that_are_damaged_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"patch_size": 4}))
    assert "model_type is None, allowed is 'vit'" in refused(tmp_path / "hf")
