"""Spread many items over a small pool of workers that may die; each item has exactly one `Outcome`.

Notable: Ray's own restarts are off. The pool replaces a dead worker itself, so it knows which item killed it and
counts: an item that always kills its worker ends as failed, after finitely many attempts, and the others go on.
Workers fetch their own pixels, and only small messages travel. Where items are quick a worker is sent as many at once
as it does in a second or so; where it dies with several, each of them is tried alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cluster.errors import ClusterError, WorkerLostError, one_line, portable
from cluster.session import require_ray, session

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

START_TIMEOUT_S = 300.0  # loading a model over a slow network is minutes; a cluster without room is for ever
_LARGEST_BATCH = 1000  # items
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
    batch_s: float = 0.0,
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
    batch_s
        For how many seconds a worker is given items at once, whose outcomes come together; 0 gives one after the
        other. Without Ray it has no effect.

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
    limits = _Limits(workers, attempts, float("inf") if timeout_s is None else timeout_s, batch_s)
    return _run_with_ray(address, device, _Pool(make_worker, _Queue(ordered, key), limits))


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
    if not len(pool.waiting):
        return
    require_ray()
    with session(address):
        pool.gpus_per_worker = _share_of_gpus(device, pool.limits.workers)
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

    def run(self, items: Sequence[Any], seconds: float) -> tuple[list[tuple[Any, str | None]], float]:
        """Do items until the time is over, at least one; return what became of them, and the seconds that it took."""
        began, answers = time.monotonic(), []
        for item in items:
            answers.append(_attempt(self._work, item))
            if time.monotonic() - began >= seconds:
                break
        return answers, time.monotonic() - began


@dataclass(slots=True)
class _Task:
    item: Any
    name: str
    attempts: int = 0
    alone: bool = False  # whether it was with others when their worker died, which one of them may have caused


class _Queue:
    """Items that wait for a worker: fresh ones in their order, then those that are to be tried again."""

    def __init__(self, items: Sequence[Any], key: Callable[[Any], str]) -> None:
        self._fresh, self._left, self._key = iter(items), len(items), key
        self._again: deque[_Task] = deque()

    def __len__(self) -> int:
        return self._left + len(self._again)

    def take(self, most: int) -> list[_Task]:
        """Take the next tasks, at least one; one that must be alone is."""
        if self._left:
            count = min(most, self._left)
            self._left -= count
            return [_Task(item, self._key(item)) for item in islice(self._fresh, count)]
        taken = [self._again.popleft()]
        while self._again and len(taken) < most and not (taken[0].alone or self._again[0].alone):
            taken.append(self._again.popleft())
        return taken

    def put(self, tasks: Sequence[_Task]) -> None:
        """Queue tasks again, behind the others."""
        self._again.extend(tasks)


@dataclass(frozen=True)
class _Limits:
    """The parameters of `run_tasks` that are numbers."""

    workers: int
    attempts: int
    timeout_s: float
    batch_s: float


@dataclass
class _Slot:
    """A worker, and the one call that it is busy with: some tasks, or loading where there are none."""

    actor: Any
    tasks: list[_Task]
    deadline: float
    size: int = 1  # how many tasks it is given at once


class _Pool:
    """The slots by the reference of their call; a worker without a call is ended, so every worker is listed."""

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]], waiting: _Queue, limits: _Limits) -> None:
        self.waiting = waiting
        self._make_worker = make_worker
        self.limits = limits
        self.gpus_per_worker = 0.0
        self._slots: dict[Any, _Slot] = {}
        self._failed_starts = 0

    def run(self) -> Generator[Outcome[Any, Any], None, None]:
        """Yield outcomes until every task has one."""
        import ray

        while len(self.waiting) or self._busy():
            self._spawn()
            wait_s = max(0.0, min(slot.deadline for slot in self._slots.values()) - time.monotonic())
            calls = list(self._slots)
            if ray.wait(calls, timeout=None if wait_s == float("inf") else wait_s)[0]:
                # All that are done: to look at each call of thousands of workers for one outcome takes too long.
                calls, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
            else:
                calls = []
            for call in calls:
                yield from self._finish(call)
            for call in self._expired():
                yield from self._expire(call)

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        import ray

        for slot in self._slots.values():
            ray.kill(slot.actor)
        self._slots.clear()

    def _busy(self) -> list[_Slot]:
        return [slot for slot in self._slots.values() if slot.tasks]

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
        for _ in range(min(self.limits.workers - len(self._slots), len(self.waiting) - loading)):
            actor = actor_class.remote()
            call = actor.load.remote(self._make_worker)
            self._slots[call] = _Slot(actor, [], time.monotonic() + START_TIMEOUT_S)

    def _finish(self, call: Any) -> list[Outcome[Any, Any]]:
        """Take the answer of a call, and give its worker the next tasks."""
        import ray

        slot = self._slots.pop(call)
        try:
            outcomes = self._take(slot, ray.get(call))
        except ray.exceptions.RayTaskError as error:
            # Our own methods do not raise, so a result, or the function itself, did not get through pickle.
            if not slot.tasks:
                raise ClusterError(f"make_worker does not reach the workers: {one_line(error.cause)}") from error
            if len(slot.tasks) > 1:
                outcomes = self._again(slot.tasks, "a result did not reach the driver")
            else:
                outcomes = self._take(slot, ([(None, one_line(error.cause))], self.limits.batch_s))
        except ray.exceptions.RayError as error:
            ray.kill(slot.actor)
            return self._lost(slot.tasks, error)
        self._next(slot)
        return outcomes

    def _take(self, slot: _Slot, answer: Any) -> list[Outcome[Any, Any]]:
        if not slot.tasks:
            if answer is not None:
                raise answer
            self._failed_starts = 0
            return []
        results, seconds = answer
        done, rest = slot.tasks[: len(results)], slot.tasks[len(results) :]
        for task in rest:
            task.attempts -= 1  # it was not begun
        self.waiting.put(rest)
        slot.size = max(1, min(int(len(done) * self.limits.batch_s / max(seconds, 1e-9)), _LARGEST_BATCH))
        return [Outcome(t.item, result, error, t.attempts) for t, (result, error) in zip(done, results, strict=True)]

    def _next(self, slot: _Slot) -> None:
        import ray

        if not len(self.waiting):
            ray.kill(slot.actor)
            return
        share = math.ceil(len(self.waiting) / (2 * self.limits.workers))  # so that all end at about the same time
        tasks = self.waiting.take(min(slot.size, share))
        for task in tasks:
            task.attempts += 1
        call = slot.actor.run.remote([task.item for task in tasks], self.limits.batch_s)
        deadline = time.monotonic() + self.limits.timeout_s + (self.limits.batch_s if len(tasks) > 1 else 0.0)
        self._slots[call] = _Slot(slot.actor, tasks, deadline, slot.size)

    def _lost(self, tasks: list[_Task], error: Exception) -> list[Outcome[Any, Any]]:
        if tasks:
            return self._again(tasks, "its worker died")
        self._failed_starts += 1
        if self._failed_starts >= START_FAILURES + self.limits.workers - 1:
            raise WorkerLostError(f"{self._failed_starts} workers in a row died while starting: {one_line(error)}")
        return []

    def _expire(self, call: Any) -> list[Outcome[Any, Any]]:
        import ray

        slot = self._slots[call]
        if slot.tasks:
            del self._slots[call]
            ray.kill(slot.actor)
            return self._again(slot.tasks, f"it took longer than {self.limits.timeout_s:g} s")
        if not self._busy():
            raise ClusterError(
                f"no worker started within {START_TIMEOUT_S:g} s: each needs 1 CPU and {self.gpus_per_worker:g} "
                "GPUs, and a model that loads in that time"
            )
        slot.deadline = time.monotonic() + START_TIMEOUT_S  # the others have work; this one may still get room
        return []

    def _again(self, tasks: list[_Task], cause: str) -> list[Outcome[Any, Any]]:
        """Queue tasks again, or give a task up that was alone; with others it may not have been the cause."""
        [first, *others] = tasks
        if others:
            logger.warning("%s and %d others: %s; trying each alone", first.name, len(others), cause)
            for task in tasks:
                task.attempts, task.alone = task.attempts - 1, True
        elif first.attempts < self.limits.attempts:
            logger.warning("%s: %s; trying it again", first.name, cause)
            first.alone = True
        else:
            return [Outcome(first.item, None, f"{first.name}: {cause} (attempt {first.attempts})", first.attempts)]
        self.waiting.put(tasks)
        return []
