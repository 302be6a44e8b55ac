"""The machine: system, processor, disk, limits."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from matformer_dist.doctor.finding import Finding, failure, note
from matformer_dist.errors import UserError
from matformer_dist.run_directory import read_checkpoints
from matformer_dist.units import short_bytes

_GIB = 2**30
# A rank of a large job has a socket to each of hundreds of others, and data files.
_FEW_FILES = 4096
_SMALL_SHARED_MEMORY = _GIB
_SMALL_DISK = 5 * _GIB


def system() -> Iterator[Finding]:
    yield Finding("system", f"{platform.platform()}, Python {platform.python_version()}")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(
        "machine",
        f"{os.cpu_count()} CPUs, of which {usable} may be used; {short_bytes(memory)} memory",
    )
    yield compiler()


def compiler() -> Finding:
    """DeepSpeed's offload and torch.compile build C++ when they are first used."""
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        return note(
            "compiler",
            "none",
            "there is no C++ compiler (c++): offload and training.compile, "
            "which build code when they are first used, will fail; install g++",
        )
    said = subprocess.run(
        [found, "--version"], capture_output=True, text=True, timeout=10, check=False
    ).stdout
    nvcc = shutil.which("nvcc")
    return Finding(
        "compiler",
        f"{found}: {(said.splitlines() or ['says no version'])[0]}; nvcc {nvcc or 'none'}",
    )


def disk(directory: Path) -> Iterator[Finding]:
    """Room where a run is written, and whether the next checkpoint fits there."""
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        said = f"{there} is a file, and no run can be written there: choose another run.dir"
        yield failure("disk", f"no directory at {directory.absolute()}", said)
        return
    usage = shutil.disk_usage(there)
    text = f"{short_bytes(usage.free)} of {short_bytes(usage.total)} free at {directory.absolute()}"
    if not os.access(there, os.W_OK):
        yield failure(
            "disk",
            f"{text}, not writable",
            f"{there} is not writable: choose another run.dir, or have its owner allow it",
        )
        return
    newest = _newest_checkpoint_bytes(directory)
    if newest:
        text += f"; the newest checkpoint there has {short_bytes(newest)}"
    if newest > usage.free:
        yield failure(
            "disk",
            text,
            f"the next checkpoint does not fit: {short_bytes(newest)} are needed beside "
            f"what is there, and {short_bytes(usage.free)} are free at {there}; free some, or "
            "lower checkpoint.keep_last",
        )
    elif usage.free < _SMALL_DISK:
        yield note(
            "disk",
            text,
            f"only {short_bytes(usage.free)} are free at {there}: a checkpoint "
            "takes 12 to 16 bytes a parameter, and two are kept while a third is written; "
            "put run.dir on a larger disk",
        )
    else:
        yield Finding("disk", text)


def _newest_checkpoint_bytes(directory: Path) -> int:
    try:
        complete = read_checkpoints(directory).complete
    except (UserError, OSError):
        return 0  # `matformer verify` is what tells of damage
    if not complete:
        return 0
    return sum(path.stat().st_size for path in complete[-1].path.rglob("*") if path.is_file())


def limits() -> Iterator[Finding]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{_limit(files)} (at most {_limit(most)})"
    if files != resource.RLIM_INFINITY and files < _FEW_FILES:
        yield note(
            "open files",
            text,
            f"only {files} files may be open at once: many ranks, data "
            f"sets or workers need more; ulimit -n {_FEW_FILES * 16}",
        )
    else:
        yield Finding("open files", text)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = "no limit" if locked == resource.RLIM_INFINITY else short_bytes(locked)
    if locked != resource.RLIM_INFINITY and Path("/sys/class/infiniband").exists():
        yield note(
            "locked memory",
            text,
            f"only {text} may be locked in memory: InfiniBand wants "
            "all of it; ulimit -l unlimited, in Slurm by PropagateResourceLimits",
        )
    else:
        yield Finding("locked memory", text)
    yield _shared_memory(Path("/dev/shm"))


def _shared_memory(path: Path) -> Finding:
    if not path.exists():
        return note(
            "shared memory",
            "no /dev/shm",
            "there is no /dev/shm: data.workers and NCCL "
            "between GPUs of a machine will fail; mount a tmpfs there",
        )
    usage = shutil.disk_usage(path)
    text = f"{short_bytes(usage.free)} of {short_bytes(usage.total)} free at {path}"
    if usage.free < _SMALL_SHARED_MEMORY:
        return note(
            "shared memory",
            text,
            f"only {short_bytes(usage.free)} are free at {path}: NCCL and "
            "data.workers may fail for want of it; start the container with --shm-size=8g "
            "or --ipc=host",
        )
    return Finding("shared memory", text)


def _limit(value: int) -> str:
    return "no limit" if value == resource.RLIM_INFINITY else f"{value:,}"
