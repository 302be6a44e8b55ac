"""Pages of mapped files that this process has read count as its memory until they are let go."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_MAPS = Path("/proc/self/maps")  # a line: first-last permissions offset device inode path


def release_files(directory: Path) -> None:
    """Let go of the pages of all files below `directory` that are mapped for reading.

    Nothing is lost: who reads them again finds them in the system's cache, or on disk. Where there
    is no /proc, the system takes them back when it is short of memory.
    """
    if not _MAPS.exists():
        return
    root = f"{directory.resolve()}/"
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in os.fsdecode(_MAPS.read_bytes()).split("\n")[:-1]:  # no other line ends
        span, _, _, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path and path[0].startswith(root):
            first, last = (int(address, 16) for address in span.split("-"))
            madvise(first, last - first, mmap.MADV_DONTNEED)  # advice: a refusal costs memory only
