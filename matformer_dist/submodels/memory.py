"""What memory the operating system counts as ours, and gives us again and again."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS = Path("/proc/self/maps")  # a line: first-last permissions offset device inode path
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # options of glibc's mallopt, in bytes
_DEFAULT_THRESHOLD = 128 * 1024  # of both


def release_files(directory: Path) -> None:
    """Let go of the pages of all files below `directory` that are mapped for reading.

    Pages of a mapped file that were read count as memory of the process. Nothing is lost: who reads
    them again finds them in the system's cache, or on disk. Where there is no /proc, the system
    takes them back when it is short of memory.
    """
    if not _MAPS.exists():
        return
    root = f"{directory.resolve()}/"
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in os.fsdecode(_MAPS.read_bytes()).splitlines():
        span, _, _, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path and path[0].startswith(root):
            first, last = (int(address, 16) for address in span.split("-"))
            madvise(first, last - first, mmap.MADV_DONTNEED)  # advice: a refusal costs memory only


@contextmanager
def reused_buffers() -> Iterator[None]:
    """Large buffers come out of memory that was freed before; no effect without glibc.

    By default glibc fetches each from the system anew, page by page, which costs more than the
    copying that they are for.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
        libc.mallopt(option, 2**31 - 1)
    try:
        yield
    finally:
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            libc.mallopt(option, _DEFAULT_THRESHOLD)
        libc.malloc_trim(0)
