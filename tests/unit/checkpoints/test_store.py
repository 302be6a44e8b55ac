"""A checkpoint is complete or does not exist, and the newest good one stays."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from matformer_dist.checkpoints.store import CheckpointStore
from matformer_dist.checkpoints.verify import faults
from matformer_dist.checkpoints.writer import CheckpointWriter
from matformer_dist.config import CheckpointConfig
from matformer_dist.errors import UserError
from matformer_dist.nesting import Nesting
from matformer_dist.run_directory import Layout, Manifest, read_checkpoint, read_checkpoints
from tests.unit.submodels.synthetic_run import model_config

MODEL = "mp_rank_00_model_states.pt"


class Engine:
    """Saves as DeepSpeed does: files through the writer."""

    def __init__(self, in_background: bool = False) -> None:
        self.writer = CheckpointWriter(in_background)
        self.weights = torch.zeros(1000)
        self.fails = False

    def save(self, directory: str, tag: str) -> None:
        folder = Path(directory) / tag
        self.writer.save({"module": {"w": self.weights}}, str(folder / MODEL))
        if self.fails:
            self.writer.save({}, str(folder / "nowhere" / "rank_1.pt"))


def manifest(step: int) -> Manifest:
    return Manifest(
        step=step,
        samples=step,
        units=step,
        layout=Layout(tensor=1, data=1, zero_stage=0),
        model=model_config(),
        nesting=Nesting.from_widths([8, 64]),
        outputs=9,
        precision="fp32",
        labels_sha256="",
        config_sha256="",
        versions={},
        files={},
    )


def store(run: Path, **settings: Any) -> CheckpointStore:
    return CheckpointStore(run, CheckpointConfig(**settings))


def save_and_finish(target: CheckpointStore, engine: Engine, step: int) -> None:
    target.save(engine, manifest(step))
    target.finish()


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in read_checkpoints(run).complete]


def test_a_saved_checkpoint_is_whole_and_named_latest(tmp_path: Path) -> None:
    store(tmp_path).save(Engine(), manifest(5))
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-5"]
    assert (folder / "latest").read_text() == "step-5"
    saved = read_checkpoint(folder / "step-5")
    assert set(saved.manifest.files) == {MODEL}
    assert faults(saved) == []


def test_in_the_background_it_is_there_when_finished_and_not_before(tmp_path: Path) -> None:
    engine, target = Engine(in_background=True), store(tmp_path)
    assert not target.is_written
    target.save(engine, manifest(5))
    engine.weights.fill_(7)  # training goes on
    assert steps(tmp_path) == []
    engine.writer._thread.join()  # type: ignore[union-attr]
    assert target.is_written and steps(tmp_path) == []
    target.finish()
    assert steps(tmp_path) == [5] and not target.is_written
    saved = torch.load(tmp_path / "checkpoints/step-5" / MODEL)["module"]["w"]
    assert torch.equal(saved, torch.zeros(1000))
    assert target.take_seconds() > 0 and target.take_seconds() == 0


def test_the_next_save_waits_for_the_one_before(tmp_path: Path) -> None:
    engine, target = Engine(in_background=True), store(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        target.save(engine, manifest(step))
    target.finish()
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_failed_save_says_so_and_leaves_the_one_before(
    tmp_path: Path, in_background: bool
) -> None:
    engine, target = Engine(in_background), store(tmp_path, keep_last=1)
    target.save(engine, manifest(1))
    target.finish()
    engine.fails = True
    with pytest.raises(UserError, match=r"step 2 could not be written: .*nowhere.*step-1, is unt"):
        save_and_finish(target, engine, 2)
    assert steps(tmp_path) == [1]
    assert not list((tmp_path / "checkpoints").glob("*.incomplete")), "it holds the space"
    engine.fails = False
    target.save(engine, manifest(3))
    target.finish()
    assert steps(tmp_path) == [3]


def test_what_need_not_be_kept_goes(tmp_path: Path) -> None:
    target = store(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 10):
        target.save(Engine(), manifest(step))
    assert steps(tmp_path) == [4, 8, 9]


def test_damaged_checkpoints_neither_count_nor_go(tmp_path: Path) -> None:
    target = store(tmp_path, keep_last=2)
    for step in (1, 2):
        target.save(Engine(), manifest(step))
    (tmp_path / "checkpoints/step-2" / MODEL).write_bytes(b"")
    target.save(Engine(), manifest(3))
    assert steps(tmp_path) == [1, 3]
    assert (tmp_path / "checkpoints/step-2").exists(), "its owner may want to look at it"


def test_saving_a_step_again_replaces_a_damaged_folder(tmp_path: Path) -> None:
    target = store(tmp_path)
    target.save(Engine(), manifest(4))
    (tmp_path / "checkpoints/step-4" / MODEL).write_bytes(b"")
    (tmp_path / "checkpoints/step-4/stray").write_bytes(b"")
    target.save(Engine(), manifest(4))
    assert faults(read_checkpoint(tmp_path / "checkpoints/step-4")) == []
    assert not (tmp_path / "checkpoints/step-4/stray").exists()


@pytest.mark.parametrize("name", ["step-9.incomplete", "step-9.deleted"])
def test_what_a_kill_left_behind_is_no_checkpoint_and_goes(tmp_path: Path, name: str) -> None:
    target = store(tmp_path)
    target.save(Engine(), manifest(1))
    shutil.copytree(tmp_path / "checkpoints/step-1", tmp_path / "checkpoints" / name)
    assert steps(tmp_path) == [1]
    target.save(Engine(), manifest(2))
    assert not (tmp_path / "checkpoints" / name).exists()


def test_every_byte_is_on_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of what a crash of the machine could cut: files, manifest, folder, name."""
    log: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        log.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noted_rename(self: Path, target: Any) -> Path:
        log.append(f"rename {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    store(tmp_path).save(Engine(), manifest(6))
    assert [entry.replace(f".{os.getpid()}.tmp", "") for entry in log] == [
        f"sync {MODEL}",
        "sync manifest.json",
        "rename manifest.json",
        "sync step-6.incomplete",
        "rename step-6",
        "sync checkpoints",
        "sync latest",
        "rename latest",
        "sync checkpoints",
    ]


def test_a_flipped_bit_in_the_newest_is_named_and_the_one_before_taken(tmp_path: Path) -> None:
    target = store(tmp_path, keep_last=3)
    for step in (1, 2):
        target.save(Engine(), manifest(step))
    path = tmp_path / "checkpoints/step-2" / MODEL
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    start = target.choose_start()
    assert start.checkpoint is not None and start.checkpoint.step == 1
    (why,) = start.damaged
    assert f"step-2 is not a whole checkpoint: {MODEL} is not as it was written" in why
    with pytest.raises(UserError, match="is not as it was written"):
        store(tmp_path, resume=f"{tmp_path}@2").choose_start()
    shutil.rmtree(tmp_path / "checkpoints/step-1")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        target.choose_start()
