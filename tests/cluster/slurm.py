"""Slurm on the two hosts of hosts.py: slurmctld on n1, a slurmd on each, munge between them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from tests.cluster.hosts import NAMES, Hosts, wait_for

PROGRAMS = ("slurmctld", "slurmd", "munged")

# A job that is put back into the queue waits until its credential has expired.
_CONF = """
ClusterName=test
SlurmctldHost=n1
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.socket,cred_expire=5
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/%n
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=1
JobRequeue=1
KillWait=5
SlurmdTimeout=10
ReturnToService=2
NodeName=n[1-2] CPUs=8 RealMemory=1000
PartitionName=all Nodes=n[1-2] Default=YES
"""


class Slurm:
    """Both hosts must be entered, and end what is started here."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.env = {"SLURM_CONF": str(hosts.folder / "slurm.conf")}
        (hosts.folder / "slurm.conf").write_text(_CONF)
        key = hosts.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.run("mkdir", "-p", "/run/slurm/state")
        files = [f"--{kind}-file=/run/munge.{kind}" for kind in ("pid", "seed", "log")]
        munge = ("--foreground", "--force", "--socket=/run/munge.socket", *files)  # force: by root
        self._logs = [hosts.start("n1", "munged", *munge, f"--key-file={key}")]
        self._logs.append(hosts.start("n1", "slurmctld", "-D", env=self.env))
        for name in NAMES:
            self._logs.append(hosts.start(name, "slurmd", "-D", "-N", name, env=self.env))
        self.wait_for_nodes(len(NAMES))

    def wait_for_nodes(self, number: int) -> None:
        """Until so many have nothing to do."""
        words = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        wait_for(
            lambda: self.hosts.run("n1", *words, env=self.env).stdout.strip() == str(number),
            120,
            lambda: "".join(log.read_text()[-3000:] for log in self._logs),
        )

    def revive(self, host: str) -> None:
        """A node that was found dead is to be used again, now that it can be reached."""
        self.run("scontrol", "update", f"NodeName={host}", "State=RESUME")
        self.wait_for_nodes(len(NAMES))

    def run(self, *words: object, **env: str) -> str:
        """What a command on n1 prints; it must succeed."""
        done = self.hosts.run("n1", *words, env={**self.env, **env})
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def show(self, job: int) -> dict[str, str]:
        """Slurm's properties of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job)))

    def wait_for(
        self, job: int, state: str, or_say: Callable[[], str], seconds: float = 240
    ) -> dict[str, str]:
        """The properties of a job that has come to this state."""
        wait_for(
            lambda: self.show(job)["JobState"] == state,
            seconds,
            lambda: f"{self.show(job)}\n{or_say()}",
        )
        return self.show(job)
