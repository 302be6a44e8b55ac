"""A vision encoder by the commands that README shows: train, resume, evaluate, search, extract,
retrieve, fine-tune.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from matformer_dist.inference.loading import load_vision_model
from tests.end_to_end.conftest import matformer, refuse, succeed, train
from tests.end_to_end.test_resume import lines

DIGITS = Path("launch/configs/vision/digits.yaml")
CLASSES = 10
VALIDATION = 355


def write_vision_config(path: Path, run_dir: Path, **sections: dict[str, object]) -> Path:
    tree: dict[str, Any] = {
        "task": "vision",
        "run": {"dir": str(run_dir)},
        "model": {"preset": "tiny", "channels": 1, "n_layers": 2, "d_ff": 64, "init_std": 0.08},
        "objective": {"kind": "per_sequence", "label_smoothing": 0.1, "mixup": 0.2},
        "data": {"augmentation": {"shift": 1}},  # digits by default
        "optimizer": {"lr": 3e-3},
        "training": {
            "steps": 12, "micro_batch_size": 16, "global_batch_size": 32, "precision": "fp32",
        },
        "evaluation": {"every": 6, "submodels": ["S:1,L:1"]},
        "checkpoint": {"every": 4, "keep_last": 3},
        "logging": {"every": 1, "tensorboard": False},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tensor-parallel ranks under the deepspeed launcher, ZeRO 2."""
    folder = tmp_path_factory.mktemp("vision")
    config = write_vision_config(
        folder / "c.yaml", folder / "run", parallel={"tensor": 2},
        deepspeed={"zero_optimization": {"stage": 2}},
    )  # fmt: skip
    shown = succeed(train(config, ranks=2))
    assert "batch      32 images of 17 rows" in shown and "images/s" in shown
    told = f"images to train on, {VALIDATION} to validate on, of {CLASSES} classes"
    assert f"data       digits: 1,442 {told}" in shown
    return folder / "run"


def test_training_writes_what_it_promises(trained: Path) -> None:
    found = lines(trained)
    assert [line["images"] for line in found] == [32 * step for step in range(1, 13)]
    for line in found:
        assert ("val_accuracy" in line) == (line["step"] in (6, 12))
    last = found[-1]
    assert set(last["val_accuracy"]) == {"S", "M", "L", "XL", "S:1,L:1"}
    assert all(0.1 < share <= 1 for share in last["val_accuracy"].values())
    counts = [share * VALIDATION for share in last["val_accuracy"].values()]
    assert counts == pytest.approx([round(count) for count in counts])  # of all images, each once
    assert json.loads((trained / "classes.json").read_text()) == [str(i) for i in range(CLASSES)]
    assert not (trained / "tokenizer.model").exists()


def test_a_run_goes_on_from_a_checkpoint_under_another_layout(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    for step in (8, 12):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step}")
    config = write_vision_config(tmp_path / "c.yaml", tmp_path / "run")
    shown = succeed(train(config))
    assert "resuming" in shown and "continuity XL's loss on a made-up sample" in shown
    for before, after in zip(lines(trained), lines(tmp_path / "run"), strict=True):
        for key in ("train_loss", "val_loss"):
            if key in before:
                assert after[key] == pytest.approx(before[key], rel=2e-4), (before["step"], key)


def test_a_resumed_run_writes_the_same_lines_bit_for_bit(tmp_path: Path) -> None:
    whole = write_vision_config(tmp_path / "a.yaml", tmp_path / "a")
    succeed(train(whole))
    parts = write_vision_config(tmp_path / "b.yaml", tmp_path / "b")
    succeed(train(parts))
    shutil.rmtree(tmp_path / "b/checkpoints/step-12")
    shutil.rmtree(tmp_path / "b/checkpoints/step-8")
    succeed(train(parts))
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_every_granularity_of_the_demo_knows_the_digits(tmp_path: Path) -> None:
    """In half of its steps."""
    succeed(train(DIGITS, f"run.dir={tmp_path}", "training.steps=200", "evaluation.every=0"))
    accuracies = lines(tmp_path)[-1]["val_accuracy"]
    assert list(accuracies) == ["XL", "L", "M", "S"] and min(accuracies.values()) > 0.95


def test_evaluation_agrees_with_training(trained: Path) -> None:
    shown = succeed(matformer("evaluate", trained, "--heuristic", "--device", "cpu"))
    assert "accuracy" in shown
    written = json.loads((trained / "evaluation.json").read_text())
    assert written["images"] == VALIDATION and written["bytes"] is None
    last = lines(trained)[-1]
    for entry in written["submodels"]:
        assert "perplexity" not in entry
        if entry["submodel"] in last["val_loss"]:
            name = entry["submodel"]
            assert entry["loss"] == pytest.approx(last["val_loss"][name], rel=1e-5)
            assert entry["accuracy"] == pytest.approx(last["val_accuracy"][name])


