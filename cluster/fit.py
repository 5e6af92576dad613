"""One training function on N workers, in this process or as a Ray Train group.

Notable: Ray never sees a checkpoint. The function writes and finds its own, in a directory that all workers share,
so a run can be resumed with another number of workers, or without Ray.

An error of the function and the death of a worker are told apart: the first ends the run at once and is raised
here as it was raised there, the second starts a new group, a finite number of times.

Each group is launched from a supervisor, an actor that owns everything Ray Train starts. Ending the supervisor
therefore ends the whole group in any state: after Ctrl-C, and after failures in which Ray Train keeps its CPUs.

The size of a group is chosen when it starts, from the room that there is. After a lost node a run with a range of
sizes thus goes on with fewer workers, and with more again when the next group starts.
"""

from __future__ import annotations

import logging
import shutil
import textwrap
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.context import Context, LocalContext, RayContext
from cluster.errors import ClusterError, WorkerLostError, one_line, portable
from cluster.session import require_ray, session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    TrainingFunction = Callable[[Context, Mapping[str, Any]], Any]

logger = logging.getLogger(__name__)

PLACE_TIMEOUT_S = 300.0  # an autoscaler brings a node in minutes; a cluster without room is for ever
SETTLE_S = 10.0  # what a lost group held is free again, and a lost node is known to be lost, within this


def fit(
    function: TrainingFunction,
    arguments: Mapping[str, Any],
    *,
    address: str = "none",
    workers: int | tuple[int, int] = 1,
    device: str = "auto",
    name: str = "fit",
    storage_path: str | Path,
    max_failures: int = 3,
    progress: Callable[[], object] = lambda: None,
    timeout_s: int = 120,
) -> Any:
    """Run ``function(context, arguments)`` on every worker and return what rank 0 returns.

    Parameters
    ----------
    function
        Importable by the workers. It resumes from its own last checkpoint whenever it is called, and talks to its
        peers only through the `Context`.
    arguments
        Small and picklable.
    address
        As for `session`; ``"none"`` calls the function in this process.
    workers
        Number of workers, each of one CPU; 1 without Ray. A range ``(least, most)`` starts every group with as many
        as there is room for, so that a run goes on with fewer after the loss of a node.
    device
        Without Ray: ``"cpu"``, ``"cuda:0"``, or ``"auto"`` for the GPU if there is one. With Ray: ``"cuda"`` gives
        each worker one GPU, and NCCL instead of gloo; ``"auto"`` does so if the cluster has enough of them.
    name
        Name of the run in Ray's own records.
    storage_path
        Directory on a path shared by all nodes. Ray keeps its book-keeping there while the run lasts.
    max_failures
        New groups after lost workers, >= 0, since `progress` last told of any.
    progress
        Asked in this process after each loss: its value changes as the function gets on, as the time of its last
        checkpoint does. As it gets on finitely often, so do groups end.
    timeout_s
        Seconds that a collective waits for its peers before they count as lost.

    Returns
    -------
    Any
        Rank 0's return value, which must be picklable.

    Raises
    ------
    WorkerLostError
        Workers were lost more than ``max_failures`` times in a row.
    ClusterError
        No session, no room for the workers, a failure inside Ray, or an error of the function that does not pickle.
    Exception
        Any other error of the function, with its own type.
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
        path = Path(storage_path).resolve()
        launch = _Launch(function, arguments, least, most, use_gpu, name, path, timeout_s, local=address == "local")
        _check_resources(address, launch)
        failures, seen = 0, progress()
        while failures <= max_failures:
            end = _attempt(launch, _room(launch))
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
    """Decide by what the cluster has; the driver's own machine may be another one."""
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
    name: str
    storage_path: Path
    timeout_s: int
    local: bool = False

    @property
    def resources(self) -> dict[str, float]:
        """Of each worker."""
        return {"CPU": 1, "GPU": 1} if self.use_gpu else {"CPU": 1}


@dataclass(frozen=True)
class _End:
    """How one group ended: with a value, with an error to raise, or with workers lost (and what Ray says to it)."""

    value: Any = None
    error: Exception | None = None
    lost: str | None = None


