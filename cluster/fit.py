"""One training function on N workers, in this process or as a Ray Train group.

Notable: Ray never sees a checkpoint. The function writes and finds its own, in a directory that all workers share,
so a run can be resumed with another number of workers, or without Ray.

An error of the function and the death of a worker are told apart: the first ends the run at once and is raised
here as it was raised there, the second starts a new group, a finite number of times.

Each group is launched from a supervisor, an actor that owns everything Ray Train starts. Ending the supervisor
therefore ends the whole group in any state: after Ctrl-C, and after failures in which Ray Train keeps its CPUs.
"""

from __future__ import annotations

import shutil
import textwrap
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


def fit(
    function: TrainingFunction,
    arguments: Mapping[str, Any],
    *,
    address: str = "none",
    workers: int = 1,
    use_gpu: bool = False,
    device: str = "auto",
    name: str = "fit",
    storage_path: str | Path,
    max_failures: int = 3,
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
        Number of workers, each of one CPU; 1 without Ray.
    use_gpu
        With Ray: one GPU per worker and NCCL instead of gloo.
    device
        Without Ray: ``"cpu"``, ``"cuda:0"``, or ``"auto"`` for the GPU if there is one. With Ray ``use_gpu`` decides.
    name
        Name of the run in Ray's own records.
    storage_path
        Directory on a path shared by all nodes. Ray keeps its book-keeping there while the run lasts.
    max_failures
        New groups after lost workers, >= 0.
    timeout_s
        Seconds that a collective waits for its peers before they count as lost.

    Returns
    -------
    Any
        Rank 0's return value, which must be picklable.

    Raises
    ------
    WorkerLostError
        Workers were lost more than ``max_failures`` times.
    ClusterError
        No session, not enough resources, a failure inside Ray, or an error of the function that does not pickle.
    Exception
        Any other error of the function, with its own type.
    """
    if address == "none":
        if workers != 1:
            raise ValueError(f"the address 'none' runs 1 worker, not {workers}")
        return function(LocalContext(_choose_device(device)), arguments)
    require_ray()
    launch = _Launch(function, arguments, workers, use_gpu, name, Path(storage_path).resolve(), timeout_s)
    with session(address):
        _check_resources(address, launch)
        for _ in range(max_failures + 1):
            end = _attempt(launch)
            if end.error is not None:
                raise end.error
            if end.lost is None:
                return end.value
        raise WorkerLostError(f"workers were lost {max_failures + 1} times; the last time: {end.lost}")


def _choose_device(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class _Launch:
    function: TrainingFunction
    arguments: Mapping[str, Any]
    workers: int
    use_gpu: bool
    name: str
    storage_path: Path
    timeout_s: int


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
    for kind, wanted in (("CPU", launch.workers), ("GPU", launch.workers if launch.use_gpu else 0)):
        if address == "local" and have.get(kind, 0) < wanted:
            raise ClusterError(
                f"{launch.workers} workers need {wanted} {kind}s, but this machine's Ray session has "
                f"{have.get(kind, 0):g}: ask for fewer workers"
            )


def _attempt(launch: _Launch) -> _End:
    """Run one group to its end, and leave nothing of it behind."""
    import ray

    supervisor = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(_Supervisor).remote()
    try:
        end: _End = ray.get(supervisor.run.remote(launch))
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

    def run(self, launch: _Launch) -> _End:
        from ray.train import TrainingFailedError

        ray_name = f"{launch.name}-{uuid.uuid4().hex[:12]}"
        try:
            return _End(value=_trainer(launch, ray_name).fit().return_value)
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


def _trainer(launch: _Launch, ray_name: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": 1, "GPU": 1} if launch.use_gpu else {"CPU": 1}
    return TorchTrainer(
        _worker,
        train_loop_config={"launch": launch},
        torch_config=TorchConfig(backend="nccl" if launch.use_gpu else "gloo", timeout_s=launch.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=launch.workers, use_gpu=launch.use_gpu, resources_per_worker=resources
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
