"""Ctrl-C in scripts: one line on standard error and exit code 130, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120  # with processes beside which others work

# A shell that began the tests in the background has had SIGINT ignored, which children inherit.
LISTENING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
WAITING = """
import time
from pathlib import Path
from pipeline.interrupt import run_main

def main():
    Path("begun").touch()
    time.sleep(600)

run_main(main)
"""
# As the demo does, at a command that would take minutes.
EXAMPLE = f"""
import sys
sys.path.insert(0, {str(ROOT / "examples")!r})
from commands import run
from pipeline.interrupt import RESUMABLE, run_main

def main():
    run("synth", "signs", "--out", "scenes", "--count", 2000)

run_main(main, RESUMABLE)
"""


def interrupted(code, folder, begun, *, everyone):
    """Start a script, interrupt it once a file has come (with its children, as a terminal does, or alone)."""
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING + code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not list(folder.glob(begun)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return process.returncode, errors


def test_a_script_ends_in_a_line_and_a_code(tmp_path):
    assert interrupted(WAITING, tmp_path, "begun", everyone=False) == (130, "interrupted\n")


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE_S)
@pytest.mark.parametrize("everyone", [True, False])
def test_an_example_ends_with_its_command_in_one_line(tmp_path, everyone):
    code, errors = interrupted(EXAMPLE, tmp_path, "scenes/**/*.tif", everyone=everyone)
    assert code == 130, errors
    assert [line for line in errors.splitlines() if "%" not in line] == [
        "interrupted; run the same command again to go on from where it was"
    ]


def test_every_script_runs_its_main_so():
    scripts = [path for folder in ("examples", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    mains = {path.name: path.read_text() for path in scripts if "\ndef main(" in path.read_text()}
    assert len(mains) >= 14
    assert [name for name, text in mains.items() if "    run_main(main" not in text] == []
