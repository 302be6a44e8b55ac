"""What `extract` leaves on disk, and when it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from matformer_dist.counting import count_parameters
from matformer_dist.data.sentencepiece_tokenizer import train_tokenizer
from matformer_dist.errors import UserError
from matformer_dist.report.shapes import Extracted
from matformer_dist.run_directory import DamagedError, find_checkpoint
from matformer_dist.submodels import extract as extract_module
from matformer_dist.submodels.entry import read_entry
from matformer_dist.submodels.extract import extract
from matformer_dist.submodels.formats import directory_name
from matformer_dist.submodels.safetensors_files import read_weights
from matformer_dist.submodels.slices import SLICES, Slices
from tests.unit.submodels.synthetic_run import (
    NESTING,
    TEXT,
    model_config,
    random_model,
    write_run,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", random_model(model_config()))


@pytest.mark.parametrize(("format", "nested"), [("native", False), ("hf", False), ("hf", True)])
def test_directory_holds_what_is_promised(
    run: Path, tmp_path: Path, format: str, nested: bool
) -> None:
    output = tmp_path / "a" / "out"
    (one,) = extract(f"{run}@5", ["S:2,M:1"], output=output, format=format, nested=nested)
    expected = {"config.json", "model.safetensors", "submodel.json", "README.md", "tokenizer.model"}
    if format == "hf":
        expected |= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    if nested:
        expected |= {"configuration_matformer.py", "modeling_matformer.py"}
    assert {file.name for file in one.path.iterdir()} == expected
    entry = Extracted.model_validate(read_entry(one.path))  # what the report reads
    count = count_parameters(model_config(), 307, NESTING.parse("S:2,M:1", 3))
    assert entry.parameters == one.parameters == count.total
    assert entry.non_embedding_parameters == count.non_embedding
    assert (entry.submodel, entry.widths, entry.step, entry.format) == (
        "S:2,M:1", [8, 8, 16], 5, format,
    )  # fmt: skip
    card = (one.path / "README.md").read_text()
    assert card.startswith("---\n") and f"{count.total:,}" in card and "2 x 8, 1 x 16" in card
    front_matter = yaml.safe_load(card.split("---\n")[1])
    assert "matformer" in front_matter["tags"]
    assert ("library_name" in front_matter) == (format == "hf")
    assert list((tmp_path / "a").iterdir()) == [one.path]


@pytest.mark.parametrize(
    ("format", "kind", "needs"),
    [
        ("native", {}, "torch"),
        ("hf", {}, "transformers"),
        ("hf", {"sparse": True}, "transformers"),
        ("hf", {"nested": True}, "transformers"),
        ("gguf", {}, "llama_cpp"),
    ],
)
def test_the_model_cards_code_runs(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    format: str,
    kind: dict[str, Any],
    needs: str,
) -> None:
    pytest.importorskip(needs)
    run = write_run(tmp_path / "run", random_model(model_config(max_seq_len=96)))
    (one,) = extract(str(run), ["S:2,M:1"], output=tmp_path / "out", format=format, **kind)
    card = (one.path / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    exec(code.replace("PATH", str(one.path)), {})
    assert len(capsys.readouterr().out) > 10


def test_shards_and_index_hold_every_weight_once(run: Path, tmp_path: Path) -> None:
    (whole,) = extract(str(run), ["XL"], output=tmp_path / "whole")
    (cut,) = extract(str(run), ["XL"], output=tmp_path / "cut", shard_bytes=30_000)
    files = sorted(cut.path.glob("*.safetensors"))
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2 and [file.name for file in files] == names
    index = json.loads((cut.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == cut.bytes == whole.bytes
    for file in files:
        with safe_open(file, framework="pt") as opened:
            held = list(opened.keys())
            size = sum(opened.get_tensor(name).nbytes for name in held)
        assert size <= 30_000 or len(held) == 1
        assert all(index["weight_map"][name] == file.name for name in held)
    expected = dict(read_weights(whole.path))
    actual = dict(read_weights(cut.path))
    assert sorted(actual) == sorted(expected)
    assert all(actual[name].equal(expected[name]) for name in expected)


def test_several_submodels_go_into_one_directory_each(run: Path, tmp_path: Path) -> None:
    found = extract(str(run), ["S", "S:2,M:1", "M", "S:3"], output=tmp_path / "out")
    assert [one.submodel for one in found] == ["S", "S:2,M:1", "M"]
    assert [one.path.name for one in found] == ["S", "Sx2-Mx1", "M"]
    assert all(read_entry(one.path)["submodel"] == one.submodel for one in found)


def test_the_name_of_a_slice_is_its_submodel(run: Path, tmp_path: Path) -> None:
    measured = {
        "submodel": "S:2,M:1", "widths": [8, 8, 16], "parameters": 1_310_000,
        "non_embedding_parameters": 5, "flops": 7, "memory_bytes": 9, "loss": 2.5,
        "loss_interval": [2.4, 2.6], "agreement": 0.5, "kl": 0.1,
    }  # fmt: skip
    named = {
        **measured, "name": "1.31M", "kind": "params", "budget": 1.4e6, "found_by": "search",
        "heuristic": "S", "gain": 0.1, "gain_interval": [0.0, 0.2],
    }  # fmt: skip
    slices = Slices.model_validate(
        {
            "step": 5, "checkpoint_sha256": find_checkpoint(run).manifest.manifest_sha256,
            "seq_len": 8, "tokens": 8, "dtype": "fp32", "slices": [named], "measured": [measured],
        }
    )  # fmt: skip
    path = run / SLICES
    try:
        path.write_text(slices.model_dump_json())
        found = extract(str(run), ["1.31M", "M", "S:2,M"], output=tmp_path / "out")
    finally:
        path.unlink()
    assert [one.submodel for one in found] == ["S:2,M:1", "M"]
    assert [one.path.name for one in found] == ["Sx2-Mx1", "M"]
    assert read_entry(found[0].path)["widths"] == [8, 8, 16]


def test_measured_loss_comes_from_the_evaluation_of_the_same_step(
    run: Path, tmp_path: Path
) -> None:
    evaluation = {"step": 5, "tokens": 9, "submodels": [{"submodel": "M", "loss": 2.5}]}
    path = run / "evaluation.json"
    try:
        path.write_text(json.dumps(evaluation))
        found = extract(str(run), ["S", "M"], output=tmp_path / "a")
        assert [read_entry(one.path)["loss"] for one in found] == [None, 2.5]
        assert "2.5000 nats" in (found[1].path / "README.md").read_text()
        path.write_text(json.dumps({**evaluation, "step": 4}))
        (other,) = extract(str(run), ["M"], output=tmp_path / "b")
        assert read_entry(other.path)["loss"] is None
        path.write_text(json.dumps(evaluation).replace("2.5", "NaN"))
        (other,) = extract(str(run), ["M"], output=tmp_path / "d")
        assert read_entry(other.path)["loss"] is None
        path.write_text("{")
        with pytest.raises(UserError, match=r"cannot read .*evaluation.json"):
            extract(str(run), ["M"], output=tmp_path / "c")
    finally:
        path.unlink()


def test_output_is_replaced_only_where_asked_and_only_a_model(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    extract(str(run), ["S"], output=output)  # an empty directory is taken
    with pytest.raises(UserError, match="out exists and is not empty"):
        extract(str(run), ["M"], output=output)
    assert read_entry(output)["submodel"] == "S"
    extract(str(run), ["M"], output=output, force=True)
    assert read_entry(output)["submodel"] == "M"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    with pytest.raises(UserError, match="precious holds no extracted model"):
        extract(str(run), ["M"], output=precious, force=True)
    with pytest.raises(UserError, match=r"cannot write .*thesis\.tex"):
        extract(str(run), ["M"], output=precious / "thesis.tex" / "out")
    assert [file.name for file in precious.iterdir()] == ["thesis.tex"]


def test_what_lies_beside_a_model_is_not_deleted_with_it(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    extract(str(run), ["S"], output=output)
    (output / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"out holds thesis\.tex beside an extracted model"):
        extract(str(run), ["M"], output=output, force=True)
    assert read_entry(output)["submodel"] == "S" and (output / "thesis.tex").exists()


def test_no_model_is_written_among_checkpoints(run: Path) -> None:
    for place in ("checkpoints/step-7", "checkpoints/step-5/x"):
        with pytest.raises(UserError, match=r"lies among the checkpoints of .*run, which are dele"):
            extract(str(run), ["S"], output=run / place)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-5"]


@pytest.mark.parametrize("format", ["native", "hf", "gguf"])
def test_every_format_can_be_replaced(run: Path, tmp_path: Path, format: str) -> None:
    kinds: list[dict[str, Any]] = [{}]
    if format == "hf":
        kinds += [{"sparse": True}, {"nested": True}]
    for kind in kinds:
        if format == "gguf":
            pytest.importorskip("gguf")
        for submodel in ("S", "M"):
            extract(
                str(run), [submodel], output=tmp_path / "out", format=format, shard_bytes=30_000,
                force=True, **kind,
            )  # fmt: skip
        assert read_entry(tmp_path / "out")["submodel"] == "M"


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_flipped_bit_goes_into_no_model(tmp_path: Path, tensor: int) -> None:
    run = write_run(tmp_path / "run", random_model(model_config()), tensor=tensor)
    path = run / f"checkpoints/step-5/mp_rank_{tensor - 1:02d}_model_states.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40  # a weight's
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"mp_rank_0\d_model_states\.pt is not as it was"):
        extract(str(run), ["S", "XL"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    extract(str(run), ["S", "XL"], output=tmp_path / "out", verify=False)


def test_names_of_directories_are_short_and_different() -> None:
    names = [",".join([f"{a}:1", f"{b}:1"] * 40) for a, b in ("SM", "SL", "MS")]
    short = [directory_name(name) for name in names]
    assert len(set(short)) == 3 and max(map(len, short)) < 80
    assert directory_name("S:2,M:2") == "Sx2-Mx2" and directory_name("../..") == "..-.."


@pytest.mark.parametrize("submodels", [["M"], ["S", "M"]])
def test_nothing_is_left_of_an_extraction_that_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submodels: list[str]
) -> None:
    written: list[Path] = []

    def fail(path: Path) -> None:
        written.append(path)
        assert sum(file.stat().st_size for file in path.parent.iterdir()) > 10_000
        raise KeyboardInterrupt

    monkeypatch.setattr(extract_module, "sync_file", fail)
    with pytest.raises(KeyboardInterrupt):
        extract(str(run), submodels, output=tmp_path / "out")
    assert written and not list(tmp_path.iterdir())


def test_bad_requests_are_named_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for arguments, message in [
        ({"submodels": ["S", "Q"]}, "no granularity 'Q'"),
        ({"submodels": ["S:2,M:2"]}, "covers 4 layers, the model has 3"),
        ({"submodels": ["S"], "format": "onnx"}, "no format 'onnx'; choose one of native, hf"),
        ({"submodels": ["S"], "dtype": "int8"}, "no dtype 'int8' in format native; choose one of"),
        (
            {"submodels": ["S"], "format": "hf", "dtype": "q8_0"},
            "no dtype 'q8_0' in format hf; choose one of fp32, bf16, fp16$",
        ),
        ({"submodels": ["S"], "sparse": True}, "--sparse is for format hf, not native"),
        ({"submodels": ["S"], "nested": True}, "not native, which is nested as it is; leave it"),
        (
            {"submodels": ["S"], "format": "gguf", "nested": True},
            "--nested is for format hf, not gguf; leave it out",
        ),
        (
            {"submodels": ["S"], "format": "hf", "sparse": True, "nested": True},
            "exclude each other; choose one$",
        ),
        ({"submodels": ["1.31M"]}, r"no slice '1.31M' in .*slices.json; `matformer search` makes"),
    ]:
        with pytest.raises(UserError, match=message):
            extract(str(run), output=output, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="@6 is not there; checkpoints are"):
        extract(f"{run}@6", ["S"], output=output)
    with pytest.raises(UserError, match="no run directory"):
        extract(str(tmp_path / "nowhere"), ["S"], output=output)
    assert not output.exists()


def test_another_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer([TEXT], 305).model)
    with pytest.raises(UserError, match=r"other\.model is not what"):
        extract(str(moved), ["S"], output=tmp_path / "out", tokenizer=other)
    extract(str(moved), ["S"], output=tmp_path / "out", tokenizer=run / "tokenizer.model")
