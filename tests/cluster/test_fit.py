import os
import signal
import threading
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
import torch

from cluster import ClusterError, WorkerLostError, fit

FIT = import_module("cluster.fit")  # the module, which the function hides


class SlideError(Exception):
    pass


@pytest.fixture(autouse=True)
def _resources_are_free_again(request, wait_until):
    yield
    if "head" in request.fixturenames:
        import ray

        wait_until(lambda: ray.available_resources().get("CPU") == 2)


def started(context, arguments):
    """Leave a marker for this start of this rank, and say how many there are of the rank."""
    folder = Path(arguments["folder"])
    (folder / f"{context.rank}-{time.time_ns()}").touch()
    return len(list(folder.glob(f"{context.rank}-*")))


def sum_ranks(context, arguments):
    tensor = torch.tensor([context.rank + 1.0, 10.0])
    context.all_reduce(tensor)
    context.report({"loss": 1.0})
    return {"rank": context.rank, "size": context.world_size, "sum": tensor.tolist()}


def fail_on_rank_1(context, arguments):
    started(context, arguments)
    if context.rank == 1:
        raise SlideError("slide 7: no tissue")
    context.all_reduce(torch.zeros(1))  # rank 0 waits for a peer that never comes


def die_until(context, arguments):
    """Rank 1 kills itself while it has been started `deaths` times or fewer."""
    times = started(context, arguments)
    context.all_reduce(torch.zeros(1))  # all have started
    if context.rank == 1 and times <= arguments["deaths"]:
        os.kill(os.getpid(), signal.SIGKILL)
    context.all_reduce(torch.zeros(1))
    return times


def die_at_once(context, arguments):
    if started(context, arguments) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def sleep_long(context, arguments):
    (Path(arguments["folder"]) / f"pid-{os.getpid()}").touch()
    time.sleep(600)


def test_single_process_returns_the_value():
    value = fit(sum_ranks, {}, device="cpu")
    assert value == {"rank": 0, "size": 1, "sum": [1.0, 10.0]}


def test_single_process_raises_what_the_function_raises():
    def fail(context, arguments):
        raise SlideError(arguments["message"])

    with pytest.raises(SlideError, match="no tissue"):
        fit(fail, {"message": "no tissue"})


def test_single_process_refuses_several_workers():
    with pytest.raises(ValueError, match="1 worker, not 2"):
        fit(sum_ranks, {}, workers=2)


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_sum_and_rank_0_answers(head):
    value = fit(sum_ranks, {}, address="local", workers=2)
    assert value == {"rank": 0, "size": 2, "sum": [3.0, 20.0]}


@pytest.mark.ray
@pytest.mark.slow
def test_error_of_the_function_comes_back_and_is_not_repeated(head, tmp_path):
    with pytest.raises(SlideError, match=r"^slide 7: no tissue$"):
        fit(fail_on_rank_1, {"folder": str(tmp_path)}, address="local", workers=2)
    assert len(list(tmp_path.glob("1-*"))) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_value_that_does_not_pickle_is_named(head):
    with pytest.raises(ClusterError, match=r"does not pickle.*cannot pickle"):
        fit(lambda context, arguments: threading.Lock(), {}, address="local")


@pytest.mark.ray
@pytest.mark.slow
def test_killed_worker_is_replaced(head, tmp_path):
    arguments = {"folder": str(tmp_path), "deaths": 1}
    assert fit(die_until, arguments, address="local", workers=2) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_workers_killed_while_the_group_starts_are_replaced(head, tmp_path):
    arguments = {"folder": str(tmp_path)}
    value = fit(die_at_once, arguments, address="local", workers=2)
    assert value == "done"


@pytest.mark.ray
@pytest.mark.slow
def test_worker_that_always_dies_ends_the_run(head, tmp_path):
    arguments = {"folder": str(tmp_path), "deaths": 99}
    with pytest.raises(WorkerLostError, match="lost 2 times"):
        fit(die_until, arguments, address="local", workers=2, max_failures=1)
    assert len(list(tmp_path.glob("1-*"))) == 2