def test_extraction_and_search(trained: Path, tmp_path: Path) -> None:
    few = ("--points", 4, "--rounds", 1, "--candidates", 1)
    succeed(matformer("search", trained, *few))
    slices = json.loads((trained / "slices.json").read_text())
    assert {one["submodel"] for one in slices["slices"]} >= {"S"}
    output = tmp_path / "m"
    succeed(matformer("extract", trained, "--submodel", "S:1,M:1", "--output", output))
    whole, small = load_vision_model(trained), load_vision_model(output)
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed = whole.parse("S:1,M:1")
    with torch.no_grad():
        torch.testing.assert_close(
            small.model.logits(images, small.submodel), whole.model.logits(images, mixed),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
    assert small.labels.files == whole.labels.files
    evaluated = succeed(matformer("evaluate", output, "--run", trained, "--device", "cpu"))
    assert "S:1,M:1" in evaluated
    gguf = ("--submodel", "S", "--format", "gguf", "--output", tmp_path / "g")
    refuse(matformer("extract", trained, *gguf), "format gguf does not hold a model of task: visi")
    refuse(matformer("generate", trained, "--prompt", "x"), "is a vision encoder, which reads no")


def test_retrieval_and_the_report(trained: Path) -> None:
    shown = succeed(matformer("retrieve", trained, "--k", "1,5", "--device", "cpu"))
    assert "355 queries" in shown
    found = json.loads((trained / "retrieval.json").read_text())
    entries = {(one["submodel"], one["gallery"]): one for one in found["entries"]}
    assert entries["XL", "XL"]["neighbour_agreement"]["5"]["value"] == 1
    assert entries["S", "XL"]["query_flops"] < entries["XL", "XL"]["query_flops"]
    assert entries["XL", "XL"]["knn_accuracy"]["1"]["value"] > 0.3
    succeed(matformer("report", trained))
    page = (trained / "report.html").read_text()
    assert "Adaptive retrieval" in page and "images" in page


def test_fine_tuning_begins_with_the_weights_alone(trained: Path, tmp_path: Path) -> None:
    """Of other classes: with a fresh head; of a larger image: with positions in between."""
    digits = _folder_of_digits(tmp_path / "data", classes=(0, 1, 2))
    config = write_vision_config(
        tmp_path / "c.yaml", tmp_path / "run", model={"image_size": 12},
        data={"train": str(digits), "split": 0.2}, evaluation={"submodels": []},
    )  # fmt: skip
    initial = f"checkpoint.initial={trained}@8"
    shown = succeed(train(config, initial))
    assert "notice     the head begins anew: the 3 classes" in shown and "from " in shown
    assert "notice     learned positions of 4 x 4 patches are interpolated for 6 x 6" in shown
    first, *_, last = lines(tmp_path / "run")
    assert first["step"] == 1 and last["val_accuracy"]["S"] > 0.34
    manifest = json.loads((tmp_path / "run/checkpoints/step-12/manifest.json").read_text())
    assert manifest["began_from"].endswith("run/checkpoints/step-8") and manifest["outputs"] == 3
    (digits / "class 0" / "0.png").unlink()
    assert "notice     data.train does not hold what it did at step 12" in succeed(
        train(config, "training.steps=13")
    )
    refuse(
        train(config, initial, "run.dir=" + str(tmp_path / "other"), "model.d_model=32"),
        "model.d_model (was 64, now 32)",
    )
    refuse(
        train(config, f"checkpoint.initial={tmp_path / 'none'}", f"run.dir={tmp_path / 'third'}"),
        "there is no run directory",
    )


def _folder_of_digits(folder: Path, classes: tuple[int, ...]) -> Path:
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    for i, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        if int(label) in classes:
            path = folder / f"class {label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype("uint8")).save(path)
    return folder


@pytest.mark.parametrize("part", ["train", "validation"])
def test_an_image_that_one_rank_cannot_read_ends_all_with_one_message(
    part: str, tmp_path: Path
) -> None:
    """Of data-parallel ranks one alone meets it; tensor-parallel ones all do."""
    folders = {name: _folder_of_digits(tmp_path / name, (0, 1)) for name in ("train", "validation")}
    broken = folders[part] / "class 1/1.png"
    broken.write_bytes(b"no image")
    config = write_vision_config(
        tmp_path / "c.yaml", tmp_path / "run", data={key: str(f) for key, f in folders.items()},
        parallel={"tensor": 1 if part == "train" else 2},
        checkpoint={"every": 1, "async_save": True},
    )  # fmt: skip
    refuse(train(config, ranks=2), f"{broken} holds no image that can be decoded")
    done = lines(tmp_path / "run")[-1]["step"]
    assert 0 < done < 12
    verified = succeed(matformer("verify", tmp_path / "run"))  # what was saved before
    assert f"step-{done + (part == 'validation')} " in verified.splitlines()[-1]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.train=/nowhere/at/all"], "/nowhere/at/all"),
        (["model.classes=4"], "model.classes is 4, but"),
        (["model.patch_size=3"], "model.image_size 8 must be a multiple of model.patch_size 3"),
        (["model.channels=2"], "1 channel (grey) or 3 (RGB), not 2"),
        (["training.images=5"], "set exactly one of training.steps and training.images"),
        (["training.seq_len=5"], "unknown key training.seq_len"),
        (
            ["training.micro_batch_size=1"],
            "objective.mixup mixes the images of a micro-batch, and training.micro_batch_size is 1",
        ),
        (["model.preset=S/15"], "model.preset 'S/15' is unknown"),
        (["checkpoint.initial=a", "checkpoint.resume=b"], "both say where to begin"),
    ],
)
def test_mistakes_are_one_message(overrides: list[str], says: str, tmp_path: Path) -> None:
    config = write_vision_config(tmp_path / "c.yaml", tmp_path / "run")
    refuse(train(config, *overrides), says)
