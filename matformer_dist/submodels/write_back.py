"""Files that are on their way to the disk while they are still being written."""

from __future__ import annotations

import os
from typing import BinaryIO


def start_write_back(file: BinaryIO, first: int) -> None:
    """Have the system begin to put on disk what was written from byte `first` on.

    Else it waits until much has gathered, and the sync at the end takes as long as the disk does.
    """
    file.flush()
    if hasattr(os, "posix_fadvise"):
        # Linux begins to write the dirty pages of a range that it is told will not be read.
        size = file.tell() - first
        os.posix_fadvise(file.fileno(), first, size, os.POSIX_FADV_DONTNEED)
