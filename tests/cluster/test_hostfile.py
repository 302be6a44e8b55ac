"""`deepspeed --hostfile` over two hosts, by the examples of launch/: the losses of one host, and an
end in time where the network between them fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import config_of
from tests.cluster.hosts import Hosts, wait_for, why_not
from tests.end_to_end.conftest import ROOT, SCRIPTS
from tests.end_to_end.jobs import Job
from tests.end_to_end.test_resume import lines, processes_of

EXAMPLES = ROOT / "launch"
SECONDS = 15  # of training.hang_timeout
_CPU_RANKS = "OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\nHOME={home}\n"


class Launcher:
    """The command of the README on n1, with a hostfile of n1 and n2, one rank each."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts = hosts
        hostfile = (EXAMPLES / "hosts.example").read_text()
        (folder / "hosts").write_text(hostfile.replace("slots=8", "slots=1").replace("node", "n"))
        self.words = [SCRIPTS / "deepspeed", "--hostfile", folder / "hosts", "--master_addr", "n1"]
        example = EXAMPLES / "deepspeed_env.example"
        environment = folder / "deepspeed_env"
        environment.write_text(_as_it_says(example) + _CPU_RANKS.format(home=os.environ["HOME"]))
        self.env = {"DS_ENV_FILE": str(environment), "DS_ACCELERATOR": "cpu"}
        own = re.search(r'export (\w+)="(.*)"', example.read_text())
        assert own is not None
        self.env[own[1]] = own[2]

    def start(self, config: Path, *overrides: str) -> subprocess.Popen[str]:
        train = ["launch/train.py", "--config", config, *overrides]
        return subprocess.Popen(
            self.hosts.command("n1", *self.words, *train, env=self.env),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def _as_it_says(example: Path) -> str:
    """The variables of deepspeed_env.example, by the command that stands in it."""
    command = re.search(r"grep .* (?=> )", example.read_text())
    assert command is not None
    return subprocess.run(
        command[0], shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def launcher(hosts: Hosts, tmp_path: Path) -> Launcher:
    if lacks := why_not("pdsh"):
        pytest.skip(lacks)
    return Launcher(hosts, tmp_path)


@pytest.mark.parametrize("tensor", [2, 1])
def test_losses_over_two_hosts_match_one_host(
    launcher: Launcher, corpus: Path, tmp_path: Path, tensor: int
) -> None:
    parallel: dict[str, object] = {"tensor": tensor}
    process = launcher.start(config_of(tmp_path / "two", corpus, 6, parallel=parallel))
    one = Job(config_of(tmp_path / "one", corpus, 6, parallel=parallel), ranks=2)
    assert one.wait() == [0, 0], one.printed()
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    assert "on 2 hosts" in said and "on 2 hosts" not in one.printed()
    warned = "tensor-parallel ranks lie on several hosts (n1, n2)"
    assert (warned in said) == (tensor == 2)
    assert warned not in one.printed()


def test_a_cut_link_ends_the_job_and_the_run_goes_on_after(
    launcher: Launcher, hosts: Hosts, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = config_of(run, corpus, 200, parallel={"tensor": 2})
    process = launcher.start(config, f"training.hang_timeout={SECONDS}")
    wait_for((run / "checkpoints/step-20").exists, 240, lambda: f"{process.poll()}")
    hosts.cut("n2")
    began = time.monotonic()
    try:
        said, _ = process.communicate(timeout=120)
        seconds = time.monotonic() - began
        wait_for(lambda: not processes_of(config), 60 - seconds, lambda: "ranks are left behind")
    finally:
        hosts.mend("n2")
    assert seconds < 60
    assert process.returncode != 0
    (error,) = [line for line in said.splitlines() if "error: no progress" in line]
    assert "rank 0 on n1 is at step" in error and "no answer from rank 1 on n2" in error
    assert "training.hang_timeout" in error

    process = launcher.start(config)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "resuming" in said
    whole = Job(config_of(tmp_path / "whole", corpus, 200, parallel={"tensor": 2}), ranks=2)
    assert whole.wait() == [0, 0], whole.printed()
    assert lines(run) == lines(tmp_path / "whole")
