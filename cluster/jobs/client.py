"""Jobs on a running Ray cluster: submit a command, follow its log, take over its exit code.

Notable: a job's id is derived from what is submitted, so that the same submission twice is refused; and its log,
which Ray always sends from the beginning, is followed over lost and silent connections.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import shlex
import tempfile
import time
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError, one_line
from cluster.jobs.dashboard import find_dashboard, refused
from cluster.jobs.working_dir import check_size, describe, files_to_upload, pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cluster.jobs.dashboard import Dashboard

_POLL_S = 1.0
_QUIET_S = 60.0  # a log that is silent for so long is asked for again: its connection may be dead
_GONE_S = 60.0  # a dashboard that is away for so long will not be back
_STOPPED = 130


@dataclass(frozen=True)
class Job:
    """What the cluster knows of a job.

    Attributes
    ----------
    state
        ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED`` or ``STOPPED``.
    exit_code
        The exit code of the job's command, once it has ended by itself; it is negative for a signal.
    message
        What Ray says about the state, in one line.
    """

    id: str
    state: str
    command: str
    exit_code: int | None
    message: str

    @property
    def ended(self) -> bool:
        """Whether the job will not run any more."""
        return self.state in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def exit_status(self) -> int:
        """The exit code of a command that followed this job to its end; for a signal it is a shell's."""
        if self.state == "STOPPED":
            return _STOPPED
        if self.exit_code is None:
            return 0 if self.state == "SUCCEEDED" else 1
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code


