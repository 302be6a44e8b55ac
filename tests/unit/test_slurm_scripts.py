"""What launch/slurm/ asks of srun, and what it does with the answer. Slurm's commands
are ours here; tests/cluster runs the same scripts under a real one.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE = '#!/bin/sh\necho "{name} $*" >> "$CALLS"\n{body}\n'
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_CPUS_ON_NODE": "32",
    "SLURM_GPUS_ON_NODE": "4",
}


def run(
    folder: Path, script: str, *words: str, **env: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script's end in a job of Slurm's, and the commands that it called."""
    bodies = {
        "srun": "exit ${CODE:-0}",
        "scontrol": "",
        "matformer": 'echo "threads $OMP_NUM_THREADS" >> "$CALLS"',
    }
    for name, body in bodies.items():
        (folder / name).write_text(FAKE.format(name=name, body=body))
        (folder / name).chmod(0o755)
    submitted = folder / "checkout"  # without a .venv, whose matformer would come first
    (submitted / "launch").mkdir(parents=True, exist_ok=True)
    if not (submitted / "launch/slurm").exists():
        (submitted / "launch/slurm").symlink_to(ROOT / "launch/slurm")
    calls = folder / "calls"
    calls.write_text("")
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMP_"))}
    done = subprocess.run(
        ["bash", ROOT / "launch/slurm" / script, *words],
        env={
            **bare,
            **JOB,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "LOGS": str(folder / "logs"),
            "SLURM_SUBMIT_DIR": str(submitted),
            **env,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done, calls.read_text().splitlines()


def test_ranks_and_cores_match_the_gpus_and_cores_of_the_nodes(tmp_path: Path) -> None:
    done, (called,) = run(tmp_path, "train.sbatch", "--config", "a b.yaml")
    assert done.returncode == 0, done.stderr
    for option in ("--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=8"):
        assert option in called.split()
    assert f"--output={tmp_path}/logs/train-7/start-0/rank-%t.log" in called
    assert called.endswith("python -u launch/train.py --config a b.yaml")
    _, (called,) = run(tmp_path, "train.sbatch", RANKS_PER_NODE="64", SLURM_RESTART_COUNT="3")
    assert "--ntasks=128 " in called and "--cpus-per-task=1 " in called and "start-3" in called


@pytest.mark.parametrize(
    ("code", "start", "is_put_back"),
    [(75, 0, True), (75, 4, True), (75, 5, False), (0, 0, False), (1, 0, False), (2, 0, False),
     (138, 0, True), (137, 0, False), (143, 0, False)],
)  # fmt: skip
def test_only_an_asked_for_end_puts_a_job_back(
    tmp_path: Path, code: int, start: int, is_put_back: bool
) -> None:
    log = tmp_path / f"logs/train-7/start-{start}/rank-1.log"
    log.parent.mkdir(parents=True)
    log.write_text("step 1\nerror: why\n")
    done, called = run(
        tmp_path, "train.sbatch", CODE=str(code), MAX_REQUEUES="5", SLURM_RESTART_COUNT=str(start)
    )
    assert done.returncode == code
    assert ("scontrol requeue 7" in called) == is_put_back
    assert done.stdout.splitlines()[1] == "error: why"


def test_what_cannot_begin_says_why(tmp_path: Path) -> None:
    done, called = run(tmp_path, "train.sbatch", SLURM_GPUS_ON_NODE="")
    assert done.returncode == 2 and called == []
    assert "RANKS_PER_NODE" in done.stdout
    for script in ("train.sbatch", "extract.sbatch", "evaluate.sbatch"):
        done, called = run(tmp_path, script, SLURM_SUBMIT_DIR=str(tmp_path))
        assert done.returncode == 2 and called == []
        assert "is no checkout" in done.stderr


def test_tasks_of_an_array_are_parts_of_the_evaluation(tmp_path: Path) -> None:
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    words = ("runs/a b@9", "--heuristic")
    cores = {"SLURM_CPUS_PER_TASK": "6"}
    _, called = run(tmp_path, "evaluate.sbatch", *words, **task, **cores)
    assert called == ["matformer evaluate --part 4/8 runs/a b@9 --heuristic", "threads 6"]
    _, called = run(tmp_path, "evaluate.sbatch", *words, **task, **cores, PARTS="16")
    assert called[0].startswith("matformer evaluate --part 4/16 ")
    _, called = run(tmp_path, "extract.sbatch", "runs/mine", "--submodel", "S")
    assert called[0] == "matformer extract runs/mine --submodel S"
