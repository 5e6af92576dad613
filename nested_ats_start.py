"""Start the command line with the packages of this installation, whatever else is on Python's path.

A folder that Python searches earlier may hold a ``storage.py`` or a ``pipeline`` of the user's: one that PYTHONPATH
names, or the one in which Ray's workers start, which Ray searches first. This module's name is one that nobody else
has; what it installs finds the four packages beside itself and leaves every other import alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any, NoReturn

OWN = ("cluster", "nested_ats", "pipeline", "storage")
HOME = os.path.dirname(os.path.abspath(__file__))


class _Own(MetaPathFinder):
    """Finds the packages that lie beside this file."""

    def find_spec(self, fullname: str, _path: Sequence[str] | None, target: ModuleType | None = None, /) -> Any:
        """Find one of `OWN`; None leaves a module to the other finders."""
        return PathFinder.find_spec(fullname, [HOME], target) if fullname in OWN else None


def keep_own() -> None:
    """Import the four packages from here from now on; called again, it changes nothing."""
    if not any(type(finder).__name__ == _Own.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Own())


def main() -> NoReturn:
    """Run ``nested-ats``."""
    keep_own()
    from pipeline.cli import main as command

    command()
