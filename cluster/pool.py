"""Spread many items over a small pool of workers that may die; each item has exactly one `Outcome`.

Notable: Ray's own restarts are off. The pool replaces a dead worker itself, so it knows which item killed it and
counts: an item that always kills its worker ends as failed, after finitely many attempts, and the others go on.
Every worker has at most one item in flight; workers fetch their own pixels, and only small messages travel.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cluster.errors import ClusterError, WorkerLostError, one_line, portable
from cluster.session import require_ray, session

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

START_TIMEOUT_S = 300.0  # loading a model over a slow network is minutes; a cluster without room is for ever
START_FAILURES = 3  # one worker may fail so often in a row; a lost node may take all the workers that start at once


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What became of one item.

    Attributes
    ----------
    item
        The item, as given.
    result
        What the worker returned for the item; None where it failed.
    error
        One line that names the cause of the failure; None where the item succeeded.
    attempts
        How often the item was started, >= 1.
    """

    item: Item
    result: Result | None
    error: str | None
    attempts: int


def run_tasks(
    make_worker: Callable[[], Callable[[Item], Result]],
    items: Sequence[Item],
    *,
    key: Callable[[Item], str] = str,
    address: str = "none",
    workers: int = 1,
    device: str = "cpu",
    attempts: int = 2,
    timeout_s: float | None = None,
    cost: Callable[[Item], float] | None = None,
) -> Generator[Outcome[Item, Result], None, None]:
    """Yield one `Outcome` per item, each as soon as it is known.

    An exception raised for an item fails that item at once; the death of its worker, or a timeout, is tried again
    in a new worker. Close the generator (``contextlib.closing``) to stop early: that ends the workers.

    Parameters
    ----------
    make_worker
        It is called once in each worker, loads what is needed, and returns the function of one item. It must be
        picklable.
    items
        They must be small and picklable, as paths are.
    key
        It names an item in messages.
    address
        The address that `session` takes; ``"none"`` runs the items in this process, one by one, in their order.
    workers
        The largest number of workers, of one CPU each; without Ray it is 1.
    device
        ``"cpu"``; ``"cuda"`` shares the cluster's GPUs evenly among the workers, several of them on each if there are
        more workers; ``"auto"`` does so if the cluster has any. Without Ray it has no effect.
    attempts
        How often an item may be started, >= 1.
    timeout_s
        How many seconds an attempt may take before its worker is ended. Without Ray it has no effect.
    cost
        The expected cost of an item, in any unit: the costliest start first. Without Ray it has no effect.

    Returns
    -------
    Generator of Outcome
        The outcomes in the order in which items are completed.

    Raises
    ------
    WorkerLostError
        Workers die while they start.
    ClusterError
        There is no session or no room for a single worker, or an error of ``make_worker`` does not pickle.
    Exception
        Any other error of ``make_worker`` arrives with its own type.
    """
    if workers < 1 or attempts < 1:
        raise ValueError(f"workers ({workers}) and attempts ({attempts}) must be at least 1")
    if address == "none":
        if workers != 1:
            raise ValueError(f"the address 'none' runs 1 worker, not {workers}")
        return _run_here(make_worker, items)
    ordered = sorted(items, key=cost, reverse=True) if cost else list(items)
    tasks = deque(_Task(item, key(item)) for item in ordered)
    return _run_with_ray(address, device, _Pool(make_worker, tasks, workers, attempts, timeout_s))


def _run_here(
    make_worker: Callable[[], Callable[[Item], Result]], items: Sequence[Item]
) -> Generator[Outcome[Item, Result], None, None]:
    if not items:
        return
    work = make_worker()
    for item in items:
        result, error = _attempt(work, item)
        yield Outcome(item, result, error, 1)


def _run_with_ray(address: str, device: str, pool: _Pool) -> Generator[Outcome[Any, Any], None, None]:
    if not pool.waiting:
        return
    require_ray()
    with session(address):
        pool.gpus_per_worker = _share_of_gpus(device, pool.workers)
        try:
            yield from pool.run()
        finally:
            pool.close()


