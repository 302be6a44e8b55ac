"""Extraction from the run of a vision encoder: what is written beside the weights, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from matformer_dist.counting import count_parameters
from matformer_dist.errors import UserError
from matformer_dist.inference.loading import load_vision_model
from matformer_dist.submodels.entry import read_entry
from matformer_dist.submodels.extract import extract
from matformer_dist.submodels.formats import usual_format
from tests.unit.submodels.synthetic_run import model_config, random_model, write_run
from tests.unit.submodels.synthetic_vision_run import (
    CLASSES,
    NESTING,
    random_vit,
    some_images,
    vision_config,
    write_vision_run,
)
from tests.with_timm import import_timm, mend_torchvision

FORMATS = ("native", "hf", "timm")
OF_ALL = {"config.json", "model.safetensors", "submodel.json", "README.md"}
FILES = {
    "native": {*OF_ALL, "classes.json"},
    "hf": {*OF_ALL, "preprocessor_config.json"},
    "timm": OF_ALL,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    data = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.875}
    return write_vision_run(directory, random_vit(vision_config()), tensor=2, data=data)


@pytest.mark.parametrize("changes", [{}, {"pooling": "mean", "positions": "sincos"}])
def test_native_logits_match_universal_model_in_place(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = vision_config(**changes, n_kv_heads=2)
    vit = random_vit(model)
    run = write_vision_run(tmp_path / "run", vit, tensor=2)
    for one in extract(str(run), ["S", "XL", "S:2,L:1"], output=tmp_path / "out"):
        loaded = load_vision_model(one.path)
        submodel = NESTING.parse(one.submodel, 3)
        with torch.no_grad():
            expected = vit.logits(some_images(model), submodel)
            actual = loaded.model.logits(some_images(model), loaded.submodel)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert sum(p.numel() for p in loaded.model.parameters()) == one.parameters
        assert loaded.labels.digest == CLASSES.digest


@pytest.mark.parametrize("format", FORMATS)
def test_the_directory_says_what_it_holds(run: Path, tmp_path: Path, format: str) -> None:
    (one,) = extract(str(run), ["S:2,M:1"], output=tmp_path / "out", format=format)
    assert {path.name for path in one.path.iterdir()} == FILES[format]
    count = count_parameters(vision_config(), len(CLASSES), NESTING.parse("S:2,M:1", 3))
    entry = read_entry(one.path)
    assert (entry["format"], entry["parameters"]) == (format, count.total) != ("", 0)
    assert entry["preprocessing"] == {
        "image_size": 12, "channels": 3, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
        "crop_pct": 0.875, "interpolation": "bicubic",
    }  # fmt: skip
    assert (entry["loss"], entry["accuracy"]) == (None, None)
    card = (one.path / "README.md").read_text()
    front_matter = yaml.safe_load(card.split("---\n")[1])
    assert front_matter["pipeline_tag"] == "image-classification"
    assert front_matter.get("library_name") == {"hf": "transformers"}.get(
        format, None if format == "native" else format
    )
    assert f"{count.total:,}" in card and "2 x 8, 1 x 16" in card
    assert "shorter side of an image to 13 pixels" in card and "validation loss | not meas" in card
    assert ("padded to 16" in card) == (format != "native")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_model_cards_code_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    format: str,
    channels: int,
) -> None:
    """All formats name the same class."""
    if format == "timm":
        import_timm()
    elif format == "hf":
        mend_torchvision()
        pytest.importorskip("transformers")
    vit = random_vit(vision_config(channels=channels))
    run = write_vision_run(tmp_path / "run", vit)
    (one,) = extract(str(run), ["S:2,M:1"], output=tmp_path / "out", format=format)
    code = (one.path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    pixels = torch.randint(0, 256, (12, 12, 3), generator=torch.Generator().manual_seed(5))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pixels.to(torch.uint8).numpy()).save("image.jpg", quality=100)
    exec(code.replace("PATH", str(one.path)), {})
    (loaded,) = extract(str(run), ["S:2,M:1"], output=tmp_path / "ours")
    native = (loaded.path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    shown = capsys.readouterr().out.splitlines()
    exec(native.replace("PATH", str(loaded.path)), {})
    assert shown[-1] in CLASSES.names and capsys.readouterr().out.splitlines()[-1] == shown[-1]


def test_what_was_measured_is_said(tmp_path: Path) -> None:
    run = write_vision_run(tmp_path / "run", random_vit(vision_config()))
    measured = {"submodel": "M", "loss": 1.25, "accuracy": 0.625}
    evaluation = {"step": 5, "data": None, "submodels": [measured, {"submodel": "S", "loss": None}]}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    for name, loss, accuracy in (("M", 1.25, 0.625), ("S", None, None), ("L", None, None)):
        (one,) = extract(str(run), [name], output=tmp_path / name, format="hf")
        entry = read_entry(one.path)
        assert (entry["loss"], entry["accuracy"]) == (loss, accuracy)
    card = (tmp_path / "M" / "README.md").read_text()
    assert "| validation accuracy | 62.50% |" in card and "1.2500 nats per image" in card
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "step": 4}))
    (one,) = extract(str(run), ["M"], output=tmp_path / "later", format="hf")
    assert read_entry(one.path)["accuracy"] is None
    (run / "evaluation.json").write_text('{"step": 5, "submodels": [3]}')
    with pytest.raises(UserError, match=r"cannot read .*evaluation\.json"):
        extract(str(run), ["M"], output=tmp_path / "never", format="hf")


def test_what_a_search_measured_is_said(tmp_path: Path) -> None:
    run = write_vision_run(tmp_path / "run", random_vit(vision_config()))
    measured = {
        "submodel": "M", "widths": [16] * 3, "parameters": 1, "non_embedding_parameters": 1,
        "flops": 1, "memory_bytes": 1, "loss": 1.25, "loss_interval": [1, 2], "agreement": 0.5,
        "kl": 0.1,
    }  # fmt: skip
    slices = {
        "step": 5, "checkpoint_sha256": "", "seq_len": 1, "unit": "images", "units": 9,
        "dtype": "bf16", "slices": [],
    }  # fmt: skip
    for name, accuracy in (("old", None), ("new", 0.625)):
        entries = [{**measured, **({} if accuracy is None else {"accuracy": accuracy})}]
        (run / "slices.json").write_text(json.dumps({**slices, "measured": entries}))
        (one,) = extract(str(run), ["M"], output=tmp_path / name)
        entry = read_entry(one.path)
        assert (entry["loss"], entry["accuracy"]) == (1.25, accuracy)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, []),
        ({"pooling": "mean"}, ["hf"]),
        ({"pooling": "mean", "norm_eps": 1e-5}, ["hf", "timm"]),
        ({"norm_eps": 1e-5}, ["timm"]),
        ({"n_kv_heads": 2}, ["hf", "timm"]),
        ({"kv_channels": 16}, ["hf", "timm"]),
    ],
)
def test_the_usual_format_matches_what_extraction_takes(
    tmp_path: Path, changes: dict[str, Any], refused: list[str]
) -> None:
    model = vision_config(**changes)
    run = write_vision_run(tmp_path / "run", random_vit(model))
    taken = []
    for kind in ("hf", "timm", "native"):
        if kind in refused:
            with pytest.raises(UserError, match="extract with --format"):
                extract(str(run), ["S"], output=tmp_path / kind, format=kind)
        else:
            extract(str(run), ["S"], output=tmp_path / kind, format=kind)
            taken.append(kind)
    assert taken[0] == usual_format(model)


def test_every_format_can_be_replaced(run: Path, tmp_path: Path) -> None:
    for kind in (*FORMATS, *FORMATS):
        for submodel in ("S", "M"):
            extract(str(run), [submodel], output=tmp_path / "out", format=kind, force=True)
        assert read_entry(tmp_path / "out")["submodel"] == "M"


def test_requests_that_do_not_fit_the_task_are_named(run: Path, tmp_path: Path) -> None:
    language = write_run(tmp_path / "language", random_model(model_config()))
    for source, arguments, message in [
        (run, {"format": "gguf"}, "format gguf .* task: vision; choose one of native, hf, timm$"),
        (run, {"format": "hf", "nested": True}, "--sparse and --nested are for language models"),
        (run, {"format": "timm", "sparse": True}, "--sparse is for format hf, not timm"),
        (run, {"format": "timm", "dtype": "q8_0"}, "no dtype 'q8_0' in format timm; choose one of"),
        (language, {"format": "timm"}, "task: language; choose one of native, hf, gguf$"),
    ]:  # type: ignore[var-annotated]
        with pytest.raises(UserError, match=message):
            extract(str(source), ["S"], output=tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_run_must_say_how_it_prepares_images(tmp_path: Path) -> None:
    run = write_vision_run(tmp_path / "run", random_vit(vision_config()))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "data": {"train": "???"}}))
    (one,) = extract(str(run), ["S"], output=tmp_path / "open")  # as an imported run leaves it
    assert read_entry(one.path)["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"cannot read the config file .*config\.yaml"):
        extract(str(run), ["S"], output=tmp_path / "out")
    other = write_run(tmp_path / "language", random_model(model_config()))
    (run / "config.yaml").write_bytes((other / "config.yaml").read_bytes())
    with pytest.raises(UserError, match="is of task: language, its checkpoint of a vision encoder"):
        extract(str(run), ["S"], output=tmp_path / "out")


def test_classes_of_another_file(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "classes.json"
    copy.write_text('["other", "names"]')
    with pytest.raises(UserError, match=r"classes\.json is not what .* was trained with"):
        extract(str(run), ["S"], output=tmp_path / "out", tokenizer=copy)
    copy.write_bytes(CLASSES.files["classes.json"])
    extract(str(run), ["S"], output=tmp_path / "out", tokenizer=copy)
