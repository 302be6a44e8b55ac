"""Versions, disk, limits, and two ranks that answer, fail or stay silent."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from matformer_dist import doctor
from matformer_dist.doctor import devices, machine, packages, two_ranks
from matformer_dist.doctor.finding import Finding
from matformer_dist.parallel.topology import cpu_environment
from tests.unit.submodels.synthetic_run import model_config, random_model, write_run

ROOT = Path(__file__).parents[3]


def test_tested_versions_are_those_that_constraints_install() -> None:
    pinned: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if match := re.match(r"([\w-]+)==([\w.]+)", line):
            pinned.setdefault(match[1], set()).add(match[2])
    assert {name: set(versions) for name, versions in packages.TESTED.items()} == {
        name: pinned[name] for name in packages.TESTED
    }
    assert all(not one.problem for one in packages.packages()), "the environment is the tested one"


@pytest.mark.parametrize(
    ("found", "text", "says", "fails"),
    [
        ("2.13.0", "2.13.0, tested", "", False),
        ("2.13.0+cu130", "2.13.0+cu130, tested", "", False),
        ("2.12.1", "2.12.1, not tested; tested: 2.13.0", "try pip install torch==2.13.0", False),
        ("2.16.0", "2.16.0, not tested", "is outside of <2.16,>=2.11", True),
        ("2.10.0+cpu", "2.10.0+cpu, not tested", "outside of", True),
        ("", "not installed", "pip install torch==2.13.0", True),
    ],
)
def test_a_version_is_held_against_the_tested_and_the_allowed(
    found: str, text: str, says: str, fails: bool
) -> None:
    finding = packages.package_finding("torch", found, "<2.16,>=2.11")
    assert finding.text.startswith(text) and says in finding.problem and finding.fails == fails
    assert bool(finding.problem) == bool(says)


def test_what_is_optional_may_be_missing() -> None:
    assert not packages.package_finding("transformers", "", "").problem


def disk(directory: Path) -> Finding:
    (finding,) = machine.disk(directory)
    return finding


def usage(total: int, free: int) -> Any:
    return lambda path: types.SimpleNamespace(total=total, free=free)


def test_a_disk_on_which_the_next_checkpoint_does_not_fit_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, random_model(model_config()), step=2)
    size = sum(p.stat().st_size for p in (tmp_path / "checkpoints/step-2").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", usage(2**40, size - 1))
    assert disk(tmp_path).fails and "the next checkpoint does not fit" in disk(tmp_path).problem
    monkeypatch.setattr(shutil, "disk_usage", usage(2**40, size))
    assert not disk(tmp_path).fails and "two are kept while a third" in disk(tmp_path).problem
    monkeypatch.setattr(shutil, "disk_usage", usage(2**40, 2**39))
    assert not disk(tmp_path).problem and "the newest checkpoint there has" in disk(tmp_path).text
    assert not disk(tmp_path / "not/there/yet").problem
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert disk(tmp_path / "not/there/yet").fails
    assert f"{tmp_path} is not writable" in disk(tmp_path / "not/there/yet").problem


def test_a_file_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert disk(tmp_path / "file").fails
    assert f"{tmp_path / 'file'} is a file" in disk(tmp_path / "file").problem


def test_gpus_are_told_with_what_stands_in_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(driver: str, cuda: str | None) -> Finding:
        monkeypatch.setattr(devices, "_driver", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        return list(devices.accelerator())[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not found("", None).problem and not found("", "13.0").problem
    assert "is a CPU build" in found("580.1", None).problem and not found("580.1", None).fails
    assert "finds no GPU" in found("580.1", "13.0").problem and found("580.1", "13.0").fails
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 7))
    properties = types.SimpleNamespace(name="H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (2**35 * (1 + i), 2**37))
    assert found("580.1", "13.0") == Finding(
        "GPU 1", "H100, compute capability 9.0, 64.0 of 128.0 GiB free"
    )
    cuda, first, _ = devices.accelerator()
    assert cuda.text == "13.0, driver 580.1, NCCL 2.29.7"
    assert "GPU 0's memory is taken already" in first.problem


def test_low_limits_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(shutil, "disk_usage", usage(2**26, 2**26))
    problems = {one.what: one.problem for one in machine.limits() if one.problem}
    assert "only 1024 files may be open at once" in problems["open files"]
    assert "--shm-size" in problems["shared memory"]
    no_limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: no_limit)
    monkeypatch.setattr(shutil, "disk_usage", usage(2**35, 2**35))
    assert not any(one.problem for one in machine.limits())


def test_two_real_ranks_reduce_something() -> None:
    found = two_ranks.try_ranks("gloo", cpu_environment(2), limit_s=120)
    assert not found.problem and found.text.startswith("all-reduce right, ")
    broken = {**cpu_environment(2), "GLOO_SOCKET_IFNAME": "absent0"}
    found = two_ranks.try_ranks("gloo", broken, limit_s=120)
    assert found.fails and "absent0" in found.text and "set GLOO_SOCKET_IFNAME" in found.problem


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import time; time.sleep(600)", "no answer in 2 s"),
        ("import sys; print('the cause'); sys.exit(sys.argv[-4] == '1' and 3)", "(the cause)"),
        ('print(\'{"right": false, "bytes_per_second": 1, "latency_ms": 1}\')', "was wrong"),
        ("print('hello')", "did not say what it measured"),
        ("", "did not say what it measured"),
    ],
)
def test_ranks_that_do_not_do_what_they_should(
    program: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    found = two_ranks.try_ranks("gloo", None, limit_s=2 if "no answer" in says else 60)
    assert found.fails and says in found.text and says in found.problem


def test_what_cannot_be_looked_at_does_not_hide_the_rest() -> None:
    def look(error: Exception) -> Iterator[Finding]:
        yield Finding("a", "b")
        raise error

    first, broken = doctor._looked_at("x", lambda: look(ImportError("no libtorch\n.so")))
    assert first.text == "b"
    assert broken.fails and broken.problem == "x: ImportError: no libtorch .so"
    assert not list(doctor._looked_at("x", lambda: look(OSError(1, "no"))))[1].fails
