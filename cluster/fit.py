"""Run one training function on N workers: in this process, or in actors of Ray that torch.distributed connects.

Notable: Ray never sees a checkpoint. The function writes and finds its own, in a directory that all workers share,
so a run can be resumed with another number of workers, or without Ray.

An error of the function and the death of a worker are told apart: the first ends the run at once and is raised
here as it was raised there, the second starts a new group, a finite number of times.

A group is as large as there is room for when it starts: the largest number of workers is asked for, and those that
come are the group. After a lost node a run with a range of sizes thus goes on with fewer workers, and with more again
when the next group starts.
"""

from __future__ import annotations

import logging
import socket
import tempfile
import textwrap
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from cluster.context import Context, GroupContext, LocalContext
from cluster.errors import ClusterError, WorkerLostError, one_line, portable
from cluster.session import require_ray, session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    TrainingFunction = Callable[[Context, Mapping[str, Any]], Any]

logger = logging.getLogger(__name__)

PLACE_TIMEOUT_S = 300.0  # an autoscaler brings a node in minutes; a cluster without room is for ever
SETTLE_S = 10.0  # by then what a lost group held is free again, and a lost node is known to be lost


def fit(
    function: TrainingFunction,
    arguments: Mapping[str, Any],
    *,
    address: str = "none",
    workers: int | tuple[int, int] = 1,
    device: str = "auto",
    max_failures: int = 3,
    progress: Callable[[], object] = lambda: None,
    timeout_s: int = 120,
) -> Any:
    """Run ``function(context, arguments)`` on every worker and return what rank 0 returns.

    Parameters
    ----------
    function
        Workers must be able to import it. It resumes from its own last checkpoint whenever it is called, and talks to
        its peers only through the `Context`.
    arguments
        They must be small and picklable.
    address
        The address that `session` takes; ``"none"`` calls the function in this process.
    workers
        The number of workers, each of one CPU; without Ray it is 1. A range ``(least, most)`` starts every group with
        as many as there is room for, so that a run goes on with fewer after the loss of a node.
    device
        Without Ray this is ``"cpu"``, ``"cuda:0"``, or ``"auto"`` for the GPU if there is one. With Ray, ``"cuda"``
        gives each worker one GPU, and NCCL instead of gloo; ``"auto"`` does so if the cluster has enough of them.
    max_failures
        How many new groups are started after lost workers, >= 0; a change of `progress` begins the count again.
    progress
        It is called in this process after each loss, and its value must change as the function gets on, as the time
        of the last checkpoint does.
    timeout_s
        How many seconds a collective waits for its peers before they count as lost.

    Returns
    -------
    Any
        Rank 0's return value, which must be picklable.

    Raises
    ------
    WorkerLostError
        Workers were lost more than ``max_failures`` times in a row.
    ClusterError
        There is no session or no room for the workers, or a function, value or error does not pickle.
    Exception
        Any other error of the function arrives with its own type.
    """
    least, most = (workers, workers) if isinstance(workers, int) else workers
    if not 1 <= least <= most:
        raise ValueError(f"workers must be a positive number or a range of them, not {workers}")
    if address == "none":
        if most != 1:
            raise ValueError(f"the address 'none' runs 1 worker, not {workers}")
        return function(LocalContext(_choose_device(device)), arguments)
    require_ray()
    with session(address):
        use_gpu = _use_gpu(device, least)
        launch = _Launch(function, arguments, least, most, use_gpu, timeout_s, local=address == "local")
        if launch.local:
            _check_resources(launch)
        failures, seen = 0, progress()
        while failures <= max_failures:
            end = _attempt(launch)
            if end.error is not None:
                raise end.error
            if end.lost is None:
                return end.value
            before, seen = seen, progress()
            failures = failures + 1 if seen == before else 1
            logger.warning("workers were lost (%d of at most %d times): %s", failures, max_failures, end.lost)
        raise WorkerLostError(f"workers were lost {failures} times in a row; the last time: {end.lost}")


