"""What somebody pastes into a bug report, and its exit code."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.conftest import SCRIPTS, matformer, run, succeed


def test_the_doctor_looks_at_everything(tmp_path: Path) -> None:
    shown = succeed(matformer("doctor", "--dir", tmp_path))
    for what in (
        "system", "machine", "compiler", "matformer-dist", "torch", "deepspeed", "megatron-core",
        "GPUs", "operators", "would run", "interfaces", "InfiniBand", "gloo", "NCCL", "variables",
        "disk", "open files", "locked memory", "shared memory",
    ):  # fmt: skip
        assert f"\n{what:<14} " in f"\n{shown}"
    assert "could not be looked at" not in shown
    assert "2 gloo ranks   all-reduce right, " in shown and str(tmp_path) in shown


def test_what_will_fail_stands_at_the_end_and_in_the_exit_code() -> None:
    done = run("env", "GLOO_SOCKET_IFNAME=absent0", SCRIPTS / "matformer", "doctor")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    _, _, block = done.stdout.partition("\n\n")
    problems = [line for line in block.splitlines() if line.startswith("problem  ")]
    assert len(problems) == 2  # the choice, and the ranks that make it
    assert "GLOO_SOCKET_IFNAME names absent0, which is no interface here" in problems[0]
    assert "cannot communicate over gloo" in problems[1]
