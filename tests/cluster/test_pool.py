import os
import signal
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest

from cluster import ClusterError, Outcome, WorkerLostError, run_tasks

POOL = import_module("cluster.pool")


class ModelError(Exception):
    pass


def make_divider():
    return lambda item: 10 // item


def make_local_failure():
    def work(item):
        if item == "stop":
            raise KeyboardInterrupt
        return item

    return work


def test_local_failure_of_an_item_leaves_the_others():
    outcomes = list(run_tasks(make_divider, [1, 0, 5]))
    error = "ZeroDivisionError: integer division or modulo by zero"
    assert outcomes == [Outcome(1, 10, None, 1), Outcome(0, None, error, 1), Outcome(5, 2, None, 1)]


def test_local_interrupt_stops():
    outcomes = run_tasks(make_local_failure, ["a", "stop", "b"])
    assert next(outcomes).result == "a"
    with pytest.raises(KeyboardInterrupt):
        next(outcomes)


def test_local_worker_is_made_once_and_only_for_items():
    made = []

    def make():
        made.append(1)
        return str

    assert list(run_tasks(make, [])) == []
    assert made == []
    assert len(list(run_tasks(make, [1, 2, 3]))) == 3
    assert made == [1]


def test_local_close_leaves_the_rest_undone():
    done = []
    outcomes = run_tasks(lambda: done.append, [1, 2, 3])
    next(outcomes)
    outcomes.close()
    assert done == [1]


def test_local_factory_error_is_raised():
    def make():
        raise ModelError("weights.safetensors: missing")

    with pytest.raises(ModelError, match="missing"):
        list(run_tasks(make, [1]))


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"workers": 2}, {"attempts": 0}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="worker"):
        run_tasks(make_divider, [1], **wrong)


