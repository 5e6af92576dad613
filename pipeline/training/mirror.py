"""A copy of a training run in an object store, from which it goes on if its folder is lost or on another machine.

The copy has precedence. The process that starts training brings it up to date, every worker begins with its contents,
even if it is empty, and rank 0 puts what changes. The state is put first, on condition that the one in its place is
what this process last put or fetched: of two trainings with one copy, one notices at its next checkpoint and ends
before it has changed anything.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from pipeline.files import read_inside, write_atomic
from pipeline.runs import CONFIG, CURVES, LAST, METRICS, MODEL, RUN, STATE, read_run, state_metadata
from storage import StorageError
from storage.place import retry
from storage.place.objects import mark_of
from storage.place.ranges import Occupied
from storage.place.remote_store import RemoteStore

if TYPE_CHECKING:
    from storage.place.objects import PutMode
    from storage.place.ranges import Entry

_TIMEOUT_S = 300.0  # for a request, as a state may have hundreds of megabytes


class Mirror:
    """The copy of a run's folder below a URL.

    Parameters
    ----------
    url
        A URL of an object store: ``s3://bucket/runs/first``, ``gs://`` or ``az://``.
    folder
        The folder of the run.

    Raises
    ------
    UsageError
        `url` is not that of an object store.
    """

    def __init__(self, url: str, folder: Path) -> None:
        if not re.match(r"(?!https?:)[a-z][a-z0-9]*://[^/]", url):
            raise UsageError(f"--mirror {url}: not the URL of an object store; give one like s3://bucket/runs/first")
        self.url, self._folder = url.rstrip("/"), folder
        self._store = RemoteStore(self.url, _TIMEOUT_S, retry.WRITING)
        self._run: PutMode = "create"  # conditions for putting run.json and
        self._state: PutMode = "create"  # the state: the marks of those to replace
        self._done: dict[str, tuple[int, int]] = {}  # time of change and length of each file that was put

    def check(self, fingerprint: str, *, overwrite: bool) -> None:
        """Check, without changing anything, that the copy is of this run or that there is none.

        Raises
        ------
        UsageError
            The copy is of another run and not to be overwritten, is no run's, or cannot be read.
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
        """Bring the checked copy up to date with the folder.

        Raises
        ------
        UsageError
            Another training has begun with it.
        """
        if overwrite:
            self.remove(STATE)  # first, so that no run goes on from another's state
            self.remove(METRICS, MODEL, LAST, CURVES)
        self._replace(RUN, self._run)
        self._put(self._folder / CONFIG)
        there, here = self._fetch_state(), self._folder / STATE
        if here.exists() and _position(read_inside(self._folder, STATE)) > _position(there):
            self.put()

    def fetch(self, fingerprint: str) -> None:
        """Make the folder on this machine agree with the copy, with its state or without any.

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
        """Put the state, then everything else that has changed in the folder.

        Raises
        ------
        UsageError
            Another training has put its state there.
        """
        self._state = self._replace(STATE, self._state)
        for path in (*self._below(CURVES), *self._below(LAST), *self._below(MODEL), self._folder / METRICS):
            self._put(path)

    def remove(self, *names: str) -> None:
        """Remove files and folders from the copy."""
        self._store.delete(key for key in self._store.entries() if key.partition("/")[0] in names)

    def version(self) -> str | None:
        """Identify the state in the copy; None where that is not possible."""
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
    """Epoch and step of a state; below all others if it is missing or damaged."""
    try:
        about = state_metadata(state or b"")
        return int(about["epoch"]), int(about["step"])
    except (ValueError, LookupError, TypeError):
        return -1, -1