def test_losses_are_counted_from_the_last_checkpoint_on(monkeypatch, tmp_path):
    """The first and the third of seven groups leave a checkpoint; the third loss after that is one too many."""
    state, groups = tmp_path / "state", [True, False, True, False, False, True, True]

    def progress():
        return state.stat().st_mtime_ns if state.exists() else None

    def attempt(launch):
        if groups.pop(0):
            state.touch()
            os.utime(state, ns=(0, len(groups)))
        return FIT._End(lost="rank 0: gone")

    monkeypatch.setattr(FIT, "session", nullcontext)
    for name in ("_use_gpu", "_check_resources"):
        monkeypatch.setattr(FIT, name, lambda *_: None)
    monkeypatch.setattr(FIT, "_attempt", attempt)
    with pytest.raises(WorkerLostError, match="lost 3 times in a row"):
        fit(sum_ranks, {}, address="local", max_failures=2, progress=progress)
    assert len(groups) == 2


@pytest.fixture
def listening():
    """A shell that begins the tests in the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_ends_the_workers(head, listening, tmp_path, wait_until, gone):
    def interrupt():
        wait_until(lambda: list(tmp_path.glob("pid-*")))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(sleep_long, {"folder": str(tmp_path)}, address="local")
    thread.join()
    (marker,) = tmp_path.glob("pid-*")
    wait_until(lambda: gone(int(marker.name.removeprefix("pid-"))))
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.ray
def test_more_workers_than_cpus_are_refused(head):
    with pytest.raises(ClusterError, match="3 workers need 3 CPUs"):
        fit(sum_ranks, {}, address="local", workers=3)


@pytest.fixture
def occupied(head):
    """One of the two CPUs belongs to somebody else."""
    import ray

    @ray.remote(num_cpus=1)
    class Neighbour:
        def here(self):
            return True

    neighbour = Neighbour.remote()  # type: ignore[attr-defined]
    assert ray.get(neighbour.here.remote())
    yield
    ray.kill(neighbour)


@pytest.mark.ray
@pytest.mark.slow
def test_a_range_of_workers_takes_the_room_there_is(occupied, monkeypatch):
    monkeypatch.setattr(FIT, "SETTLE_S", 1.0)
    value = fit(sum_ranks, {}, address="local", workers=(1, 2))
    assert value == {"rank": 0, "size": 1, "sum": [1.0, 10.0]}


@pytest.mark.ray
def test_workers_without_room_end_in_an_error(occupied, monkeypatch):
    monkeypatch.setattr(FIT, "PLACE_TIMEOUT_S", 10.0)  # in which one of them starts
    with pytest.raises(ClusterError, match=r"room for 1 of 2 workers.*2 CPUs and 0 GPUs.*needs 1 CPU;"):
        fit(sum_ranks, {}, address="local", workers=2)


@pytest.mark.ray
def test_gpus_that_the_session_lacks_are_refused(head):
    with pytest.raises(ClusterError, match="1 workers need 1 GPUs"):
        fit(sum_ranks, {}, address="local", device="cuda")


@pytest.mark.parametrize(
    ("device", "gpus", "least", "use"),
    [
        ("auto", 0, 1, False),
        ("auto", 2, 2, True),
        ("auto", 1, 2, False),
        ("cpu", 8, 1, False),
        ("cuda", 0, 1, True),  # an autoscaler may bring them
    ],
)
def test_gpus_are_used_by_what_the_cluster_has(monkeypatch, device, gpus, least, use):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0} | ({"GPU": float(gpus)} if gpus else {}))
    assert FIT._use_gpu(device, least) is use


@pytest.mark.parametrize("workers", [0, (2, 1), (0, 3)])
def test_impossible_numbers_of_workers_are_refused(workers):
    with pytest.raises(ValueError, match="positive number or a range"):
        fit(sum_ranks, {}, address="local", workers=workers)
