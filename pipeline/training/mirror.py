"""A copy of a training run in an object store: it goes on from there where its folder is gone, or on another machine.

The copy is the truth. The process that starts training brings it up to date; every worker begins with what it holds,
also where that is nothing; rank 0 puts what changes. A state is put on condition that the one in its place is what
this process put or fetched last, and before everything else: of two trainings with one copy, one finds out at its
next checkpoint and ends before it has changed anything.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from pipeline.files import read_inside, write_atomic
from pipeline.runs import CONFIG, CURVES, METRICS, MODEL, RUN, STATE, read_run, state_metadata
from storage import StorageError
from storage.place import retry
from storage.place.objects import mark_of
from storage.place.ranges import Occupied
from storage.place.remote_store import RemoteStore

if TYPE_CHECKING:
    from storage.place.objects import PutMode
    from storage.place.ranges import Entry

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
        self._store = RemoteStore(self.url, _TIMEOUT_S, retry.WRITING)
        self._run: PutMode = "create"  # what run.json and
        self._state: PutMode = "create"  # the state may be put in place of
        self._done: dict[str, tuple[int, int]] = {}  # time of change and length of what was put

    def check(self, fingerprint: str, *, overwrite: bool) -> None:
        """See that the copy is of this run, or that there is none; changes nothing.

        Raises
        ------
        UsageError
            It is of another run and not to be overwritten, something else lies there, or it cannot be read.
        """
        try:
            run, about = self._store.get_with_meta(RUN)
        except FileNotFoundError:
            if self._list():
                raise UsageError(f"{self.url}: not empty and not a training run; give another --mirror") from None
            return
        except StorageError as error:
            raise self._out_of_reach(error) from error
        self._run = mark_of(about)
        if not overwrite and _fingerprint(run) != fingerprint:
            raise UsageError(
                f"{self.url}: holds a run of another configuration or of other slides; give another --mirror, "
                "or --overwrite to start again"
            )

    def _list(self) -> dict[str, Entry]:
        try:
            return self._store.entries()
        except StorageError as error:
            raise self._out_of_reach(error) from error

    def _out_of_reach(self, error: StorageError) -> UsageError:
        return UsageError(f"--mirror {error}; check its name, the credentials and the network")

    def claim(self, *, overwrite: bool) -> None:
        """Bring the copy, which was checked, up to date with the folder.

        Raises
        ------
        UsageError
            Another training has begun with it.
        """
        if overwrite:
            self.remove(STATE)  # first: no run goes on from the state of another
            self.remove(METRICS, MODEL, CURVES)
        self._replace(RUN, self._run)
        self._put(self._folder / CONFIG)
        there, here = self._fetch_state(), self._folder / STATE
        if here.exists() and _position(read_inside(self._folder, STATE)) > _position(there):
            self.put()

    def fetch(self, fingerprint: str) -> None:
        """Make the folder, on whichever machine, what the copy says: with its state, or without any.

        Raises
        ------
        UsageError
            The copy or the folder is of another run.
        """
        run, state = self._store.get(RUN), self._fetch_state()
        if _fingerprint(run) != fingerprint:
            raise self._taken()
        if not (self._folder / RUN).exists():
            write_atomic(self._folder / RUN, run)
        elif read_run(self._folder)["fingerprint"] != fingerprint:
            raise UsageError(f"{self._folder}: holds another run; give another --out")
        path = self._folder / STATE
        if state is None:
            path.unlink(missing_ok=True)
        elif not path.exists() or read_inside(self._folder, STATE) != state:
            write_atomic(path, state)

    def put(self) -> None:
        """Put the state and what else has changed in the folder.

        Raises
        ------
        UsageError
            Another training has put its state there.
        """
        self._state = self._replace(STATE, self._state)
        for path in (*self._below(CURVES), *self._below(MODEL), self._folder / METRICS):
            self._put(path)

    def remove(self, *names: str) -> None:
        """Remove files and folders from the copy."""
        self._store.delete(key for key in self._store.entries() if key.partition("/")[0] in names)

    def version(self) -> str | None:
        """Tell one state of the copy from the next; None where that cannot be told."""
        with suppress(StorageError, KeyError):
            return self._store.entries()[STATE].tag
        return None

    def _fetch_state(self) -> bytes | None:
        try:
            state, about = self._store.get_with_meta(STATE)
        except FileNotFoundError:
            self._state = "create"
            return None
        self._state = mark_of(about)
        return state

    def _replace(self, name: str, mode: PutMode) -> PutMode:
        try:
            return self._store.put_if(mode, name, [read_inside(self._folder, name)])
        except Occupied:
            raise self._taken() from None

    def _taken(self) -> UsageError:
        return UsageError(
            f"{self.url}: another training with this --mirror is running; end one of them and run it again"
        )

    def _put(self, path: Path) -> None:
        name, status = path.relative_to(self._folder).as_posix(), path.stat()
        version = status.st_mtime_ns, status.st_size
        if self._done.get(name) != version:
            self._store.put(name, [read_inside(self._folder, name)])
            self._done[name] = version

    def _below(self, name: str) -> list[Path]:
        return sorted(path for path in (self._folder / name).rglob("*") if path.is_file())


def _fingerprint(run: bytes) -> object:
    try:
        return json.loads(run)["fingerprint"]
    except (ValueError, LookupError, TypeError):
        return None


def _position(state: bytes | None) -> tuple[int, int]:
    """Epoch and step of a state; less than any where there is none or it is damaged."""
    try:
        about = state_metadata(state or b"")
        return int(about["epoch"]), int(about["step"])
    except (ValueError, LookupError, TypeError):
        return -1, -1
