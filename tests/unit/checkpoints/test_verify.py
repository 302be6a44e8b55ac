"""Whatever happens to a file of a checkpoint is found."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matformer_dist.checkpoints.verify import faults, verify
from matformer_dist.errors import UserError
from matformer_dist.run_directory import MANIFEST, DamagedError, read_checkpoint
from tests.unit.submodels.synthetic_run import model_config, random_model, write_run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, and that of another step beside it."""
    run = tmp_path_factory.mktemp("run")
    for step, seed in ((4, 1), (8, 2)):
        write_run(run, random_model(model_config(), seed), tensor=2, step=step)
    return run / "checkpoints" / "step-4"


@pytest.fixture
def damaged(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def found(path: Path) -> str:
    """What is said to be wrong with a checkpoint, by its reader or by reading all of it."""
    try:
        return ", ".join(faults(read_checkpoint(path)))
    except UserError as error:
        return str(error)


def names(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_a_whole_checkpoint_has_no_fault(original: Path) -> None:
    assert len(names(original)) == 3
    assert found(original) == ""


@settings(deadline=None, max_examples=150)
@given(choice=st.integers(0, 2), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(
    original: Path, tmp_path_factory: pytest.TempPathFactory, choice: int, place: float, bit: int
) -> None:
    copy = Path(shutil.copytree(original, tmp_path_factory.mktemp("flip") / original.name))
    file = copy / names(copy)[choice]
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    file.write_bytes(content)
    assert found(copy), (file.name, place, bit)
    shutil.rmtree(copy.parent)


@settings(deadline=None, max_examples=60)
@given(choice=st.integers(0, 2), place=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_found(
    original: Path, tmp_path_factory: pytest.TempPathFactory, choice: int, place: float
) -> None:
    copy = Path(shutil.copytree(original, tmp_path_factory.mktemp("cut") / original.name))
    file = copy / names(copy)[choice]
    content = file.read_bytes()
    file.write_bytes(content[: int(place * len(content))])
    assert found(copy), (file.name, place)
    shutil.rmtree(copy.parent)


@pytest.mark.parametrize("choice", range(3))
def test_every_deletion_and_every_swap_is_found(original: Path, damaged: Path, choice: int) -> None:
    name = names(original)[choice]
    (damaged / name).unlink()
    assert name in found(damaged)
    shutil.copy(original.with_name("step-8") / name, damaged / name)  # of another step
    assert found(damaged)
    shutil.copy(original / name, damaged / name)
    assert found(damaged) == ""


def test_files_of_two_ranks_in_each_others_place_are_found(damaged: Path) -> None:
    one, other = (name for name in names(damaged) if name != MANIFEST)
    (damaged / one).rename(damaged / "aside")
    (damaged / other).rename(damaged / one)
    (damaged / "aside").rename(damaged / other)
    assert one in found(damaged) and other in found(damaged)


def test_a_manifest_of_another_step_is_found(original: Path, tmp_path: Path) -> None:
    """Also where all files came with it."""
    moved = Path(shutil.copytree(original, tmp_path / "step-6"))
    assert "is that of step 4" in found(moved)


def test_a_rank_too_many_is_found(damaged: Path) -> None:
    shutil.copy(damaged / "mp_rank_00_model_states.pt", damaged / "mp_rank_02_model_states.pt")
    assert "mp_rank_02_model_states.pt is not in manifest.json" in found(damaged)


def test_parts_add_up_to_the_whole(damaged: Path) -> None:
    for name in names(damaged):
        if name != MANIFEST:
            content = bytearray((damaged / name).read_bytes())
            content[100] ^= 1
            (damaged / name).write_bytes(content)
    checkpoint = read_checkpoint(damaged)
    parts = [faults(checkpoint, part=part, parts=3) for part in range(3)]
    assert sorted(fault for part in parts for fault in part) == sorted(faults(checkpoint))
    assert len(faults(checkpoint)) == 2


def test_verify_reads_a_run_or_one_checkpoint_and_tells_which_is_damaged(
    original: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(original.parent.parent, tmp_path / "run"))
    verdicts = verify(str(run))
    assert [(v.path.name, v.faults) for v in verdicts] == [("step-4", []), ("step-8", [])]
    assert str(verdicts[0]).startswith("good: 2 files, ") and "TP 2 x DP 1" in str(verdicts[0])
    file = run / "checkpoints/step-8/mp_rank_01_model_states.pt"
    content = bytearray(file.read_bytes())
    content[-30] ^= 1
    file.write_bytes(content)
    (run / "checkpoints/step-4/manifest.json").unlink()
    said = {v.path.name: str(v) for v in verify(str(run))}
    assert said["step-8"].startswith("damaged: mp_rank_01_model_states.pt is not as it was")
    assert said["step-4"] == "damaged: it has no manifest.json"
    for name in (f"{run}@8", str(run / "checkpoints/step-8")):
        (verdict,) = verify(name)
        assert verdict.path.name == "step-8" and verdict.faults


def test_everything_that_is_wrong_is_said(original: Path, damaged: Path) -> None:
    for name in names(original)[1:]:
        with (damaged / name).open("ab") as file:
            file.write(b"x")
    (damaged / "a.pt").write_bytes(b"")
    (verdict,) = verify(str(damaged))
    assert len(verdict.faults) == 2
    many = DamagedError(damaged, *"abcdef")
    assert str(many).endswith("a; b; c; and 3 more") and str(
        pickle.loads(pickle.dumps(many))
    ) == str(many)


@pytest.mark.parametrize("name", ["absent", "{run}/checkpoints", "{run}@x"])
def test_what_is_no_run_is_said(original: Path, name: str) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        verify(name.format(run=original.parent.parent))
