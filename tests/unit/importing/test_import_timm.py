"""Imported ViTs of timm against its own run of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from matformer_dist.data.images.classes import load_class_names
from matformer_dist.errors import UserError
from matformer_dist.importing.import_model import import_model
from matformer_dist.importing.options import ImportOptions
from matformer_dist.importing.timm_config import read_timm_config
from matformer_dist.submodels.extract import extract
from tests.unit.importing.vit_checkpoints import (
    CLASSES,
    load,
    random_timm,
    save_timm,
    some_images,
    xl_logits,
)
from tests.with_timm import import_timm

timm = import_timm()

KINDS: dict[str, dict[str, Any]] = {
    "token": {},
    "mean": {"class_token": False, "global_pool": "avg"},
    "grey": {"in_chans": 1, "img_size": 8, "patch_size": 2, "act_layer": "gelu"},
    "deit": {"name": "deit_small_patch16_224", "drop_path_rate": 0.1, "mlp_ratio": 41 / 32},
    "wide": {"name": "vit_giant_patch14_224", "mlp_ratio": None, "embed_dim": 44},
}


@pytest.mark.parametrize("order", ["none", "importance"])
@pytest.mark.parametrize("kind", KINDS)
def test_xl_matches_timm_after_a_round_trip(tmp_path: Path, kind: str, order: str) -> None:
    vit = random_timm(**KINDS[kind])
    source = save_timm(vit, tmp_path / "timm", label_names=list(CLASSES))
    widths = [8, vit.blocks[0].mlp.fc1.out_features]
    import_model(source, tmp_path / "run", ImportOptions(order=order, widths=widths))
    inputs = some_images(vit.in_chans, vit.patch_embed.img_size[0])
    with torch.no_grad():
        expected = vit(inputs)
    assert expected.std() > 0.2
    actual = xl_logits(tmp_path / "run", inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    (back,) = extract(str(tmp_path / "run"), ["XL"], output=tmp_path / "out", format="timm")
    again = timm.create_model(f"local-dir:{back.path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(inputs), expected, rtol=1e-5, atol=1e-5)
    assert list(again.pretrained_cfg["label_names"]) == [*CLASSES]
    if order == "none":
        for name, weight in vit.state_dict().items():
            assert again.state_dict()[name].equal(weight), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_kept_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    vit = random_timm().to(dtype)
    import_model(save_timm(vit, tmp_path / "timm"), tmp_path / "run", ImportOptions(order="none"))
    (back,) = extract(str(tmp_path / "run"), ["XL"], output=tmp_path / "out", format="timm")
    again = load_file(back.path / "model.safetensors")
    assert again.keys() == vit.state_dict().keys()
    for name, weight in vit.state_dict().items():
        assert again[name].equal(weight.float()), name


@pytest.mark.parametrize(
    ("name", "size"),
    [(f"vit_{size}", size) for size in ("tiny", "small", "base", "large", "huge", "giant",
                                        "gigantic")]
    + [(f"deit_{size}", size) for size in ("tiny", "small", "base")],
)  # fmt: skip
def test_sizes_of_architectures_are_timms(tmp_path: Path, name: str, size: str) -> None:
    patch = 14 if size in ("huge", "giant", "gigantic") else 16
    architecture = f"{name}_patch{patch}_224"
    with torch.device("meta"):
        theirs = timm.create_model(architecture)
    images = {"input_size": [3, 224, 224], "fixed_input_size": True}
    config = {"architecture": architecture, "num_classes": 7, "pretrained_cfg": images}
    ours = read_timm_config(tmp_path, config).model
    block = theirs.blocks[0]
    assert ours.d_model == theirs.embed_dim and ours.n_layers == len(theirs.blocks)
    assert ours.n_heads == block.attn.num_heads and ours.d_ff == block.mlp.fc1.out_features
    assert ours.norm_eps == block.norm1.eps and ours.classes == 7
    assert (ours.image_size, ours.patch_size) == (224, patch)


def test_images_are_prepared_as_the_checkpoint_has_them(tmp_path: Path) -> None:
    vit = random_timm()
    images = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.95}
    source = save_timm(vit, tmp_path / "timm", pretrained_cfg=images)
    config = json.loads((source / "config.json").read_text())
    config["pretrained_cfg"] |= {**images, "interpolation": "bilinear", "crop_mode": "border"}
    (source / "config.json").write_text(json.dumps(config))
    notices = import_model(source, tmp_path / "run").notices
    data = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    assert {key: data[key] for key in images} == images
    for says in ("resizes images bilinear", "crop_mode border", "names no classes"):
        assert any(says in notice for notice in notices)


def test_a_headless_one_gets_a_fresh_head(tmp_path: Path) -> None:
    vit = random_timm(num_classes=0)
    source = save_timm(vit, tmp_path / "timm")
    with pytest.raises(UserError, match="without a classifier"):
        import_model(source, tmp_path / "run")
    (tmp_path / "classes.json").write_text('["good", "bad"]')
    import_model(source, tmp_path / "run", ImportOptions(classes=tmp_path / "classes.json"))
    ours = load(tmp_path / "run")
    nesting = ours.layers[0].ffn.nesting  # type: ignore[union-attr]
    with torch.no_grad():
        actual = ours.embed(some_images(), nesting.uniform(nesting.largest, 3))  # type: ignore[operator, union-attr]
        torch.testing.assert_close(actual, vit(some_images()), rtol=1e-5, atol=1e-5)


def test_class_names_by_number_or_twice(tmp_path: Path) -> None:
    vit = random_timm()
    source = save_timm(vit, tmp_path / "timm", label_names={"0": "crane", "3": "crane", "4": ""})
    notices = import_model(source, tmp_path / "run").notices
    names = load_class_names(tmp_path / "run").names
    assert names == ("crane (0)", "1", "2", "crane (3)", "4")
    assert any("names classes alike (crane)" in notice for notice in notices)
    more = save_timm(vit, tmp_path / "more", label_names=["a"] * 6)
    notices = import_model(more, tmp_path / "run2").notices
    assert any("names classes up to number 5, the head's are 0 to 4" in one for one in notices)
    assert load_class_names(tmp_path / "run2").names == ("0", "1", "2", "3", "4")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"init_values": 1e-5}, "init_values is 1e-05, allowed is None"),
    ({"qk_norm": True}, "qk_norm is True, allowed is False"),
    ({"qkv_bias": False}, "qkv_bias is False, allowed is True"),
    ({"proj_bias": False}, "proj_bias is False, allowed is True"),
    ({"reg_tokens": 4}, "reg_tokens is 4, allowed is 0"),
    ({"pre_norm": True}, "pre_norm is True, allowed is False"),
    ({"final_norm": False}, "final_norm is False, allowed is True"),
    ({"no_embed_class": True}, "no_embed_class is True, allowed is False"),
    ({"pos_embed": "none"}, "pos_embed is 'none', allowed is 'learn'"),
    ({"scale_mlp_norm": True}, "scale_mlp_norm is True, allowed is False"),
    ({"act_layer": "quick_gelu"}, "act_layer is 'quick_gelu', allowed is 'gelu'"),
    ({"act_layer": "gelu_tanh"}, "act_layer is 'gelu_tanh', allowed is 'gelu'"),
    ({"norm_layer": "rmsnorm"}, "norm_layer is 'rmsnorm', allowed is 'layernorm'"),
    ({"global_pool": "avg"}, "global_pool is 'avg' with class_token True, allowed are 'token'"),
    ({"global_pool": "map"}, "global_pool is 'map' with class_token True"),
    ({"fc_norm": True}, "fc_norm is True, allowed is False here"),
    ({"img_size": [12, 16]}, "img_size is [12, 16], allowed is a square"),
    ({"img_size": 14}, "img_size 14 must be a multiple of patch_size 4"),
    ({"mlp_ratio": "2"}, "mlp_ratio is '2', allowed is a number"),
    ({"num_heads": 5}, "embed_dim 32 over num_heads 5 must be a whole head size"),
    ({"rope_type": "axial"}, "rope_type is 'axial', of which nothing is known here"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_what_matvit_does_not_compute_is_named(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    """As config.json has it, before the weights are looked at."""
    source = save_timm(random_timm(), tmp_path / "timm")
    config = json.loads((source / "config.json").read_text())
    config["model_args"] |= changes
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        import_model(source, tmp_path / "run")
    assert says in str(error.value) and str(source / "config.json") in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architecture": "deit_tiny_distilled_patch16_224"}, "architecture is 'deit_tiny_distill"),
        ({"architecture": "vit_base_patch16_rope_224"}, "allowed are plain ViTs, vit_{tiny,"),
        ({"architecture": None}, "architecture is None"),
        ({"pretrained_cfg": None}, "pretrained_cfg is None, allowed is an object"),
        ({"model_args": []}, "model_args is [], allowed is an object"),
        ({"pretrained_cfg": {"input_size": 3}}, "input_size is 3, allowed are channels, height"),
        ({"pretrained_cfg": {"mean": 5}}, "data.mean is 5"),
        ({"model_args": {"num_classes": "5"}}, "num_classes is '5'"),
    ],
)
def test_other_architectures_are_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    source = save_timm(random_timm(), tmp_path / "timm")
    before = json.loads((source / "config.json").read_text())
    changed = {
        key: {**before[key], **value} if isinstance(value, dict) else value
        for key, value in config.items()
    }
    (source / "config.json").write_text(json.dumps({**before, **changed}))
    with pytest.raises(UserError) as error:
        import_model(source, tmp_path / "run")
    assert says in str(error.value)


def test_weights_that_are_not_a_plain_vits_are_named(tmp_path: Path) -> None:
    source = save_timm(random_timm(), tmp_path / "timm")
    good = load_file(source / "model.safetensors")
    for name, says in [
        ("blocks.0.ls1.gamma", "holds blocks.0.ls1.gamma, which a plain ViT does not have"),
        ("dist_token", "holds dist_token, which a plain ViT does not have"),
    ]:
        save_file({**good, name: torch.zeros(32)}, source / "model.safetensors")
        with pytest.raises(UserError, match=says):
            import_model(source, tmp_path / "run")
    less = {name: weight for name, weight in good.items() if name != "blocks.1.attn.qkv.bias"}
    save_file(less, source / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks blocks\.1\.attn\.qkv\.bias"):
        import_model(source, tmp_path / "run")
    fewer = {name: weight for name, weight in good.items() if not name.startswith("blocks.2")}
    save_file(fewer, source / "model.safetensors")
    with pytest.raises(UserError, match="depth is 3, the files hold 2 layers"):
        import_model(source, tmp_path / "run")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(
        UserError, match=r"pytorch_model\.bin, pickles, .*timm\.models\.save_for_hf"
    ):
        import_model(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()
