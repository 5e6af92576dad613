"""Where the tasks of a conversion run: in Dask's threads, processes or cluster, or in the caller's own executor.

All of them run the same picklable tasks (``storage.conversion.build``) and return receipts to the one driver, which
alone keeps the journal. Processes and clusters must see the source and the target under the same names.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from storage.errors import ConversionError

if TYPE_CHECKING:
    from storage.conversion.build import Job, Task
    from storage.conversion.receipts import Receipt

CustomExecutor = Callable[[Callable[[], Callable[[Any], Any]], Sequence[Any]], Iterable[Any]]
"""``executor(make_worker, items)``: call ``make_worker()`` once in each worker, give each item to the function that
it returned, and yield the results in any order. Both arguments are picklable, and so are results."""

CONNECT_TIMEOUT_S = 10.0
Executor = str | CustomExecutor
Attempt = Callable[["Task"], "list[Receipt] | Exception"]
OnAnswer = Callable[["list[Receipt] | Exception"], None]
Distribute = Callable[[Attempt, "Sequence[Task]", OnAnswer], None]  # attempts elsewhere, calls back in this thread
RunTasks = Callable[["Sequence[Task]", Callable[["list[Receipt]"], None]], None]


def check_executor(executor: Executor) -> None:
    """Raise ValueError for an executor that `open_executor` does not know."""
    if callable(executor) or executor in ("threads", "processes"):
        return
    if executor.partition("://")[0] not in ("tcp", "tls", "ws", "wss", "ucx"):
        raise ValueError(f"executor must be threads, processes, tcp://host:port or a function, not {executor!r}")


@contextmanager
def open_executor(executor: Executor, workers: int, job: Job) -> Iterator[RunTasks]:
    """Yield a function that runs the tasks of a wave and calls back with the receipts of each.

    Parameters
    ----------
    executor
        "threads", "processes", the address of a ``distributed`` scheduler (``tcp://host:port``), or a function as
        described at ``CustomExecutor``.
    workers
        Number of threads or processes; a cluster has its own.
    job
        The job that the tasks belong to.

    Raises
    ------
    ConversionError
        The cluster does not answer or has lost its workers.
    """
    attempt: Attempt = job.attempt if executor == "threads" else partial(attempt_pickled, pickle.dumps(job))
    opened: AbstractContextManager[Distribute]
    if callable(executor):
        opened = nullcontext(partial(_custom, executor))
    else:
        opened = _pool(executor, workers) if executor in ("threads", "processes") else _cluster(executor)
    with opened as distribute:

        def run(tasks: Sequence[Task], finish: Callable[[list[Receipt]], None]) -> None:
            def on_answer(answer: list[Receipt] | Exception) -> None:
                if isinstance(answer, Exception):
                    raise answer
                finish(answer)

            if len(tasks) == 1:  # another worker would gain nothing
                on_answer(job.attempt(tasks[0]))
            elif tasks:
                distribute(attempt, tasks, on_answer)

        yield run


def attempt_pickled(job: bytes, task: Task) -> list[Receipt] | Exception:
    """Run a task of a pickled job."""
    answer = _load(job).attempt(task)
    if isinstance(answer, Exception):  # the libraries' errors behind it may not pickle; the message tells them
        answer.__cause__ = answer.__context__ = None
    return answer


@lru_cache(maxsize=1)
def _load(job: bytes) -> Job:
    loaded: Job = pickle.loads(job)  # noqa: S301  the driver of this conversion made it
    return loaded


def _custom(executor: CustomExecutor, attempt: Attempt, tasks: Sequence[Task], on_answer: OnAnswer) -> None:
    for answer in executor(partial(partial, attempt), tasks):
        on_answer(answer)


@contextmanager
def _pool(kind: str, workers: int) -> Iterator[Distribute]:
    """Run tasks by Dask on threads or processes; an error or an interrupt waits for those in flight."""
    from dask.local import get_async  # Dask's scheduler for any pool of concurrent.futures

    pool: ThreadPoolExecutor | ProcessPoolExecutor
    if kind == "threads":
        pool = ThreadPoolExecutor(workers, thread_name_prefix="storage-convert")
    else:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)

    def distribute(attempt: Attempt, tasks: Sequence[Task], on_answer: OnAnswer) -> None:
        graph = {number: (attempt, task) for number, task in enumerate(tasks)}
        after_each = (None, None, None, lambda _key, answer, *_state: on_answer(answer), None)  # in this thread
        get_async(pool.submit, workers, graph, list(graph), callbacks=[after_each])

    try:
        yield distribute
    except BrokenExecutor as error:
        raise ConversionError("a worker process was killed; run again to go on from here") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Have this worker end when the driver does, however it ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101  a worker has one

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _cluster(address: str) -> Iterator[Distribute]:
    """Run tasks on a cluster of Dask."""
    try:
        from distributed import Client, as_completed
        from distributed.scheduler import KilledWorker
    except ImportError:
        raise ConversionError(f"{address}: needs Dask's scheduler; pip install distributed") from None
    try:
        client = Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{address}: no Dask scheduler answers there ({error})") from error

    def distribute(attempt: Attempt, tasks: Sequence[Task], on_answer: OnAnswer) -> None:
        futures = client.map(attempt, tasks, pure=False)
        try:
            for _, answer in as_completed(futures, with_results=True):
                on_answer(answer)
        finally:
            client.cancel(futures)

    try:
        with client, client.as_current():
            yield distribute
    except (KilledWorker, CancelledError) as error:
        raise ConversionError(f"{address}: the cluster or its workers were lost ({error}); run again") from error
