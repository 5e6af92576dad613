"""Opening files of a folder that nobody vouches for: only regular files inside it, and without waiting."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path, within: Path | None = None) -> BufferedReader:
    """Open a regular file for reading.

    Parameters
    ----------
    path
        The file.
    within
        Folder that the file must lie in; a link that leads out of it is refused, a link to the folder is not.

    Raises
    ------
    OSError
        The file is missing, cannot be opened, is a pipe, a device or a folder, or lies outside `within`.
    """
    if within is not None and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(within)):
        raise OSError("a link that leads out of its folder; copy the file itself there")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("a pipe, a device or a folder, where a file should be")
    return open(descriptor, "rb")