def make_scripted():
    """Return a function that does what the item says: (action, folder)."""

    def work(item):
        action, folder = item
        if action == "raise":
            raise ModelError("slide 3:\n no tissue")
        if action == "unpicklable":
            return threading.Lock()
        if action == "sleep":
            time.sleep(600)
        if action == "die" or (action == "die once" and not (Path(folder) / "died").exists()):
            (Path(folder) / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    return work


def run_actions(actions, folder, **options):
    """Outcomes by action, after a check that every item has exactly one."""
    items = [(action, str(folder)) for action in actions]
    options = {"address": "local", "workers": 2, "key": lambda item: item[0]} | options
    outcomes = list(run_tasks(make_scripted, items, **options))
    assert sorted(outcome.item for outcome in outcomes) == sorted(items)
    return {outcome.item[0]: outcome for outcome in outcomes}


@pytest.mark.ray
def test_items_that_raise_fail_at_once_and_alone(head, tmp_path):
    outcomes = run_actions(["a", "raise", "unpicklable", "b", "c"], tmp_path)
    assert (outcomes["raise"].error, outcomes["raise"].attempts) == ("ModelError: slide 3: no tissue", 1)
    assert "pickle" in outcomes["unpicklable"].error
    assert outcomes["unpicklable"].attempts == 1
    assert all(outcomes[name].result and outcomes[name].error is None for name in "abc")


@pytest.mark.ray
def test_item_that_kills_its_workers_fails_after_its_attempts(head, tmp_path):
    outcomes = run_actions(["die", "a", "b", "c"], tmp_path, attempts=2)
    assert outcomes["die"].error == "die: its worker died (attempt 2)"
    assert (outcomes["die"].result, outcomes["die"].attempts) == (None, 2)
    assert all(outcomes[name].result and outcomes[name].attempts == 1 for name in "abc")


@pytest.mark.ray
def test_item_that_kills_one_worker_succeeds_in_the_next(head, tmp_path):
    outcomes = run_actions(["die once", "a"], tmp_path)
    assert outcomes["die once"].result
    assert outcomes["die once"].attempts == 2


@pytest.mark.ray
@pytest.mark.parametrize("action", ["die", "sleep", "unpicklable"])
def test_what_fails_in_a_batch_fails_alone(head, tmp_path, action):
    """The first item of a worker comes alone, and the others, which are quick, with as many as half of the rest."""
    names = [*[f"go {number}" for number in range(60)], action, *[f"go {number}" for number in range(60, 90)]]
    outcomes = run_actions(names, tmp_path, batch_s=1.0, timeout_s=2)
    lost = outcomes.pop(action)
    assert lost.error
    assert lost.attempts == (1 if action == "unpicklable" else 2)
    assert len(outcomes) == 90
    assert all(outcome.result and outcome.attempts == 1 for outcome in outcomes.values())


def test_a_batch_ends_when_its_time_is_over():
    done = []
    worker = POOL._Worker()
    worker.load(lambda: lambda item: (done.append(item), time.sleep(0.01)))
    answers, seconds = worker.run(range(1000), 0.05)
    assert 1 <= len(answers) == len(done) < 1000
    assert seconds >= 0.05


def test_what_a_batch_left_is_not_counted_as_begun():
    queue = POOL._Queue(list("abcde"), str)
    pool = POOL._Pool(None, queue, POOL._Limits(1, 2, 10.0, 1.0))
    slot = POOL._Slot(None, queue.take(4), 0.0)
    for task in slot.tasks:
        task.attempts += 1
    assert [outcome.item for outcome in pool._take(slot, ([(1, None), (2, None)], 0.5))] == ["a", "b"]
    assert slot.size == 4
    assert [(task.item, task.attempts) for _ in range(2) for task in queue.take(9)] == [("e", 0), ("c", 0), ("d", 0)]


def test_item_that_hangs_is_ended(head, tmp_path):
    outcomes = run_actions(["sleep", "a", "b"], tmp_path, timeout_s=1.0, attempts=2)
    assert outcomes["sleep"].error == "sleep: it took longer than 1 s (attempt 2)"
    assert outcomes["a"].result
    assert outcomes["b"].result


@pytest.mark.ray
def test_costliest_starts_first(head):
    outcomes = run_tasks(lambda: str, [1, 3, 2], address="local", cost=float)
    assert [outcome.item for outcome in outcomes] == [3, 2, 1]


@pytest.mark.ray
def test_closing_ends_the_workers(head, tmp_path, wait_until, gone):
    items = [("a", ""), ("sleep", ""), ("sleep", "")]
    outcomes = run_tasks(make_scripted, items, address="local")
    pid = next(outcomes).result
    assert not gone(pid)
    outcomes.close()
    wait_until(lambda: gone(pid))


def make_nothing():
    raise ModelError("weights.safetensors: missing")


def make_dead():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_factory_error_is_raised_with_its_type(head):
    with pytest.raises(ModelError, match=r"^weights.safetensors: missing$"):
        list(run_tasks(make_nothing, [1, 2], address="local", workers=2))


@pytest.mark.ray
def test_workers_that_die_while_starting_end_the_run(head):
    with pytest.raises(WorkerLostError, match="3 workers in a row"):
        list(run_tasks(make_dead, [1, 2], address="local"))


@pytest.mark.parametrize(
    ("device", "gpus", "workers", "share"),
    [("auto", 0, 2, 0.0), ("auto", 1, 2, 0.5), ("cuda", 2, 3, 0.5), ("auto", 4, 2, 1.0), ("cpu", 4, 2, 0.0)],
)
def test_workers_share_the_gpus_of_the_cluster(monkeypatch, device, gpus, workers, share):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0} | ({"GPU": float(gpus)} if gpus else {}))
    assert POOL._share_of_gpus(device, workers) == share


@pytest.mark.ray
def test_gpus_that_the_cluster_lacks_are_refused(head):
    with pytest.raises(ClusterError, match="has no GPUs"):
        list(run_tasks(make_divider, [1], address="local", device="cuda"))
