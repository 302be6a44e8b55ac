"""Two hosts, n1 and n2, made of namespaces of this machine: a cluster without hardware, for root.

Each has a name, a network and ports of its own, and an sshd that lets the other in; they share the
file system, as a cluster does, and the processes' numbers. A bridge joins them, and the way out of
here is closed. All of it hangs on one process: when that ends, so do all others, and networks and
mounts are gone with them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("n1", "n2")
SSHD = "/usr/sbin/sshd"
SBIN = "/usr/sbin:/sbin"  # not on every root's PATH

# What mounts cover is seen by this cluster only.
_SETUP = """
set -e
mount -t tmpfs none /run
mkdir -m 755 /run/sshd
mount --bind {folder}/etc_hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
ip link set lo up
ip link add switch type bridge
ip link set switch up
for i in 1 2; do
    unshare --net --uts sh -c "hostname n$i && echo > {folder}/n$i.named && exec sleep infinity" &
    while [ ! -e {folder}/n$i.named ]; do sleep 0.05; done
    ip link add n$i type veth peer name eth0 netns $!
    ip link set n$i master switch up
    nsenter -t $! -n ip link set lo up
    nsenter -t $! -n ip addr add 10.66.0.$i/24 dev eth0
    nsenter -t $! -n ip link set eth0 up
    echo $! > {folder}/n$i.pid
done
touch {folder}/ready
exec sleep infinity
"""

_SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin yes
PidFile none
"""

_SSH = """
Host *
    IdentityFile {folder}/key
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking no
    LogLevel ERROR
"""


def why_not(*programs: str) -> str:
    """What this machine lacks for a cluster with these programs; empty if nothing."""
    if os.geteuid():
        return "needs root"
    path = f"{os.environ['PATH']}:{SBIN}"
    for program in ("unshare", "nsenter", "setpriv", "ip", "ssh", SSHD, "ssh-keygen", *programs):
        if not shutil.which(program, path=path):
            return f"needs {program}"
    setup = "mount -t tmpfs none /run && ip link add switch type bridge && ip link add type veth"
    words = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "sh", "-c", setup]
    tried = subprocess.run(
        words, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def wait_for(what: Callable[[], bool], seconds: float, or_say: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {or_say()}"
        time.sleep(0.1)


class Hosts:
    """Entered around what uses them. folder: theirs alone, below folders that all may read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs: dict[str, Path] = {}

    def __enter__(self) -> Hosts:
        folder = self.folder
        addresses = "".join(f"10.66.0.{i} {name}\n" for i, name in enumerate(NAMES, 1))
        (folder / "etc_hosts").write_text(f"127.0.0.1 localhost\n{addresses}")
        (folder / "ssh_config").write_text(_SSH.format(folder=folder))
        (folder / "sshd_config").write_text(_SSHD.format(folder=folder))
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True
        )
        self.log = (folder / "hosts.log").open("wb")
        words = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(  # which ends with this process, however that ends
            ["setpriv", "--pdeathsig", "KILL", *words, "sh", "-c", _SETUP.format(folder=folder)],
            env={**os.environ, "PATH": f"{os.environ['PATH']}:{SBIN}"},
            stdout=self.log,
            stderr=self.log,
        )
        try:
            wait_for((folder / "ready").exists, 30, (folder / "hosts.log").read_text)
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            self._first = children.read_text().split()[0]
            for name in NAMES:
                self.start(name, SSHD, "-D", "-e", "-f", folder / "sshd_config")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def command(self, host: str, *words: object, env: Mapping[str, str] | None = None) -> list[str]:
        """What runs `words` on `host`, in the checkout."""
        inner = (self.folder / f"{host}.pid").read_text().strip()
        settings = {"PATH": f"{os.environ['PATH']}:{SBIN}", **(env or {})}
        return [
            *("nsenter", "-t", self._first, "--mount", "--net", "--pid", "--"),
            *("nsenter", "-t", inner, "--net", "--uts", "--"),
            *("env", "-C", str(ROOT), *(f"{k}={v}" for k, v in settings.items())),
            *map(str, words),
        ]

    def start(self, host: str, *words: object, env: Mapping[str, str] | None = None) -> Path:
        """Start a daemon; what it prints goes to the file that is returned."""
        log = self.folder / f"{host}-{Path(str(words[0])).name}.log"
        with log.open("wb") as file:
            subprocess.Popen(
                self.command(host, *words, env=env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        return log

    def run(
        self,
        host: str,
        *words: object,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(host, *words, env=env),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def cut(self, host: str) -> None:
        """Nothing reaches `host` or comes from it any more, and nobody is told."""
        self._switch("ip", "link", "set", host, "nomaster")

    def mend(self, host: str) -> None:
        self._switch("ip", "link", "set", host, "master", "switch")

    def _switch(self, *words: str) -> None:
        subprocess.run(["nsenter", "-t", self._first, "--net", "--", *words], check=True)
