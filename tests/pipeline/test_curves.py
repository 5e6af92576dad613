"""The curves for TensorBoard: there while training goes on, and each epoch once after an interruption."""

from __future__ import annotations

import json
import shutil
import sys
import time

import pytest

from cluster import LocalContext
from nested_ats import Classes
from pipeline.config import plain
from pipeline.data.manifest import plain_entries, read_manifest
from pipeline.errors import UsageError
from pipeline.runs import CURVES
from pipeline.training.trainer import train_worker

CLASSES = Classes(("bar", "box")).plain


class Stop(Exception):
    pass


def epochs_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / CURVES))
    events.Reload()
    return [event.step for event in events.Scalars("cross_entropy")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own
def test_curves_are_there_while_training_goes_on(config, pyramids, tmp_path):
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "train"]
    job = {
        "config": plain(config),
        "entries": plain_entries(entries),
        "target": CLASSES,
        "channels": 3,
    }
    seen: list[int] = []

    def look(done, total, words):
        if done == 7:  # of three steps in each of three epochs
            deadline = time.monotonic() + 20  # a thread writes them
            while epochs_of(tmp_path) != [1, 2] and time.monotonic() < deadline:
                time.sleep(0.1)
            seen.extend(epochs_of(tmp_path))
            raise Stop

    with pytest.raises(Stop):
        train_worker(LocalContext(), {**job, "folder": str(tmp_path)}, look)
    assert seen == [1, 2]
    train_worker(LocalContext(), {**job, "folder": str(tmp_path)})
    assert epochs_of(tmp_path) == [1, 2, 3]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own
@pytest.mark.parametrize("epochs", [3, 4])
def test_curves_of_a_run_that_goes_on_without_them(config, pyramids, tmp_path, epochs):
    """The run goes on from a copy, as on another machine, whether it has finished there or not."""
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "train"]
    job = {
        "entries": plain_entries(entries),
        "target": CLASSES,
        "channels": 3,
        "folder": str(tmp_path),
    }
    train_worker(LocalContext(), {**job, "config": plain(config)})
    shutil.rmtree(tmp_path / CURVES)
    longer = plain(config)
    longer["train"]["epochs"] = epochs
    train_worker(LocalContext(), {**job, "config": longer})
    assert epochs_of(tmp_path) == [*range(1, epochs + 1)]


TRACKER = """
import json
def keep(metrics):
    with open({place!r}, "a") as file:
        file.write(json.dumps(metrics) + "\\n")
def fails(metrics):
    keep(metrics)
    raise RuntimeError("the server is gone")
NUMBER = 3
"""


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    """A module of the user's, and the file that it writes to."""
    place = tmp_path / "tracked.jsonl"
    (tmp_path / "my_tracker.py").write_text(TRACKER.format(place=str(place)))
    monkeypatch.syspath_prepend(tmp_path)
    yield place
    sys.modules.pop("my_tracker", None)


def job(config, pyramids, folder, tracker):
    folder.mkdir()
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "train"]
    settings = {**plain(config), "train": {**plain(config)["train"], "tracker": tracker}}
    return {
        "config": settings,
        "entries": plain_entries(entries),
        "target": CLASSES,
        "channels": 3,
        "folder": str(folder),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own
def test_a_tracker_gets_every_epoch(config, pyramids, tmp_path, tracker):
    metrics, _ = train_worker(LocalContext(), job(config, pyramids, tmp_path / "run", "my_tracker:keep"))
    lines = [json.loads(line) for line in tracker.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1] == metrics


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_tracker_that_fails_does_not_end_a_training(config, pyramids, tmp_path, tracker, capsys):
    metrics, _ = train_worker(LocalContext(), job(config, pyramids, tmp_path / "run", "my_tracker:fails"))
    assert metrics["epoch"] == 3
    assert len(tracker.read_text().splitlines()) == 1
    assert (
        "warning: train.tracker: RuntimeError('the server is gone'); it is not called again"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:keep", "cannot be imported"),
        ("my_tracker:nothing", "cannot be"),
        ("my_tracker:NUMBER", "is no fun"),
    ],
)
def test_what_is_no_tracker(config, pyramids, tmp_path, tracker, name, reason):
    with pytest.raises(UsageError, match=f"train.tracker: {name} {reason}"):
        train_worker(LocalContext(), job(config, pyramids, tmp_path / "run", name))