def _share_of_gpus(device: str, workers: int) -> float:
    """Return each worker's part of a GPU, by the cluster's GPUs: the driver's own machine may have others or none."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if device == "cuda" and not gpus:
        raise ClusterError("the cluster has no GPUs: choose the device auto or cpu, or add nodes with GPUs")
    return 1 / math.ceil(workers / gpus) if gpus and device != "cpu" else 0.0


def _attempt(work: Callable[[Item], Result], item: Item) -> tuple[Result | None, str | None]:
    try:
        return work(item), None
    except Exception as error:
        logger.debug("an item failed", exc_info=True)
        return None, one_line(error)


class _Worker:
    """The actor. Errors travel as values, so that what Ray raises is always about the worker itself."""

    def load(self, make_worker: Callable[[], Callable[[Any], Any]]) -> Exception | None:
        try:
            self._work = make_worker()
        except Exception as error:  # noqa: BLE001 - sent to the driver, which raises it
            return portable(error)
        return None

    def run(self, item: Any) -> tuple[Any, str | None]:
        return _attempt(self._work, item)


@dataclass
class _Task:
    item: Any
    name: str
    attempts: int = 0


@dataclass
class _Slot:
    """A worker, and the one call that it is busy with: a task, or loading where the task is None."""

    actor: Any
    task: _Task | None
    deadline: float


class _Pool:
    """The slots by the reference of their call; a worker without a call is ended, so every worker is listed."""

    def __init__(
        self,
        make_worker: Callable[[], Callable[[Any], Any]],
        waiting: deque[_Task],
        workers: int,
        attempts: int,
        timeout_s: float | None,
    ) -> None:
        self.waiting = waiting
        self._make_worker = make_worker
        self.workers = workers
        self.gpus_per_worker = 0.0
        self._attempts = attempts
        self._timeout_s = float("inf") if timeout_s is None else timeout_s
        self._slots: dict[Any, _Slot] = {}
        self._failed_starts = 0

    def run(self) -> Generator[Outcome[Any, Any], None, None]:
        """Yield outcomes until every task has one."""
        import ray

        while self.waiting or self._busy():
            self._spawn()
            wait_s = max(0.0, min(slot.deadline for slot in self._slots.values()) - time.monotonic())
            done, _ = ray.wait(list(self._slots), timeout=None if wait_s == float("inf") else wait_s)
            for call in done:
                outcome = self._finish(call)
                if outcome:
                    yield outcome
            for call in self._expired():
                outcome = self._expire(call)
                if outcome:
                    yield outcome

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        import ray

        for slot in self._slots.values():
            ray.kill(slot.actor)
        self._slots.clear()

    def _busy(self) -> list[_Slot]:
        return [slot for slot in self._slots.values() if slot.task]

    def _expired(self) -> list[Any]:
        now = time.monotonic()
        return [call for call, slot in self._slots.items() if slot.deadline <= now]

    def _spawn(self) -> None:
        """Start workers up to the limit, but no more than there are waiting tasks for them."""
        import ray

        loading = len(self._slots) - len(self._busy())
        actor_class = ray.remote(num_cpus=1, num_gpus=self.gpus_per_worker, max_restarts=0, max_task_retries=0)(
            _Worker
        )
        for _ in range(min(self.workers - len(self._slots), len(self.waiting) - loading)):
            actor = actor_class.remote()
            call = actor.load.remote(self._make_worker)
            self._slots[call] = _Slot(actor, None, time.monotonic() + START_TIMEOUT_S)

    def _finish(self, call: Any) -> Outcome[Any, Any] | None:
        """Take the answer of a call, and give its worker the next task."""
        import ray

        slot = self._slots.pop(call)
        try:
            answer = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            # Our own methods do not raise, so the result, or the function itself, did not get through pickle.
            if slot.task is None:
                raise ClusterError(f"make_worker does not reach the workers: {one_line(error.cause)}") from error
            answer = None, one_line(error.cause)
        except ray.exceptions.RayError as error:
            ray.kill(slot.actor)
            return self._lost(slot.task, error)
        outcome = self._take(slot.task, answer)
        self._next(slot.actor)
        return outcome

    def _take(self, task: _Task | None, answer: Any) -> Outcome[Any, Any] | None:
        if task is not None:
            result, error = answer
            return Outcome(task.item, result, error, task.attempts)
        if answer is not None:
            raise answer
        self._failed_starts = 0
        return None

    def _next(self, actor: Any) -> None:
        import ray

        if not self.waiting:
            ray.kill(actor)
            return
        task = self.waiting.popleft()
        task.attempts += 1
        self._slots[actor.run.remote(task.item)] = _Slot(actor, task, time.monotonic() + self._timeout_s)

    def _lost(self, task: _Task | None, error: Exception) -> Outcome[Any, Any] | None:
        if task is not None:
            return self._again(task, "its worker died")
        self._failed_starts += 1
        if self._failed_starts >= START_FAILURES + self.workers - 1:
            raise WorkerLostError(f"{self._failed_starts} workers in a row died while starting: {one_line(error)}")
        return None

    def _expire(self, call: Any) -> Outcome[Any, Any] | None:
        import ray

        slot = self._slots[call]
        if slot.task is not None:
            del self._slots[call]
            ray.kill(slot.actor)
            return self._again(slot.task, f"it took longer than {self._timeout_s:g} s")
        if not self._busy():
            raise ClusterError(
                f"no worker started within {START_TIMEOUT_S:g} s: each needs 1 CPU and {self.gpus_per_worker:g} "
                "GPUs, and a model that loads in that time"
            )
        slot.deadline = time.monotonic() + START_TIMEOUT_S  # the others have work; this one may still get room
        return None

    def _again(self, task: _Task, cause: str) -> Outcome[Any, Any] | None:
        """Queue the task behind the others, or give it up."""
        if task.attempts < self._attempts:
            logger.warning("%s: %s; trying it again", task.name, cause)
            self.waiting.append(task)
            return None
        return Outcome(task.item, None, f"{task.name}: {cause} (attempt {task.attempts})", task.attempts)
