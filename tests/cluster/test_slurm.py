"""The scripts of launch/slurm/, as they are, on a Slurm of two nodes: a job that is stopped, or
loses a node, goes on by itself, and the run is the one that was never stopped.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.conftest import config_of
from tests.cluster.hosts import wait_for
from tests.cluster.slurm import Slurm
from tests.end_to_end.jobs import Job
from tests.end_to_end.test_resume import lines

STEPS = 200


class Sbatch:
    """A job of train.sbatch, on CPUs; `size` is of nodes and ranks a node."""

    def __init__(self, slurm: Slurm, folder: Path, size: str, *words: object, **env: str) -> None:
        self.slurm = slurm
        self.folder = folder
        nodes, ranks = size.split(" x ")
        options = ("--parsable", f"--nodes={nodes}", "--gpus-per-node=0")
        slurm.wait_for_nodes(2)  # or a range would take one
        files = (f"--output={folder}/batch.log", "launch/slurm/train.sbatch")
        env = {"LOGS": str(folder), "RANKS_PER_NODE": ranks, "DS_ACCELERATOR": "cpu", **env}
        self.number = int(slurm.run("sbatch", *options, *files, *words, **env))

    def log(self, start: int = 0, rank: int = 0) -> str:
        path = self.folder / f"train-{self.number}" / f"start-{start}" / f"rank-{rank}.log"
        return path.read_text() if path.exists() else ""

    @property
    def said(self) -> str:
        path = self.folder / "batch.log"
        return path.read_text() if path.exists() else ""

    def wait_to(self, state: str) -> dict[str, str]:
        return self.slurm.wait_for(self.number, state, lambda: self.said + self.log() + self.log(1))

    def wait_for_log(self, text: str, start: int = 0) -> None:
        wait_for(lambda: text in self.log(start), 240, lambda: self.said + self.log(start))


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that was never stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    job = Job(config_of(run, corpus, STEPS), ranks=2)
    assert job.wait(240) == [0, 0], job.printed()
    return run


def test_a_signalled_job_saves_and_goes_on_to_the_same_losses(
    slurm: Slurm, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = Sbatch(slurm, tmp_path, "2 x 1", "--config", config_of(run, corpus, STEPS))
    job.wait_for_log("step  20/")
    slurm.run("scancel", "--signal=USR1", job.number)
    found = job.wait_to("COMPLETED")
    assert found["Restarts"] == "1"
    assert "SIGUSR1 ended the run" in job.log() and "resuming" not in job.log()
    assert "saved (exit code 75): back into the queue" in job.said
    assert "resuming" in job.log(1) and "on 2 hosts" in job.log(1)
    assert lines(run) == lines(whole)


def test_a_run_goes_on_on_one_node_where_the_other_fails(
    slurm: Slurm, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = config_of(run, corpus, STEPS, parallel={"tensor": 2})
    job = Sbatch(slurm, tmp_path, "1-2 x 2", "--config", config)
    job.wait_for_log("step  30/")
    slurm.hosts.cut("n2")
    try:
        found = job.wait_to("COMPLETED")
    finally:
        slurm.hosts.mend("n2")
    slurm.revive("n2")
    assert (found["Restarts"], found["NodeList"]) == ("1", "n1")
    assert "4 = tensor 2 x data 2" in job.log() and "2 = tensor 2 x data 1" in job.log(1)
    assert "several hosts" not in job.log()
    assert "resuming" in job.log(1)
    for line, reference in zip(lines(run), lines(whole), strict=True):
        assert line["train_loss"] == pytest.approx(reference["train_loss"], rel=1e-4)


def test_other_ends_are_final(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """What a user must mend, a job that is cancelled, and one that was put back often enough."""
    config = config_of(tmp_path / "run", corpus, STEPS)
    job = Sbatch(slurm, tmp_path, "2 x 1", "--config", config, "training.steps=-1")
    found = job.wait_to("FAILED")
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")
    (error,) = [line for line in job.said.splitlines() if line.startswith("error: ")]
    assert "training.steps" in error

    job = Sbatch(slurm, tmp_path, "2 x 1", "--config", config, MAX_REQUEUES="0")
    job.wait_for_log("operators")
    slurm.run("scancel", "--signal=USR1", job.number)
    found = job.wait_to("FAILED")
    assert (found["ExitCode"], found["Restarts"]) == ("75:0", "0")
    assert "which MAX_REQUEUES allows" in job.said

    job = Sbatch(slurm, tmp_path, "2 x 1", "--config", config)
    job.wait_for_log("operators")
    slurm.run("scancel", job.number)
    assert job.wait_to("CANCELLED")["Restarts"] == "0"
    slurm.wait_for_nodes(2)
    assert slurm.show(job.number)["JobState"] == "CANCELLED"


def test_submodels_are_extracted_and_evaluated_in_parts(
    slurm: Slurm, whole: Path, tmp_path: Path
) -> None:
    output = f"--output={tmp_path}/%x-%a.log"
    options = ("sbatch", "--wait", "--mem=0", "--cpus-per-task=1", output)
    taken = ("--submodel", "S", "--submodel", "S:1,L:1", "--output", tmp_path / "models")
    slurm.run(*options, "launch/slurm/extract.sbatch", whole, *taken)
    assert len(list((tmp_path / "models").iterdir())) == 2
    script = "launch/slurm/evaluate.sbatch"
    words = ("--heuristic", "--submodel", "S:1,L:1")
    slurm.run(*options, "--array=0-1", script, whole, *words, OMP_NUM_THREADS="1")
    evaluation = json.loads((whole / "evaluation.json").read_text())
    found = {entry["submodel"]: entry["loss"] for entry in evaluation["submodels"]}
    assert {"S", "M", "L", "XL", "S:1,M:1"} <= found.keys()
    final = lines(whole)[-1]
    assert evaluation["step"] == final["step"] == STEPS
    for name, loss in final["val_loss"].items():  # of the same sequences
        assert found[name] == pytest.approx(loss, rel=1e-5)
