"""Stop a converter at every one of its writes in turn, run it again, and compare with a clean run.

Run by ``test_resume`` as a program of its own, because it forks: ``python kill_loop.py HOW SOURCE FOLDER``. A child
counts its calls that change the disk; from the n-th on, for n = 1, 2, ..., it is killed ("kill") or finds the disk
full ("full").
"""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import signal
import sys
from pathlib import Path

from storage import ConversionError, ConvertOptions, convert

OPTIONS = ConvertOptions(chunk=16, shard=32, min_level_size=32)
CHANGES = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "pwrite")


def stop_at(number: int, how: str) -> None:
    """Make the ``number``-th change of this process, and those after it, fail."""
    left = [number]

    def counted(original):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0 and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    plain, failing = builtins.open, counted(builtins.open)

    def opened(file, mode="r", *args, **kwargs):
        return (failing if set("wa") & set(mode) else plain)(file, mode, *args, **kwargs)

    builtins.open = opened


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stopped(how: str, source: Path, target: Path, number: int) -> bool:
    """Convert in a child that is stopped at its ``number``-th change; False if it came to the end."""
    child = os.fork()
    if child == 0:
        stop_at(number, how)
        try:
            convert(source, target, options=OPTIONS, workers=1)
        except ConversionError:
            os._exit(1)
        except BaseException:  # noqa: BLE001  nothing else may leave convert
            os._exit(2)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) == 2:
        raise SystemExit(f"stopped at change {number}: not a ConversionError")
    return status != 0


def main() -> None:
    how, source, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    clean = folder / "clean/p.zarr"
    convert(source, clean, options=OPTIONS, workers=1)
    expected = contents(clean)
    number = reused = 0
    again = True
    while again:
        number += 1
        target = folder / str(number) / "p.zarr"
        again = stopped(how, source, target, number)
        if target.exists() and contents(target) != expected:
            raise SystemExit(f"stopped at change {number}: a target that is not whole")
        reused += convert(source, target, options=OPTIONS, workers=1).shards_reused > 0
        left = [p.name for p in target.parent.iterdir()]
        if contents(target) != expected or left != ["p.zarr"]:
            raise SystemExit(f"stopped at change {number}: the rerun differs or leaves {left}")
        shutil.rmtree(target.parent)
    print(number - 1, reused)


if __name__ == "__main__":
    main()
