"""The `native` format: written, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from matformer_dist.errors import UserError
from matformer_dist.inference.loading import load_language_model, load_native
from matformer_dist.submodels.extract import extract
from matformer_dist.submodels.safetensors_files import read_weights
from tests.unit.submodels.synthetic_run import NESTING, VOCAB, model_config, random_model, write_run


@pytest.mark.parametrize(("ffn", "norm"), [("swiglu", "rmsnorm"), ("gelu", "layernorm")])
@pytest.mark.parametrize("notation", ["S", "XL", "S:1,L:2", "L:1,S:2"])
def test_native_logits_match_universal_model_in_place(
    tmp_path: Path, ffn: str, norm: str, notation: str
) -> None:
    model = model_config(ffn=ffn, norm=norm, n_kv_heads=2)
    lm = random_model(model)
    run = write_run(tmp_path / "run", lm, tensor=2)
    (one,) = extract(str(run), [notation], output=tmp_path / "out", shard_bytes=20_000)
    assert len(list(one.path.glob("model-*.safetensors"))) > 1
    loaded = load_language_model(one.path)
    submodel = NESTING.parse(notation, 3)
    assert loaded.submodel.widths == submodel.widths and str(loaded.submodel) == notation
    weights = dict(loaded.model.named_parameters())
    assert [len(weights[f"layers.{i}.ffn.w_in"]) for i in range(3)] == [*submodel.widths]
    assert sum(p.numel() for p in loaded.model.parameters()) == one.parameters
    tokens = torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = lm.logits(tokens, submodel)
        actual = loaded.model.logits(tokens, loaded.submodel)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        # It is nested still: what lies inside it runs on it too.
        inside = NESTING.uniform(0, 3)
        torch.testing.assert_close(
            loaded.model.logits(tokens, inside), lm.logits(tokens, inside), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_the_rounded_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    lm = random_model(model_config())
    run = write_run(tmp_path / "run", lm)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    (one,) = extract(str(run), ["XL"], output=tmp_path / "out", dtype=name)
    loaded = load_language_model(one.path).model
    for parameter, stored in zip(lm.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(stored, parameter.to(dtype))
    assert one.bytes == 2 * one.parameters
    assert (
        next(load_language_model(one.path, torch.float32).model.parameters()).dtype == torch.float32
    )


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    """Where a part holds them: the smaller submodel has none."""
    lm = random_model(model_config())
    with torch.no_grad():
        lm.get_parameter("layers.1.ffn.w_in")[50, 3] = 1e5
    run = write_run(tmp_path / "run", lm)
    (small,) = extract(str(run), ["L"], output=tmp_path / "small", dtype="fp16")
    assert all(weight.isfinite().all() for _, weight in read_weights(small.path))
    with pytest.raises(
        UserError, match=r"layers\.1\.ffn\.w_in .*1e\+05, beyond .* fp16; choose bf16"
    ):
        extract(str(run), ["L", "XL"], output=tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
    extract(str(run), ["XL"], output=tmp_path / "out", dtype="bf16")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    lm = random_model(model_config())
    with torch.no_grad():
        lm.get_parameter("layers.1.ffn.w_in")[7, 3] = value
    run = write_run(tmp_path / "run", lm)
    with pytest.raises(UserError, match=r"layers\.1\.ffn\.w_in of .* not finite; choose another"):
        extract(str(run), ["S"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_directories_that_are_not_whole_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_model(model_config()))
    (one,) = extract(str(run), ["M"], output=tmp_path / "out")
    with pytest.raises(UserError, match="not an extracted native model"):
        load_native(tmp_path)
    config = json.loads((one.path / "config.json").read_text())
    changes: list[tuple[dict[str, object], str]] = [
        ({"format": 3}, "format 3"),
        ({"model_type": "llama"}, "type 'llama'"),
        ({"granularities": ["M", "XS", "M"]}, "no granularity 'XS'"),
        ({"granularities": ["M", "S", "M"]}, r"holds a weight layers.1.ffn.w_in \[16, 64\]"),
    ]
    for change, message in changes:
        (one.path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            load_language_model(one.path)
    (one.path / "config.json").write_text(json.dumps(config))
    (one.path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot read the weights"):
        load_language_model(one.path)
