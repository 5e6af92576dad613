"""Files of a folder that may be anybody's: opened without waiting, and only where they are what they seem."""

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
        Of the file.
    within
        Folder that the file must lie in; a link *to* the folder may be anywhere, one that leads out of it is refused.

    Raises
    ------
    OSError
        There is no such file, it cannot be opened, it is a pipe, a device or a folder, or lies outside `within`.
    """
    if within is not None and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(within)):
        raise OSError("a link that leads out of its folder; copy the file itself there")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("a pipe, a device or a folder, where a file should be")
    return open(descriptor, "rb")
