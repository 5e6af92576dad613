"""Where the tasks of a conversion run: threads, processes or a cluster of Dask, or whatever the caller brings.

All of them run the same picklable tasks (``storage.conversion.build``) and hand receipts back to the one driver,
which alone keeps the journal. Processes and clusters must see the source and the target under the same names.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import Executor as FuturesExecutor
from contextlib import contextmanager
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
Finish = Callable[["list[Receipt]"], None]
Run = Callable[["Sequence[Task]", Finish], None]
Work = Callable[[Any], Any]  # from a task to its receipts, or the error it met
Take = Callable[[Any], None]
Spread = Callable[["Sequence[Task]", Take], None]


def check_executor(executor: Executor) -> None:
    """Raise ValueError where it is none that `open_executor` knows."""
    if callable(executor) or executor in ("threads", "processes"):
        return
    if executor.partition("://")[0] not in ("tcp", "tls", "ws", "wss", "ucx"):
        raise ValueError(f"executor must be threads, processes, tcp://host:port or a function, not {executor!r}")


@contextmanager
def open_executor(executor: Executor, workers: int, job: Job) -> Iterator[Run]:
    """Give a function that runs the tasks of a wave, calling back with the receipts of each.

    Parameters
    ----------
    executor
        "threads", "processes", the address of a ``distributed`` scheduler (``tcp://host:port``), or a function as
        described at ``CustomExecutor``.
    workers
        Threads or processes; clusters have their own number.
    job
        What the tasks need.

    Raises
    ------
    ConversionError
        The cluster does not answer or lost its workers.
    """
    if executor == "threads":
        with _pool(ThreadPoolExecutor(workers, thread_name_prefix="storage-convert")) as pool:
            yield partial(_run, job, partial(_dask_threads, pool, job.attempt))
        return
    work = partial(run_pickled, pickle.dumps(job))
    if callable(executor):
        yield partial(_run, job, partial(_custom, executor, partial(partial, work)))
    elif executor == "processes":
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        with _pool(ProcessPoolExecutor(workers, context, initializer=_end_with_parent)) as pool:
            try:
                yield partial(_run, job, partial(_dask_processes, pool, work))
            except BrokenExecutor as error:
                raise ConversionError("a worker process was killed; run again to go on from here") from error
    else:
        with _client(executor) as client:
            yield partial(_run, job, partial(_dask_cluster, client, work))


def _run(job: Job, spread: Spread, tasks: Sequence[Task], finish: Finish) -> None:
    """Run a wave; a single task is run here, as nothing would be gained elsewhere."""

    def take(answer: list[Receipt] | Exception) -> None:
        if isinstance(answer, Exception):
            raise answer
        finish(answer)

    if len(tasks) == 1:
        take(job.attempt(tasks[0]))
    elif tasks:
        spread(tasks, take)


def _end_with_parent() -> None:
    """Have this worker end when the driver is gone, however it went."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101  a worker has one

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _pool(pool: FuturesExecutor) -> Iterator[FuturesExecutor]:
    """On an error or an interrupt, wait for the tasks in flight and start no others."""
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_pickled(job: bytes, task: Task) -> list[Receipt] | Exception:
    """Run a task of a pickled job."""
    answer = _load(job).attempt(task)
    if isinstance(answer, Exception):
        answer.__cause__ = answer.__context__ = None  # of a library, which may not pickle; the message tells it
    return answer


@lru_cache(maxsize=1)
def _load(job: bytes) -> Job:
    loaded: Job = pickle.loads(job)  # noqa: S301  made by the driver of this very conversion
    return loaded


def _dask_threads(pool: FuturesExecutor, work: Work, tasks: Sequence[Task], take: Take) -> None:
    from dask.threaded import get

    get(_flat(work, tasks), list(range(len(tasks))), pool=pool, callbacks=[_after_each(take)])


def _dask_processes(pool: FuturesExecutor, work: Work, tasks: Sequence[Task], take: Take) -> None:
    from dask.multiprocessing import get

    keys = list(range(len(tasks)))
    get(_flat(work, tasks), keys, pool=pool, optimize_graph=False, callbacks=[_after_each(take)])


def _flat(work: Work, tasks: Sequence[Task]) -> dict[int, Any]:
    """Tasks without dependencies as a graph of Dask."""
    return {number: (work, task) for number, task in enumerate(tasks)}


def _after_each(take: Take) -> Any:
    """Dask's callback after each task, in the driver's thread."""
    from dask.callbacks import Callback, normalize_callback

    return normalize_callback(Callback(posttask=lambda _key, answer, *_state: take(answer)))


def _custom(executor: CustomExecutor, make_worker: Callable[[], Work], tasks: Sequence[Task], take: Take) -> None:
    for answer in executor(make_worker, tasks):
        take(answer)


@contextmanager
def _client(address: str) -> Iterator[Any]:
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError:
        raise ConversionError(f"{address}: needs Dask's scheduler; pip install distributed") from None
    try:
        client = Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{address}: no Dask scheduler answers there ({error})") from error
    try:
        with client, client.as_current():
            yield client
    except (KilledWorker, CancelledError) as error:
        raise ConversionError(f"{address}: the cluster or its workers were lost ({error}); run again") from error


def _dask_cluster(client: Any, work: Work, tasks: Sequence[Task], take: Take) -> None:
    from distributed import as_completed

    futures = client.map(work, tasks, pure=False)
    try:
        for _, answer in as_completed(futures, with_results=True):
            take(answer)
    finally:
        client.cancel(futures)
