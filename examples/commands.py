"""Run commands of the command line and measure them: what the examples share."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path

from pipeline.interrupt import INTERRUPTED

_GRACE_S = 5.0


def run(*arguments: str | Path | float) -> tuple[float, float]:
    """Run a command of nested-ats; returns its seconds and its peak memory in MB."""
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    print(f"\n$ nested-ats {shlex.join(command[3:])}", flush=True)
    began = time.monotonic()
    process = os.posix_spawn(command[0], command, os.environ)
    try:
        _, status, usage = os.wait4(process, 0)
    except KeyboardInterrupt:
        if os.waitstatus_to_exitcode(_interrupt(process)) == INTERRUPTED:
            sys.exit(INTERRUPTED)  # it has said so
        raise
    if os.waitstatus_to_exitcode(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    return time.monotonic() - began, usage.ru_maxrss / 1024


def _interrupt(process: int) -> int:
    """End a command and return its status: a terminal interrupts it as well as this process, else it is told to end."""
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.05)
    os.kill(process, signal.SIGINT)
    return os.waitpid(process, 0)[1]
