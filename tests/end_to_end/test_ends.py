"""How a run ends before its last step: by signals, by hanging, by steps that are not finite."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from matformer_dist.checkpoints.deepspeed_files import STATES
from matformer_dist.checkpoints.universal import load_universal
from matformer_dist.run_directory import find_checkpoint, read_checkpoints
from matformer_dist.training.preemption import SAME_SECONDS
from tests.end_to_end.conftest import ROOT, launch, write_config
from tests.end_to_end.jobs import Job
from tests.end_to_end.test_resume import lines, processes_of

PREEMPTED = 75


def config_of(corpus: Path, run: Path, steps: int = 4000, **sections: dict[str, object]) -> Path:
    tree: dict[str, dict[str, object]] = {
        "training": {
            "steps": steps, "seq_len": 16, "micro_batch_size": 4, "global_batch_size": 8,
            "precision": "fp32",
        },
        "checkpoint": {},
        "evaluation": {"batches": 1},
        "logging": {"every": 1, "tensorboard": False},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return write_config(run.with_suffix(".yaml"), corpus, run, **tree)


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_begun(run: Path, steps: int = 1) -> Callable[[], bool]:
    path = run / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count("\n") >= steps


@pytest.mark.parametrize(
    ("ranks", "number", "receiver"),
    [(1, signal.SIGTERM, 0), (2, signal.SIGUSR1, 1)],  # a rank that is not the main one, too
)
def test_the_first_signal_ends_a_run_behind_a_checkpoint_of_its_last_step(
    corpus: Path, tmp_path: Path, ranks: int, number: int, receiver: int
) -> None:
    run = tmp_path / "run"
    config = config_of(corpus, run, parallel={"tensor": ranks})
    job = Job(config, ranks=ranks)
    wait_for(has_begun(run))
    job.signal(number, receiver)
    assert job.wait() == [PREEMPTED] * ranks, job.printed()
    said = [line for line in job.printed().splitlines() if "ended the run" in line]
    assert len(said) == 1 and signal.Signals(number).name in said[0]
    assert "Traceback" not in job.printed()
    step = find_checkpoint(run).step
    assert [line["step"] for line in lines(run)] == list(range(1, step + 1))
    # The same command goes on.
    job = Job(config, "training.steps=" + str(step + 2), ranks=ranks)
    assert job.wait() == [0] * ranks
    assert [line["step"] for line in lines(run)] == list(range(1, step + 3))


def test_a_signal_while_starting_ends_the_run_at_its_first_step(
    corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = Job(config_of(corpus, run))
    wait_for(lambda: "operators" in job.printed())  # the plan is shown, nothing is built
    job.signal(signal.SIGTERM)
    assert job.wait() == [PREEMPTED], job.printed()
    assert find_checkpoint(run).step <= 1


def test_a_signal_ends_an_evaluation_which_the_next_start_makes_good(
    corpus: Path, tmp_path: Path
) -> None:
    """Its checkpoint is there already, and holds the line of metrics that is not complete."""

    def job_of(run: Path) -> Job:
        evaluation: dict[str, object] = {"every": 2, "batches": 150}
        config = config_of(corpus, run, 4, evaluation=evaluation, checkpoint={"every": 2})
        return Job(config)

    run = tmp_path / "run"
    job = job_of(run)
    wait_for(lambda: (run / "checkpoints/step-2").exists())
    job.signal(signal.SIGTERM)
    assert job.wait() == [PREEMPTED], job.printed()
    assert "checkpoint of step 2 is saved" in job.printed()
    assert [line["step"] for line in lines(run)] == [1]
    for _ in range(2):  # the second finds nothing left to do
        job = job_of(run)
        assert job.wait() == [0], job.printed()
    whole = job_of(tmp_path / "whole")
    assert whole.wait() == [0], whole.printed()
    assert lines(run) == lines(tmp_path / "whole")


def test_the_second_signal_ends_a_rank_that_waits_for_others_at_once(
    corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = Job(config_of(corpus, run, parallel={"tensor": 2}), ranks=2)
    wait_for(has_begun(run))
    job.signal(signal.SIGSTOP, 1)
    time.sleep(0.5)  # rank 0 waits in a collective by now
    job.signal(signal.SIGTERM, 0)
    time.sleep(SAME_SECONDS + 0.5)
    assert job.ranks[0].is_alive()
    job.signal(signal.SIGTERM, 0)
    job.ranks[0].join(5)
    assert job.ranks[0].exitcode == 128 + signal.SIGTERM
    job.kill()


def test_a_signal_to_all_processes_of_a_deepspeed_job_lets_its_ranks_save(
    corpus: Path, tmp_path: Path
) -> None:
    """As a cluster sends it: the ranks get it from their launcher once more.

    The launcher ends with a code of its own, whatever its ranks do.
    """
    run = tmp_path / "run"
    config = config_of(corpus, run, parallel={"tensor": 2})
    process = subprocess.Popen(
        launch(config, ranks=2),
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(has_begun(run))
    for number in processes_of(config):
        os.kill(number, signal.SIGTERM)
    assert process.wait(60) != 0
    wait_for(lambda: not processes_of(config), 60)
    (saved,) = read_checkpoints(run).complete
    assert lines(run)[-1]["step"] == saved.step


@pytest.mark.parametrize("hung", [0, 1])  # rank 0 keeps the store that ranks ask
def test_a_hung_rank_is_named(corpus: Path, tmp_path: Path, hung: int) -> None:
    run = tmp_path / "run"
    job = Job(config_of(corpus, run, parallel={"tensor": 2}), "training.hang_timeout=4", ranks=2)
    wait_for(has_begun(run))
    job.signal(signal.SIGSTOP, hung)
    job.ranks[1 - hung].join(60)
    printed = job.printed()
    job.kill()
    assert job.ranks[1 - hung].exitcode == 1
    (said,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert f"no answer from rank {hung}" in said and f"rank {1 - hung} is at step" in said
    assert "hang_timeout" in said


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")]
)
def test_steps_that_are_not_finite_change_nothing_and_end_the_run(
    corpus: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    """The weights blow up in one step; those saved at the end are the ones from then."""
    run = tmp_path / "run"
    config = config_of(
        corpus,
        run,
        optimizer={"lr": 1e30},
        training={
            "steps": 50, "seq_len": 16, "micro_batch_size": 4, "global_batch_size": 8,
            "precision": precision, "max_skipped_steps": 3,
        },
        deepspeed={"zero_optimization": {"stage": stage}},
        checkpoint={"every": 1, "keep_last": 2},
        schedule={"warmup_steps": 0},
    )  # fmt: skip
    job = Job(config)
    assert job.wait() == [2], job.printed()
    (said,) = [line for line in job.printed().splitlines() if line.startswith("error: ")]
    assert "last 3 steps was not finite" in said and "optimizer.lr" in said
    assert job.printed().count("is skipped") == 3
    saved = read_checkpoints(run).complete
    skipped = {checkpoint.step: checkpoint.manifest.skipped_steps for checkpoint in saved}
    last = saved[-1].step
    # Those from before are still there: weights that blew up must not be all that is left.
    assert skipped == {last - 3: 0, last: 3}
    assert lines(run)[-1]["skipped_steps"] == 3
    before, *after = [load_universal(checkpoint) for checkpoint in saved[-2:]]
    for model, name, state in product(after, before.whole, STATES):
        assert torch.equal(model.value(name, state), before.value(name, state)), (name, state)
    assert {model.optimizer_steps for model in after} == {before.optimizer_steps}


def test_a_full_disk_while_saving_leaves_the_checkpoint_before(
    corpus: Path, tmp_path: Path
) -> None:
    """On a small file system of its own, mounted in a namespace where no root is needed."""
    outside = subprocess.run(
        ["unshare", "-rm", "true"], capture_output=True, text=True, check=False
    )
    if outside.returncode:
        pytest.skip(f"no mount namespaces here: {outside.stderr.strip()}")
    run = tmp_path / "small" / "run"
    run.parent.mkdir()
    config = config_of(corpus, tmp_path / "config", checkpoint={"every": 5, "keep_last": 99})
    command = " ".join(launch(config, f"run.dir={run}"))
    script = (
        f"mount -t tmpfs -o size=6m none {run.parent} && {command}; "
        f"echo exit $?; ls {run}/checkpoints; {command} training.steps=1"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert "exit 2" in done.stdout, done.stdout + done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")][:1]
    assert "could not be written" in said and "No space left on device" in said
    assert "is untouched" in said
    listed = done.stdout.split("exit 2")[1].split()
    assert "step-5" in listed and not any(name.endswith(".incomplete") for name in listed)
    assert "resuming" in done.stdout.split("exit 2")[1], "the one before was to be loaded"


def test_a_signal_to_a_rank_and_its_data_workers_is_the_ranks(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = config_of(corpus, run)
    process = subprocess.Popen(
        launch(config, "data.workers=2"),
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(has_begun(run))
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, said
    assert "Traceback" not in said


def test_a_run_that_began_from_another_goes_on_by_the_same_command(
    corpus: Path, tmp_path: Path
) -> None:
    first = Job(config_of(corpus, tmp_path / "first", steps=4))
    assert first.wait() == [0], first.printed()
    config = config_of(corpus, tmp_path / "second", steps=6)
    command = (f"checkpoint.resume={tmp_path / 'first'}@4", "checkpoint.every=1")
    job = Job(config, *command)
    assert job.wait() == [0], job.printed()
    assert [line["step"] for line in lines(tmp_path / "second")] == [5, 6]
    job = Job(config, *command, "training.steps=8")
    assert job.wait() == [0], job.printed()
    assert [line["step"] for line in lines(tmp_path / "second")] == [5, 6, 7, 8]


def test_two_jobs_do_not_write_to_one_run(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = config_of(corpus, run)
    job = Job(config)
    wait_for(has_begun(run))
    other = Job(config)
    assert other.wait() == [2]
    assert "another job is writing to" in other.printed()
    assert job.is_alive
    job.kill()