def _choose_device(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _use_gpu(device: str, least: int) -> bool:
    """Decide by the GPUs of the cluster, because the driver's own machine may have others or none."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    if device == "auto" and 0 < gpus < least:
        logger.warning("%d workers train on CPUs: the cluster has only %g GPUs", least, gpus)
    return device.startswith("cuda") or (device == "auto" and gpus >= least)


@dataclass(frozen=True)
class _Launch:
    function: TrainingFunction
    arguments: Mapping[str, Any]
    least: int
    most: int
    use_gpu: bool
    timeout_s: int
    local: bool = False

    @property
    def resources(self) -> dict[str, int]:
        """The logical resources that each worker takes."""
        return {"CPU": 1, "GPU": 1} if self.use_gpu else {"CPU": 1}


@dataclass(frozen=True)
class _End:
    """How a worker or its group ended: with a value, with an error to raise, or lost for a reason."""

    value: Any = None
    error: Exception | None = None
    lost: str | None = None


def _check_resources(launch: _Launch) -> None:
    """Refuse at once what a local instance can never give, while a cluster may still grow."""
    import ray

    have = ray.cluster_resources()
    for kind in launch.resources:
        if have.get(kind, 0) < launch.least:
            raise ClusterError(
                f"{launch.least} workers need {launch.least} {kind}s, but this machine's Ray session has "
                f"{have.get(kind, 0):g}: ask for fewer workers"
            )


def _attempt(launch: _Launch) -> _End:
    """Run one group to its end, and leave nothing of it behind."""
    import ray

    options = {"num_cpus": 1, "num_gpus": int(launch.use_gpu), "max_restarts": 0, "max_task_retries": 0}
    workers: list[Any] = []
    try:
        workers += [ray.remote(**options)(_TrainingWorker).remote() for _ in range(launch.most)]
        group = _present(launch, workers)
        meeting = ray.get(group[0].meeting.remote(local=launch.local))
        return _end([each.run.remote(launch, rank, len(group), meeting) for rank, each in enumerate(group)])
    except ray.exceptions.RayTaskError as error:
        # A worker's own methods do not raise, so something did not get to it, or back from it.
        return _End(error=ClusterError(f"the function or its value does not pickle: {one_line(error.cause)}"))
    except ray.exceptions.RayError as error:
        return _End(lost=textwrap.shorten(one_line(error), 300, placeholder=" ..."))
    finally:
        for each in workers:
            ray.kill(each)


def _present(launch: _Launch, workers: list[Any]) -> list[Any]:
    """Wait for room, and return the workers that got it, with those of a node next to each other."""
    import ray

    calls = {each.node.remote(): each for each in workers}
    began = grown = time.monotonic()
    come: list[Any] = []
    while len(come) < len(calls):
        done, _ = ray.wait(list(calls), num_returns=len(come) + 1, timeout=0.5)
        now = time.monotonic()
        if len(done) > len(come):
            come, grown = done, now
        elif len(come) >= launch.least and now - grown > SETTLE_S:
            break
        elif now - began > PLACE_TIMEOUT_S:
            have = ray.cluster_resources()
            raise ClusterError(
                f"the cluster has room for {len(come)} of {launch.least} workers: all in all it has "
                f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs, and each worker needs "
                f"{' and '.join(f'1 {kind}' for kind in launch.resources)}; ask for fewer, or for a range"
            )
    nodes = dict(zip(come, ray.get(come), strict=True))
    return [calls[call] for call in sorted(come, key=nodes.__getitem__)]


def _end(calls: list[Any]) -> _End:
    """Wait for all workers, or only for the first that fails, because its peers may wait for it for ever."""
    import ray

    value, waiting = None, calls
    while waiting:
        (call, *_), waiting = ray.wait(waiting)
        try:
            end: _End = ray.get(call)
        except ray.exceptions.RayActorError as error:
            return _End(lost=f"rank {calls.index(call)}: {type(error).__name__}")
        if end.error is not None or end.lost is not None:
            return end
        value = end.value if call == calls[0] else value
    return _End(value=value)


class _TrainingWorker:
    """The actor. What the function raises travels as a value, so what Ray raises is about the worker itself."""

    def node(self) -> str:
        """Name the node that this worker is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def meeting(self, *, local: bool) -> str:
        """Name a place where the group can meet, of which this worker will be rank 0.

        On one machine this is a file in the session's temporary folder, as torch's store would listen everywhere.
        """
        if local:
            return f"file://{tempfile.mkdtemp(prefix='rendezvous-')}/store"
        import ray

        host = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return f"tcp://[{host}]:{port}" if family == socket.AF_INET6 else f"tcp://{host}:{port}"

    def run(self, launch: _Launch, rank: int, size: int, meeting: str) -> _End:
        """Meet the others and call the function."""
        import torch
        import torch.distributed as dist

        backend, device = ("nccl", "cuda:0") if launch.use_gpu else ("gloo", "cpu")  # Ray shows each its own GPU
        try:
            if launch.use_gpu:
                torch.cuda.set_device(device)
            dist.init_process_group(
                backend, meeting, rank=rank, world_size=size, timeout=timedelta(seconds=launch.timeout_s)
            )
        except RuntimeError as error:  # a peer died, or somebody else took the port
            return _End(lost=f"rank {rank} did not meet its peers: {one_line(error)}")
        try:
            return _End(value=launch.function(GroupContext(rank, size, device), launch.arguments))
        except WorkerLostError as error:
            return _End(lost=str(error))
        except Exception as error:  # noqa: BLE001 - sent to the driver, which raises it
            return _End(error=portable(error))
