"""The right to write to a place in an object store: a lock that is lost when its holder no longer renews it.

The lock is an object that is created only if there is none, and that a thread renews only while it is what the thread
last wrote. A converter that finds a lock not renewed in time takes it over on the same condition. The lock's age is
taken from the times that the store gives to objects, never from the clocks of two machines. A holder that was silent
too long renews before it goes on: if that succeeds, nobody else had the lock in the meantime.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

from storage import typed
from storage.errors import ConversionError, StorageError
from storage.place.objects import mark_of
from storage.place.ranges import Occupied

if TYPE_CHECKING:
    from datetime import datetime

    from obstore import ObjectMeta, UpdateVersion

    from storage.place.objects import PutMode
    from storage.place.remote_store import RemoteStore

LOCK = "lock"
LEASE_S = 60.0  # another converter may take over after this time without renewal
RENEWALS = 4  # how often it is renewed in that time
CLOCK_STEP_S = 1.0  # resolution of the times that stores give


class Lease:
    """The lock in ``store`` of one converter; ``output`` names what it protects."""

    def __init__(self, store: RemoteStore, output: str) -> None:
        self._store = store
        self._output = output
        self._seconds = LEASE_S
        self._entry: dict[str, Any] = {
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            "token": uuid.uuid4().hex,
            "seconds": self._seconds,
            "renewals": 0,
            "released": False,
        }
        self._mark: UpdateVersion = {}
        self._renewed = time.monotonic()
        self._lost: ConversionError | None = None
        self._mutex = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="storage-lease", daemon=True)

    def acquire(self) -> None:
        """Take the lock and keep it.

        Raises
        ------
        ConversionError
            Another converter holds it, or the store cannot keep two apart.
        """
        try:
            self._take()
            self._refuse_blind_stores()
        except BaseException:
            self.release()
            raise
        self._thread.start()

    def check(self) -> None:
        """Raise ``ConversionError`` if the lock is lost, renewing it first where that is in doubt."""
        if self._lost is not None:
            raise self._lost
        if time.monotonic() - self._renewed > self._seconds:
            self.renew()

    def renew(self) -> None:
        """Renew the lock now; raises ``ConversionError`` if it is lost."""
        with self._mutex:
            try:
                self._put(self._mark)
            except Occupied:
                self._put_again()

    def stop(self) -> None:
        """Stop renewing; the caller deletes the lock's object."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(self._seconds / RENEWALS)  # a hanging request does no harm, since it has a condition

    def release(self) -> None:
        """Let the next converter take the lock at once; do nothing if it was stopped or is another's."""
        if not self._over.is_set():
            self.stop()
            self._entry["released"] = True
            with contextlib.suppress(StorageError):
                entry, meta = self._read()
                if meta is not None and self._is_own(entry):
                    self._put(mark_of(meta))

    def _keep(self) -> None:
        while not self._over.wait(self._seconds / RENEWALS):
            try:
                self.renew()
            except ConversionError as error:
                self._lost = error
                return
            except StorageError:
                continue  # the store does not answer; try again later

    def _put(self, mode: PutMode) -> None:
        self._entry["renewals"] += 1  # no two states of the lock may have the same mark
        started = time.monotonic()
        self._mark = self._store.put_if(mode, LOCK, [json.dumps(self._entry).encode()])
        self._renewed = started

    def _put_again(self) -> None:
        """Renew a lock that is not as last written: it is lost, or an earlier renewal only seemed to fail."""
        entry, meta = self._read()
        if meta is not None and self._is_own(entry):
            with contextlib.suppress(Occupied):
                self._put(mark_of(meta))
                return
        holder = entry.get("holder", "another conversion")
        raise ConversionError(f"{self._output}: stopped, since {holder} has taken over; the lock had expired")

    def _take(self) -> None:
        with contextlib.suppress(Occupied):
            self._put("create")
            return
        entry, meta = self._read()
        busy = f"{self._output}: another conversion to it is running"
        if meta is None:
            raise ConversionError(f"{busy}, or has just ended; run again")
        if not entry.get("released"):
            age = (self._store_time() - meta["last_modified"]).total_seconds()
            if (left := _seconds(entry) + CLOCK_STEP_S - age) > 0:
                raise ConversionError(f"{busy} ({entry.get('holder')}); if it was killed, run again in {left:.0f} s")
        try:
            self._put(mark_of(meta))
        except Occupied:
            raise ConversionError(f"{busy}: it has just started") from None

    def _is_own(self, entry: dict[str, Any]) -> bool:
        """Whether a lock is this one's, which is possible even after its put failed, if only the answer was lost."""
        return bool(entry.get("token") == self._entry["token"])

    def _read(self) -> tuple[dict[str, Any], ObjectMeta | None]:
        """Return the lock's entry and what the store knows of it; None if it is gone."""
        try:
            data, meta = self._store.get_with_meta(LOCK)
        except FileNotFoundError:
            return {}, None
        try:
            return typed.parse_object(data), meta
        except ValueError:
            return {}, meta

    def _store_time(self) -> datetime:
        """The store's time now, which is that of an object just made."""
        key = f"clock-{self._entry['token']}"
        self._store.put_if("create", key, [])
        try:
            return self._store.get_with_meta(key)[1]["last_modified"]
        finally:
            self._store.delete([key])

    def _refuse_blind_stores(self) -> None:
        """Refuse a store that ignores conditions, since it would let two converters in."""
        stale: UpdateVersion = {"e_tag": '"00000000000000000000000000000000"', "version": "0"}
        modes: list[PutMode] = ["create", stale]
        for mode in modes:
            with contextlib.suppress(Occupied):
                self._put(mode)
                raise ConversionError(
                    f"{self._output}: the store ignores conditions on writes (If-Match, If-None-Match), so that two "
                    "converters could mix their outputs; convert to a local folder and copy it there"
                )


def _seconds(entry: dict[str, Any]) -> float:
    """How long a lock holds without renewal; the default where it does not say."""
    try:
        return typed.number(entry.get("seconds"), "seconds", 0)
    except ValueError:
        return LEASE_S
