"""Whole weights from tensor-parallel shards, and what is said where files do not hold them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from matformer_dist.checkpoints.convert import convert
from matformer_dist.checkpoints.files import hash_file
from matformer_dist.checkpoints.universal import load_universal
from matformer_dist.errors import UserError
from matformer_dist.run_directory import MANIFEST, Layout, Manifest, find_checkpoint
from tests.unit.submodels.synthetic_run import NESTING, model_config, random_model, write_run

MODEL_FILE = "checkpoints/step-5/mp_rank_01_model_states.pt"


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_whole_weights_match_the_model_that_was_dealt(
    tmp_path: Path, tensor: int, tied: bool
) -> None:
    lm = random_model(model_config(tied_embeddings=tied))
    universal = load_universal(find_checkpoint(write_run(tmp_path, lm, tensor=tensor)))
    expected = dict(lm.named_parameters())
    assert list(universal.whole) == list(expected)
    built = dict(universal.build().named_parameters())
    for name, weight in expected.items():
        assert torch.equal(universal.weight(name), weight), name
        assert torch.equal(built[name], weight), name
        for rows in NESTING.widths if ".ffn." in name else ():
            assert torch.equal(universal.weight(name, rows=rows), weight[:rows]), name


def _reseal(path: Path, **changes: Any) -> None:
    """Change a manifest as somebody would who knows how it is sealed."""
    manifest = Manifest.model_validate_json(path.read_text())
    path.write_text(manifest.model_copy(update=changes).sealed())


def _rewrite(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path)
    manifest = Manifest.model_validate_json((path.parent / MANIFEST).read_text())
    _reseal(path.parent / MANIFEST, files={**manifest.files, path.name: hash_file(path)})


def _cut_file(run: Path) -> None:
    with (run / MODEL_FILE).open("r+b") as file:
        file.truncate(1000)


def _fill_with_zeros(run: Path) -> None:
    (run / MODEL_FILE).write_bytes(bytes((run / MODEL_FILE).stat().st_size))


def _forget_file(run: Path) -> None:
    (run / MODEL_FILE).unlink()
    path = run / "checkpoints/step-5/manifest.json"
    files = Manifest.model_validate_json(path.read_text()).files
    _reseal(path, files={k: v for k, v in files.items() if k != Path(MODEL_FILE).name})


def _newer_format(run: Path) -> None:
    _reseal(run / "checkpoints/step-5/manifest.json", format=3)


def _other_stage(run: Path) -> None:
    layout = Layout(tensor=2, data=1, zero_stage=1)
    _reseal(run / "checkpoints/step-5/manifest.json", layout=layout)


def _without_weight(run: Path) -> None:
    state = torch.load(run / MODEL_FILE)
    del state["module"]["layers.1.ffn.w_in"]
    _rewrite(run / MODEL_FILE, state)


def _with_code(run: Path) -> None:
    _rewrite(run / MODEL_FILE, {"module": subprocess.Popen})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_file, "whole checkpoint: mp_rank_01_model_states.pt has 1000 bytes"),
        (_fill_with_zeros, "damaged: cannot read .*mp_rank_01"),
        (_forget_file, "incomplete: .*mp_rank_01_model_states.pt is missing"),
        (_newer_format, "has format 3, this version of matformer_dist reads format 2"),
        (_other_stage, "incomplete: .*zero_pp_rank_0_mp_rank_00_optim_states.pt is missing"),
        (_without_weight, "holds 0 of the 2048 values of layers.1.ffn.w_in"),
        (_with_code, "damaged: cannot read .*mp_rank_01"),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    run = write_run(tmp_path, random_model(model_config()), tensor=2)
    damage(run)
    with pytest.raises(UserError, match=message):
        load_universal(find_checkpoint(f"{run}@5")).build()


def test_reading_needs_no_deepspeed(tmp_path: Path) -> None:
    """Extraction runs where training cannot; and these imports take seconds (sympy is torch's
    compiler).
    """
    run = write_run(tmp_path, random_model(model_config()), tensor=2)
    script = (
        "import sys; from pathlib import Path;"
        "from matformer_dist.submodels.extract import extract;"
        f"extract({str(run)!r}, ['M'], output=Path({str(tmp_path / 'out')!r}), format='hf');"
        "heavy = ('deepspeed', 'megatron', 'transformers', 'sympy');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_converted_run_is_a_run_of_its_own(tmp_path: Path) -> None:
    """Else training by its config.yaml would go on in the first one."""
    run = write_run(tmp_path / "run", random_model(model_config()))
    _reseal(run / "checkpoints/step-5/manifest.json", has_optimizer=False)
    convert(str(run), tmp_path / "copy")
    tree = yaml.safe_load((tmp_path / "copy/config.yaml").read_text())
    assert tree["run"]["dir"] == str(tmp_path / "copy")
    assert tree["data"]["tokenizer"] == str(tmp_path / "copy/tokenizer.model")
    before = yaml.safe_load((run / "config.yaml").read_text())
    assert {k for k in tree if tree[k] != before[k]} == {"run", "data"}
