"""One pass over the parent, in bounded memory, whatever its files; and what a full disk does."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matformer_dist.checkpoints.files import hash_file
from matformer_dist.checkpoints.memory import ReusedMemory
from matformer_dist.checkpoints.universal import UniversalModel, load_universal
from matformer_dist.checkpoints.universal_files import value_path
from matformer_dist.errors import UserError
from matformer_dist.models.matlm import MatLM
from matformer_dist.run_directory import MANIFEST, UNIVERSAL, Manifest, find_checkpoint
from matformer_dist.submodels import extract as extract_module
from matformer_dist.submodels.entry import read_entry
from matformer_dist.submodels.extract import extract
from matformer_dist.submodels.parts import Part
from matformer_dist.submodels.safetensors_files import SafetensorsFiles, read_weights
from tests.unit.submodels.synthetic_run import model_config, random_model, write_run


@pytest.fixture(scope="module")
def lm() -> MatLM:
    return random_model(model_config())


@pytest.fixture(scope="module")
def run(lm: MatLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", lm, tensor=2)


@pytest.mark.parametrize("format", ["native", "hf", "gguf"])
def test_several_submodels_take_one_pass(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    if format == "gguf":
        pytest.importorskip("gguf")
    read: Counter[str] = Counter()
    weight_of = UniversalModel.weight

    def counted(self: UniversalModel, name: str, **how: Any) -> Tensor:
        read[name] += 1
        return weight_of(self, name, **how)

    monkeypatch.setattr(UniversalModel, "weight", counted)
    found = extract(str(run), ["S", "XL", "S:1,L:2"], output=tmp_path / "out", format=format)
    assert len(found) == 3
    assert read == Counter([*load_universal(find_checkpoint(run)).whole])


def test_whole_weights_give_what_ranks_give(lm: MatLM, run: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    checkpoint = whole / "checkpoints" / "step-5"
    for path in checkpoint.glob("*.pt"):
        path.unlink()
    for name, parameter in lm.named_parameters():
        path = value_path(checkpoint, name, "fp32")
        path.parent.mkdir(parents=True)
        torch.save({"param": parameter.detach()}, path)
    manifest = Manifest.model_validate_json((checkpoint / MANIFEST).read_text())
    files = {str(p.relative_to(checkpoint)): hash_file(p) for p in checkpoint.rglob("*.pt")}
    changed = manifest.model_copy(update={"layout": UNIVERSAL, "files": files})
    (checkpoint / MANIFEST).write_text(changed.sealed())
    for kind in ("native", "hf"):
        models = [
            extract(str(parent), ["S:2,L:1"], output=tmp_path / name / kind, format=kind)[0]
            for name, parent in [("a", run), ("b", whole)]
        ]
        ours, theirs = (dict(read_weights(model.path)) for model in models)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


_MEASURE = """
import re, sys
from pathlib import Path
from matformer_dist.submodels.extract import extract
small, large, output, options = *map(Path, sys.argv[1:4]), eval(sys.argv[4])
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
extract(str(small), ["S"], output=output / "small", **options)
before = peak()
models = extract(str(large), ["XL", "S:20"], output=output / "large", **options)
print(peak() - before, sum(model.bytes for model in models))
"""


@pytest.mark.parametrize(
    "options",
    [{"format": "native"}, {"format": "hf", "dtype": "bf16"}, {"format": "hf", "nested": True}],
    ids=["native", "hf", "nested"],
)
def test_memory_does_not_grow_with_the_model(
    run: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    shape = model_config(d_model=768, n_layers=20, max_seq_len=48)
    large = write_run(tmp_path / "run", random_model(shape), tensor=2)
    largest = 4 * 3 * 768 * 768
    words = [str(run), str(large), str(tmp_path / "out"), repr(options)]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *words], capture_output=True, text=True, check=True
    )
    grown, written = map(int, done.stdout.split())
    assert written > 180e6
    assert grown < 3 * largest + 64e6  # glibc keeps freed buffers of up to 32 MiB


def test_files_that_are_written_are_what_the_library_writes(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    odd = {"a": torch.randn(3, 5), "ü": torch.randn(7), "b": torch.randn(1)}
    for dtype in (torch.float32, torch.bfloat16):
        memory = ReusedMemory()  # shared, as by the models of one extraction
        parts = {name: [Part(name, tuple(t.shape), lambda w: w)] for name, t in odd.items()}
        files = SafetensorsFiles(parts, dtype, 10**9)
        files.open(tmp_path)
        for name, tensor in odd.items():
            files.write(parts[name][0], tensor, memory)
        files.close()
        stored = {name: tensor.to(dtype) for name, tensor in odd.items()}
        save_file(stored, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        ours = (tmp_path / "model.safetensors").read_bytes()
        assert len(ours) == (tmp_path / "theirs.safetensors").stat().st_size
        assert int.from_bytes(ours[:8], "little") % 8 == 0
        loaded = load_file(tmp_path / "model.safetensors")
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_a_disk_without_room_is_named_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**5, 10**5))
    with pytest.raises(UserError, match=r"out needs 0\.00 GB, the disk of .* 0\.00 GB free"):
        extract(str(run), ["S", "XL"], output=tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_what_was_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    extract(str(run), ["S"], output=output)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(extract_module, "sync_file", full)
    with pytest.raises(UserError, match=r"cannot write .*out: .*No space left"):
        extract(str(run), ["M"], output=output, force=True)
    assert list(tmp_path.iterdir()) == [output]
    assert read_entry(output)["submodel"] == "S"
    assert json.loads((output / "config.json").read_text())["granularities"] == ["S"] * 3


_STUCK = """
import sys, time
from pathlib import Path
from matformer_dist import cli
from matformer_dist.submodels import extract

def stuck(path):
    print("stuck", flush=True)
    time.sleep(60)

extract.sync_file = stuck
sys.argv = ["matformer", "extract", sys.argv[1], "--submodel", "S", "--output", sys.argv[2]]
cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing(run: Path, tmp_path: Path, number: int, code: int) -> None:
    command = [sys.executable, "-c", _STUCK, str(run), str(tmp_path / "deep/out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "stuck\n"
        assert list((tmp_path / "deep").iterdir())
        process.send_signal(number)
        assert process.wait() == code
    assert not list(tmp_path.iterdir())