class _FunctionFailedError(Exception):
    """Carries an error of the training function through Ray, apart from all that can happen to a worker."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _check_resources(address: str, launch: _Launch) -> None:
    """Refuse at once what a local instance can never give; a cluster may still grow."""
    import ray

    have = ray.cluster_resources()
    for kind in launch.resources:
        if address == "local" and have.get(kind, 0) < launch.least:
            raise ClusterError(
                f"{launch.least} workers need {launch.least} {kind}s, but this machine's Ray session has "
                f"{have.get(kind, 0):g}: ask for fewer workers"
            )


def _room(launch: _Launch) -> int:
    """Wait for room, and say for how many workers of the next group there is.

    Every worker asks with a placement group of its own, which is given back: Ray grants these as it will grant the
    training group, node by node, and an autoscaler sees the demand.
    """
    import ray
    from ray.util.placement_group import placement_group, placement_group_table

    asked = [placement_group([launch.resources]).id.hex() for _ in range(launch.most)]
    began = time.monotonic()
    try:
        while True:
            table = placement_group_table()
            room: int = sum(table[one]["state"] == "CREATED" for one in asked)
            waited = time.monotonic() - began
            if room == launch.most or (room >= launch.least and waited > SETTLE_S):
                return room
            if waited > PLACE_TIMEOUT_S:
                have = ray.cluster_resources()
                raise ClusterError(
                    f"the cluster has room for {room} of {launch.least} workers: all in all it has "
                    f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs, and each worker needs "
                    f"{' and '.join(f'1 {kind}' for kind in launch.resources)}; ask for fewer, or for a range"
                )
            time.sleep(0.1)
    finally:
        _free_reservations()


def _attempt(launch: _Launch, workers: int) -> _End:
    """Run one group to its end, and leave nothing of it behind."""
    import ray

    supervisor = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(_Supervisor).remote()
    try:
        end: _End = ray.get(supervisor.run.remote(launch, workers))
    except ray.exceptions.RayTaskError as error:
        return _End(error=ClusterError(f"the training group did not start: {one_line(error.cause)}"))
    except ray.exceptions.RayError as error:
        return _End(lost=_short(error))
    finally:
        ray.kill(supervisor)
        _free_reservations()
    return end


def _free_reservations() -> None:
    """Give back the CPUs and GPUs of this driver's groups.

    Ray Train forgets its placement group where a worker dies while the group starts, and Ray keeps one whose
    creator is dead; the next group would wait for those resources for ever. The last bytes of a placement group's
    id are its job's, so nobody else's is touched.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    for group_id, row in placement_group_table().items():
        if group_id.endswith(job) and row["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group_id)))


class _Supervisor:
    """The actor that launches a group. Ray Train's handlers, warnings and environment stay in its process."""

    def run(self, launch: _Launch, workers: int) -> _End:
        from ray.train import TrainingFailedError

        ray_name = f"{launch.name}-{uuid.uuid4().hex[:12]}"
        try:
            return _End(value=_trainer(launch, workers, ray_name).fit().return_value)
        except TrainingFailedError as failure:
            return _judge(failure)
        finally:
            shutil.rmtree(launch.storage_path / ray_name, ignore_errors=True)


def _judge(failure: Any) -> _End:
    """Tell the function's own error from lost workers, and both from a group that can never run."""
    from ray.exceptions import RayTaskError
    from ray.train import WorkerGroupError

    if isinstance(failure, WorkerGroupError):
        for error in failure.worker_failures.values():
            if isinstance(error, _FunctionFailedError):
                return _End(error=error.error)
        ranks = sorted(failure.worker_failures.items())
        return _End(lost=", ".join(f"rank {rank}: {type(error).__name__}" for rank, error in ranks))
    if isinstance(failure.controller_failure, RayTaskError):
        cause = failure.controller_failure.cause
        return _End(error=ClusterError(f"the training group did not start: {one_line(cause)}"))
    return _End(lost=_short(failure))


def _trainer(launch: _Launch, workers: int, ray_name: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.rendezvous import FileConfig

    kind = FileConfig if launch.local else TorchConfig
    return TorchTrainer(
        _worker,
        train_loop_config={"launch": launch},
        torch_config=kind(backend="nccl" if launch.use_gpu else "gloo", timeout_s=launch.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=launch.use_gpu, resources_per_worker=launch.resources
        ),
        run_config=RunConfig(
            name=ray_name,
            storage_path=str(launch.storage_path),
            # No restarts by Ray: it repeats the function's own errors, and gives up where a worker dies early.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )


def _worker(config: dict[str, _Launch]) -> Any:
    """Run in every worker: mark the function's own errors, let lost peers pass as they are."""
    from ray import cloudpickle

    launch = config["launch"]
    try:
        value = launch.function(RayContext(), launch.arguments)
        cloudpickle.dumps(value)  # here it is the function's error; later Ray would take it for a dead worker
    except WorkerLostError:
        raise
    except Exception as error:
        raise _FunctionFailedError(portable(error)) from error
    return value


def _short(error: Exception) -> str:
    return textwrap.shorten(one_line(error), 300, placeholder=" ...")
