"""Run commands of the command line and measure them: what the examples share."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path


def run(*arguments: str | Path | int) -> tuple[float, float]:
    """Run a command of nested-ats; returns its seconds and its peak memory in MB."""
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    print(f"\n$ nested-ats {shlex.join(command[3:])}", flush=True)
    began = time.monotonic()
    process = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    return time.monotonic() - began, usage.ru_maxrss / 1024
