"""Imported models against transformers' own run of the checkpoint, and what import leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from matformer_dist.checkpoints.verify import faults
from matformer_dist.config_file import load_config
from matformer_dist.config_language import as_language
from matformer_dist.errors import UserError
from matformer_dist.importing.import_model import import_model
from matformer_dist.importing.llama_weights import LlamaWeights
from matformer_dist.importing.options import ImportOptions
from matformer_dist.inference.loading import load_language_model
from matformer_dist.run_directory import UNIVERSAL, find_checkpoint
from matformer_dist.submodels.extract import extract
from tests.unit.importing.checkpoints import (
    CALIBRATION,
    load,
    random_llama,
    save,
    some_tokens,
    transformers,
    xl_logits,
)

KINDS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 5e4}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 0.2,
            "high_freq_factor": 2.0,
            "original_max_position_embeddings": 16,
        },
    },
    "wide-heads": {"head_dim": 12, "num_key_value_heads": 2},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "multi-query-tied": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3,
    },
}


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.txt"
    path.write_text(CALIBRATION)
    return path


@pytest.mark.parametrize("order", ["none", "magnitude", "activation"])
@pytest.mark.parametrize("kind", KINDS)
def test_xl_matches_transformers_after_a_round_trip(
    tmp_path: Path, calibration: Path, kind: str, order: str
) -> None:
    llama = random_llama(**KINDS[kind])
    source = save(llama, tmp_path / "hf")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    options = ImportOptions(
        order="none" if order == "none" else "importance",
        calibration=[calibration] if order == "activation" else (),
    )
    import_model(source, tmp_path / "run", options)
    tokens = some_tokens()
    with torch.no_grad():
        expected = llama(tokens).logits
    assert expected.std() > 0.5
    actual = xl_logits(tmp_path / "run", tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    (back,) = extract(str(tmp_path / "run"), ["XL"], output=tmp_path / "out", format="hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(back.path, local_files_only=True)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    if order == "none":
        for name, weight in llama.state_dict().items():
            assert again.state_dict()[name].equal(weight), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_kept_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    llama = random_llama().to(dtype)
    import_model(save(llama, tmp_path / "hf"), tmp_path / "run", ImportOptions(order="none"))
    (back,) = extract(str(tmp_path / "run"), ["XL"], output=tmp_path / "out", format="hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        back.path, local_files_only=True, dtype=torch.float32
    )
    for name, weight in llama.state_dict().items():
        assert again.state_dict()[name].equal(weight.float()), name


def test_prefixes_come_out_as_models_of_their_own(tmp_path: Path, calibration: Path) -> None:
    options = ImportOptions(widths=[6, 30, 64], names=["a", "b", "c"], calibration=[calibration])
    import_model(save(random_llama(), tmp_path / "hf"), tmp_path / "run", options)
    lm = load(tmp_path / "run")
    (one,) = extract(str(tmp_path / "run"), ["a:2,b:1"], output=tmp_path / "out")
    loaded = load_language_model(one.path)
    assert loaded.submodel.widths == (6, 6, 30)
    nesting = find_checkpoint(str(tmp_path / "run")).manifest.nesting
    with torch.no_grad():
        actual = loaded.model.logits(some_tokens(), loaded.submodel)
        expected = lm.logits(some_tokens(), nesting.parse("a:2,b:1", 3))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_the_run_directory_is_what_training_would_have_left(tmp_path: Path) -> None:
    source = save(random_llama(num_key_value_heads=2), tmp_path / "hf", "1GB")
    assert (source / "model.safetensors").exists()
    steps: list[tuple[int, int]] = []
    run = tmp_path / "runs" / "mine"
    options = ImportOptions(fractions=["1/4", "1"], seq_len=16)
    model = import_model(source, run, options, lambda *step: steps.append(step))
    assert [path.name for path in run.parent.iterdir()] == ["mine"]
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "tokenizer.model", "checkpoints",
    }  # fmt: skip
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0"]
    checkpoint = find_checkpoint(str(run))
    assert faults(checkpoint) == []
    manifest = checkpoint.manifest
    assert (manifest.step, manifest.units, manifest.has_optimizer) == (0, 0, False)
    assert manifest.layout == UNIVERSAL
    for name, weight in load(run).named_parameters():  # no file holds more than its weight
        assert 0 < manifest.files[f"zero/{name}/fp32.pt"].bytes - weight.nbytes < 2000
    assert manifest.nesting.widths == (16, 64)
    assert steps == [(i, 21) for i in range(22)]
    assert model.parameters == sum(p.numel() for p in load(run).parameters())
    assert not model.notices

    with pytest.raises(UserError, match=r"leaves data\.train open"):
        load_config(run / "config.yaml")
    config = as_language(load_config(run / "config.yaml", ["data.train=[[1,corpus]]"]), "it")
    assert (config.model, config.granularities) == (manifest.model, manifest.nesting)
    assert config.training.precision == manifest.precision
    assert (config.training.seq_len, config.model.kv_heads, config.run.dir) == (16, 2, run)
    assert config.data.tokenizer == run / "tokenizer.model"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["train"] == "???"


def test_the_same_import_gives_the_same_files(tmp_path: Path, calibration: Path) -> None:
    source = save(random_llama(), tmp_path / "hf")
    options = ImportOptions(calibration=[calibration])
    for name in ("a", "b"):
        import_model(source, tmp_path / name, options)
    first, second = (find_checkpoint(str(tmp_path / name)).manifest.files for name in "ab")
    assert first == second


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_left_of_an_import_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    source = save(random_llama(), tmp_path / "hf")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(LlamaWeights, "final_norm", fail)
    expected = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        import_model(source, tmp_path / "runs" / "mine")
    assert not (tmp_path / "runs").exists()


def test_only_a_new_or_empty_folder_is_written(tmp_path: Path) -> None:
    source = save(random_llama(), tmp_path / "hf")
    run = tmp_path / "run"
    run.mkdir()
    import_model(source, run)
    before = json.loads((run / "checkpoints/step-0/manifest.json").read_text())
    with pytest.raises(UserError, match="run exists and is not an empty folder"):
        import_model(source, run)
    assert json.loads((run / "checkpoints/step-0/manifest.json").read_text()) == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file exists and is not an empty folder"):
        import_model(source, tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write .*file/run"):
        import_model(source, tmp_path / "file" / "run")
    with pytest.raises(UserError, match="no name of its own"):
        import_model(source, Path())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (ImportOptions(order="random"), "--order 'random' must be one of importance, none"),
        (ImportOptions(order="none", calibration=[Path("x")]), "leave one of the two out"),
        (ImportOptions(fractions=["1"], widths=[64]), "both given; keep one"),
        (ImportOptions(fractions=["1/3", "1"]), "nesting fraction 1/3 of d_ff 64"),
        (ImportOptions(widths=[8, 32]), r"\[8, 32\] must end with model.d_ff, which is 64"),
        (ImportOptions(names=["a"]), r"nesting names \['a'\] must be 4 different names"),
        (ImportOptions(seq_len=49), "seq_len 49 is longer than model.max_seq_len 48"),
        (ImportOptions(seq_len=0), "training.seq_len is 0"),
        (ImportOptions(calibration=[Path("nowhere.txt")]), "no input nowhere.txt"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(
    tmp_path: Path, options: ImportOptions, says: str
) -> None:
    source = save(random_llama(), tmp_path / "hf")
    with pytest.raises(UserError, match=says):
        import_model(source, tmp_path / "run", options)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