class Jobs:
    """The jobs of one cluster, which `connect` reaches."""

    def __init__(self, client: Any, dashboard: Dashboard) -> None:
        self._client = client
        self.address = dashboard.url
        self.warning = dashboard.warning

    def submit(
        self,
        command: Sequence[str],
        *,
        job_id: str | None = None,
        working_dir: Path | None = None,
        secrets: bool = False,
        say: Callable[[str], object] = lambda _: None,
    ) -> str:
        """Start a command on the head of the cluster and return the job's id at once.

        Parameters
        ----------
        command
            The words of the command, which arrive as they are, whatever characters they hold.
        job_id
            By default the id is derived from the command and the contents of `working_dir`, so that the same
            submission twice is one job.
        working_dir
            The folder to send along, without what its `.gitignore` files name; the job starts in a copy of it.
        secrets
            Whether files are sent whose names are those of keys, passwords and tokens.
        say
            It is called with one line about what will be sent.

        Raises
        ------
        ClusterError
            There is such a job already, the folder cannot be sent, or the cluster refuses the job.
        """
        with tempfile.TemporaryDirectory(prefix="nested-ats-") as folder:
            environment: dict[str, Any] = {}
            digest = ""
            if working_dir is not None:
                files = files_to_upload(working_dir, secrets=secrets)
                check_size(working_dir, files)
                archive = Path(folder) / "working_dir.zip"
                digest = pack(working_dir, files, archive)
                environment["working_dir"] = str(archive)
            job_id = job_id or derived_id(command, digest)
            self._refuse_duplicate(job_id)
            if working_dir is not None:
                say(f"sending {describe(working_dir, files)}")
            with self._translated(job_id):
                self._client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=job_id,
                    runtime_env=environment,
                    metadata={"nested-ats": version("nested-ats")},
                )
        return job_id

    def info(self, job_id: str) -> Job:
        """Look at one job.

        Raises
        ------
        ClusterError
            There is no such job, or the dashboard cannot be reached.
        """
        with self._translated(job_id):
            return _job(self._client.get_job_info(job_id))

    def all(self) -> list[Job]:
        """Look at all jobs that were submitted to this cluster, the oldest first."""
        with self._translated(""):
            found = [one for one in self._client.list_jobs() if one.submission_id]
        return [_job(one) for one in sorted(found, key=lambda one: one.start_time or 0)]

    def logs(self, job_id: str) -> str:
        """Return all that a job has printed so far."""
        with self._translated(job_id):
            text: str = self._client.get_job_logs(job_id)
        return text

    def follow(self, job_id: str, write: Callable[[str], None], *, pending_s: float = 300.0) -> Job:
        """Pass on what a job prints until it has ended; a lost connection is made again.

        Parameters
        ----------
        write
            It is called with each piece of the log, from the beginning.
        pending_s
            How long the job may wait before it starts, in seconds.

        Raises
        ------
        ClusterError
            The job does not start in time, or the dashboard is away for more than a minute; the job goes on.
        """
        self._wait(job_id, lambda job: job.state != "PENDING", pending_s)
        written, seen = 0, time.monotonic()
        while True:
            tail = _Tail(write, skip=written)
            whole = self._tail(job_id, tail)
            written = max(written, tail.written)
            try:
                job = self.info(job_id)
                seen = time.monotonic()
            except ClusterError as error:
                if time.monotonic() - seen > _GONE_S:
                    raise ClusterError(
                        f"lost the dashboard: {error}. The job may go on; {self.hint(job_id)}"
                    ) from error
            else:
                if whole and job.ended:
                    return job
            time.sleep(_POLL_S)

    def stop(self, job_id: str, *, timeout_s: float = 30.0) -> Job:
        """End a job (its command gets SIGTERM, three seconds later SIGKILL) and wait until it has ended."""
        with self._translated(job_id):
            self._client.stop_job(job_id)
        return self._wait(job_id, lambda job: job.ended, timeout_s)

    def hint(self, job_id: str) -> str:
        """Say how to go on with a job that runs."""
        where = f"{job_id} --address {self.address}"
        return f"follow it with `nested-ats job logs --follow {where}`, end it with `nested-ats job stop {where}`"

    def _refuse_duplicate(self, job_id: str) -> None:
        jobs = {job.id: job for job in self.all()}
        job = jobs.get(job_id)
        if job is None:
            return
        if not job.ended:
            raise ClusterError(f"job {job_id} was submitted before and is {job.state}; {self.hint(job_id)}")
        code = "" if job.exit_code is None else f" (exit code {job.exit_code})"
        logs = f"nested-ats job logs {job_id} --address {self.address}"
        stem = re.sub(r"-\d{1,3}$", "", job_id)
        free = next(name for number in count(2) if (name := f"{stem}-{number}") not in jobs)
        raise ClusterError(
            f"job {job_id} was submitted before and has {job.state}{code}; see `{logs}`. To run it again, which goes "
            f"on where it was, add --id {free}"
        )

    def _wait(self, job_id: str, reached: Callable[[Job], bool], timeout_s: float) -> Job:
        end = time.monotonic() + timeout_s
        while not reached(job := self.info(job_id)):
            if time.monotonic() > end:
                raise ClusterError(
                    f"job {job_id} is still {job.state} after {timeout_s:.0f} s ({job.message}); {self.hint(job_id)}"
                )
            time.sleep(_POLL_S)
        return job

    def _tail(self, job_id: str, tail: _Tail) -> bool:
        """Pass the log on, and tell whether it ended: else its connection was lost, or was silent and may be dead."""
        import aiohttp

        async def read() -> bool:
            try:
                async with aclosing(self._client.tail_job_logs(job_id)) as pieces, asyncio.timeout(_QUIET_S) as limit:
                    async for piece in pieces:
                        tail.take(piece)
                        limit.reschedule(asyncio.get_running_loop().time() + _QUIET_S)
            except (RuntimeError, TimeoutError, aiohttp.ClientError):
                return False
            return True

        return asyncio.run(read())

    @contextmanager
    def _translated(self, job_id: str) -> Iterator[None]:
        """Turn an error of Ray's client, which holds the server's whole traceback, into one line."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(refused(self.address)) from error
        except requests.RequestException as error:
            raise ClusterError(f"no answer from the dashboard at {self.address} ({type(error).__name__})") from error
        except RuntimeError as error:
            if "does not exist" in str(error):
                raise ClusterError(
                    f"no job {job_id} at {self.address}; `nested-ats job list --address {self.address}` names them"
                ) from error
            if "No available agent" in str(error):
                raise ClusterError(
                    f"{self.address}: the head's agent, which starts jobs, does not answer. Try again in a minute; "
                    "if two Rays run on that machine, give ray start another --dashboard-agent-listen-port (52365)"
                ) from error
            if "already exists" in str(error):  # submitted by somebody else a moment ago
                raise ClusterError(f"job {job_id} was submitted a moment ago; {self.hint(job_id)}") from error
            raise ClusterError(f"{self.address} refuses: {_last_line(error)}") from error


@dataclass
class _Tail:
    """Passes on what is new of a log: Ray always sends it from its beginning."""

    write: Callable[[str], None]
    skip: int
    written: int = 0

    def take(self, piece: str) -> None:
        fresh = piece[max(0, self.skip - self.written) :]
        self.written += len(piece)
        if fresh:
            self.write(fresh)


def connect(address: str, *, insecure: bool = False) -> Jobs:
    """Reach the jobs of a running cluster, or say within seconds why not.

    Parameters
    ----------
    address, insecure
        These are the arguments of `cluster.jobs.dashboard.find_dashboard`, whose errors are raised here.
    """
    dashboard = find_dashboard(address, insecure=insecure)
    return Jobs(_client(dashboard), dashboard)


def derived_id(command: Sequence[str], digest: str) -> str:
    """Name a job after its command and the digest of its working folder."""
    return f"nested-ats-{hashlib.sha256(json.dumps([list(command), digest]).encode()).hexdigest()[:12]}"


def _client(dashboard: Dashboard) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # both set their own level
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    # Ray would take these instead of the address that it is given.
    hidden = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    try:
        return JobSubmissionClient(dashboard.url, headers=dashboard.headers)
    except Exception as error:
        raise ClusterError(f"no jobs at {dashboard.url}: {one_line(error)}") from error
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        state=str(getattr(details.status, "value", details.status)),
        command=details.entrypoint,
        exit_code=details.driver_exit_code,
        message=(details.message or "").partition(", last available logs")[0].partition("\n")[0],
    )


def _last_line(error: Exception) -> str:
    lines = [line.strip(" .") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)
