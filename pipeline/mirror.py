"""A copy of a training run in an object store: it goes on from there where its folder is gone, or on another machine.

The state decides where training goes on, and everything else is put before it. A state is put on condition that the
one in its place is the one that this process put or fetched last: of two trainings with one copy, one finds out at
its next checkpoint and ends.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from pipeline.files import write_atomic
from pipeline.runs import CONFIG, CURVES, METRICS, MODEL, RUN, STATE
from storage.objects import Objects, Occupied, mark_of

if TYPE_CHECKING:
    from storage.objects import PutMode

_TIMEOUT_S = 300.0  # of a request: a state of some hundred megabytes must get through


class Mirror:
    """The copy of a run's folder below a URL.

    Parameters
    ----------
    url
        Of an object store: ``s3://bucket/runs/first``, ``gs://`` or ``az://``.
    folder
        Of the run.

    Raises
    ------
    UsageError
        `url` is none of an object store.
    """

    def __init__(self, url: str, folder: Path) -> None:
        if not re.match(r"(?!https?:)[a-z][a-z0-9]*://[^/]", url):
            raise UsageError(f"--mirror {url}: not the URL of an object store; give one like s3://bucket/runs/first")
        self.url, self._folder = url.rstrip("/"), folder
        self._objects = Objects(self.url, _TIMEOUT_S)
        self._mark: PutMode = "create"  # what a state may be put in place of
        self._done: dict[str, tuple[int, int]] = {}  # time of change and length of what was put

    def claim(self, *, overwrite: bool) -> None:
        """See that the copy is of the run in the folder, or begin one.

        Raises
        ------
        UsageError
            It is of another run.
        """
        if overwrite:
            self.remove(STATE)  # before run.json: a run never goes on from the state of another
            self.remove(METRICS, MODEL, CURVES, CONFIG, RUN)
        mine = (self._folder / RUN).read_bytes()
        try:
            self._objects.put(RUN, mine, "create")
        except Occupied:
            try:
                theirs = json.loads(self._objects.get(RUN)[0])["fingerprint"]
            except (FileNotFoundError, ValueError, LookupError, TypeError):
                theirs = None
            if theirs != json.loads(mine)["fingerprint"]:
                raise UsageError(
                    f"{self.url}: holds a run of another configuration or of other slides; give another --mirror, "
                    "or --overwrite to start again"
                ) from None
        self._put(self._folder / CONFIG)

    def fetch(self) -> None:
        """Put the last state of the copy and its metrics, if it has one, in place of those in the folder."""
        try:
            state, about = self._objects.get(STATE)
            write_atomic(self._folder / METRICS, self._objects.get(METRICS)[0])
        except FileNotFoundError:
            return
        write_atomic(self._folder / STATE, state)
        self._mark, self._done[STATE] = mark_of(about), _version(self._folder / STATE)

    def put(self) -> None:
        """Copy what has changed in the folder, the state last.

        Raises
        ------
        UsageError
            Another training has put its state there.
        """
        for path in (*self._below(CURVES), *self._below(MODEL), self._folder / METRICS):
            self._put(path)
        path = self._folder / STATE
        version = _version(path)
        if self._done.get(STATE) == version:
            return
        try:
            self._mark = self._objects.put(STATE, path.read_bytes(), self._mark)
        except Occupied:
            raise UsageError(
                f"{self.url}: another training with this --mirror is running; end one of them and run it again"
            ) from None
        self._done[STATE] = version

    def remove(self, *names: str) -> None:
        """Remove files and folders from the copy."""
        self._objects.delete(key for key in self._objects.list() if key.partition("/")[0] in names)

    def _put(self, path: Path) -> None:
        name, version = path.relative_to(self._folder).as_posix(), _version(path)
        if self._done.get(name) != version:
            self._objects.put(name, path.read_bytes(), "overwrite")
            self._done[name] = version

    def _below(self, name: str) -> list[Path]:
        return sorted(path for path in (self._folder / name).rglob("*") if path.is_file())


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
