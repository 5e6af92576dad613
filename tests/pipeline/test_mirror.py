"""The copy of a run in an object store: a run goes on from it without its folder, and never from that of another."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load, load_file

from cluster import fit
from pipeline.config import parse_config, plain
from pipeline.data.manifest import plain_entries, read_manifest
from pipeline.errors import UsageError
from pipeline.runs import METRICS, MODEL, RUN, STATE, read_metrics
from pipeline.training.course import PAPERS_COURSE
from pipeline.training.mirror import Mirror
from pipeline.training.train import train
from pipeline.training.trainer import Trainer, train_worker
from storage import StorageError


class Stop(Exception):
    """Stands in for the kill of the process."""


@pytest.fixture
def url(s3):
    return f"{s3.url}/runs/first"


@pytest.fixture
def entries(pyramids):
    return read_manifest(pyramids)


@pytest.fixture(scope="module")
def whole(config, pyramids, tmp_path_factory):
    """Weights of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(read_manifest(pyramids), config, folder)
    return (folder / MODEL / "model.safetensors").read_bytes()


def stop_after(saves, monkeypatch):
    """End training after so many checkpoints, each of which was put."""
    save, left = Trainer._save, iter(range(saves))

    def counted(self, position):
        save(self, position)
        if next(left, saves) == saves - 1:
            raise Stop

    monkeypatch.setattr(Trainer, "_save", counted)


def test_the_copy_is_the_folder(config, entries, url, s3, tmp_path, whole):
    train(entries, config, tmp_path / "run", mirror=url)
    copied = s3.objects("runs/first")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert copied == {path.relative_to(tmp_path / "run").as_posix(): path.read_bytes() for path in files}
    assert copied[f"{MODEL}/model.safetensors"] == whole
    assert any(name.startswith("tensorboard/") for name in copied)


@pytest.mark.parametrize("saves", [1, 2])
def test_a_run_goes_on_without_its_folder(config, entries, url, tmp_path, whole, monkeypatch, saves):
    every_step = parse_config({**plain(config), "train": {**plain(config)["train"], "checkpoint_minutes": 1e-9}}, "")
    with monkeypatch.context() as patch:
        stop_after(saves, patch)
        with pytest.raises(Stop):
            train(entries, every_step, tmp_path / "lost", mirror=url)
    shutil.rmtree(tmp_path / "lost")
    train(entries, config, tmp_path / "elsewhere", mirror=url)
    assert (tmp_path / "elsewhere" / MODEL / "model.safetensors").read_bytes() == whole
    epochs = [line["epoch"] for line in read_metrics(tmp_path / "elsewhere")]
    assert epochs == list(range(1, config.train.epochs + 1))


def test_a_finished_run_comes_back_without_training(config, entries, url, s3, tmp_path, whole, monkeypatch):
    train(entries, config, tmp_path / "run", mirror=url)
    before = s3.objects("runs/first")
    monkeypatch.setattr(Trainer, "_step", None)
    train(entries, config, tmp_path / "again", mirror=url)
    assert (tmp_path / "again" / MODEL / "model.safetensors").read_bytes() == whole
    after = s3.objects("runs/first")
    assert {name: after[name] for name in before} == before  # tensorboard has a file of its own for each start


def test_a_mirror_may_be_given_later(config, entries, url, s3, tmp_path, whole):
    train(entries, config, tmp_path / "run")
    train(entries, config, tmp_path / "run", mirror=url)
    assert s3.objects("runs/first")[STATE] == (tmp_path / "run" / STATE).read_bytes()
    assert s3.objects("runs/first")[f"{MODEL}/model.safetensors"] == whole


def test_the_copy_of_another_run_is_refused_and_overwritten_when_asked(config, entries, url, s3, tmp_path):
    train(entries, config, tmp_path / "run", mirror=url)
    other = parse_config({**plain(config), "seed": 1}, "")
    before = s3.objects("runs/first")
    with pytest.raises(UsageError, match="holds a run of another configuration.*--overwrite"):
        train(entries, other, tmp_path / "other", mirror=url)
    assert s3.objects("runs/first") == before
    assert not (tmp_path / "other" / RUN).exists()  # so that the right configuration may still use it
    s3.put("runs/first/notes.txt", b"mine")
    train(entries, other, tmp_path / "other", mirror=url, overwrite=True)
    after = s3.objects("runs/first")
    assert after.pop("notes.txt") == b"mine"
    assert json.loads(after[RUN])["config"]["seed"] == 1
    assert after[STATE] == (tmp_path / "other" / STATE).read_bytes()
    assert not (before.keys() - after.keys()) - {name for name in before if name.startswith("tensorboard/")}


def test_the_copy_of_an_extended_run_keeps_its_last_model_until_the_next_takes_its_place(
    config, entries, url, s3, tmp_path, monkeypatch
):
    train(entries, config, tmp_path / "run", mirror=url)
    before = s3.objects("runs/first")
    values = plain(config)
    longer = parse_config({**values, "train": {**values["train"], "epochs": config.train.epochs + 1}}, "")
    stop_after(1, monkeypatch)
    with pytest.raises(Stop):
        train(entries, longer, tmp_path / "run", mirror=url)
    name = f"{MODEL}/model.safetensors"
    assert s3.objects("runs/first")[name] == before[name]
    train(entries, longer, tmp_path / "run", mirror=url)
    assert s3.objects("runs/first")[name] != before[name]


def test_of_two_trainings_one_finds_out_before_it_has_changed_anything(
    config, entries, url, s3, tmp_path, monkeypatch
):
    """The second starts from the same state, on another machine, and puts its own first."""
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Stop):
            train(entries, config, tmp_path / "one", mirror=url)
    step, seen = Trainer._step, []

    def second(self, *args):
        if not seen:
            seen.append(True)
            train(entries, config, tmp_path / "two", mirror=url)
            seen.append(s3.objects("runs/first"))
        return step(self, *args)

    monkeypatch.setattr(Trainer, "_step", second)
    with pytest.raises(UsageError, match="another training with this --mirror is running"):
        train(entries, config, tmp_path / "one", mirror=url)
    assert s3.objects("runs/first") == seen[1]


def test_a_run_that_is_overwritten_elsewhere_does_not_go_on_with_the_other(config, entries, url, s3, tmp_path):
    train(entries, config, tmp_path / "one", mirror=url)
    mine = json.loads(s3.objects("runs/first")[RUN])["fingerprint"]
    other = parse_config({**plain(config), "seed": 1}, "")
    train(entries, other, tmp_path / "two", mirror=url, overwrite=True)
    mirror = Mirror(url, tmp_path / "one")
    with pytest.raises(UsageError, match="another training with this --mirror is running"):
        mirror.fetch(mine)
    with pytest.raises(UsageError, match="holds another run"):
        Mirror(url, tmp_path / "one").fetch(json.loads(s3.objects("runs/first")[RUN])["fingerprint"])


def test_who_has_got_further_wins(config, entries, url, s3, tmp_path, monkeypatch):
    """A run was extended without its mirror: what it learnt since is not lost."""
    values = plain(config)
    course = {**values["train"], **PAPERS_COURSE}  # the same whatever the number of epochs
    config, shorter = (parse_config({**values, "train": {**course, "epochs": n}}, "") for n in (3, 1))
    train(entries, config, tmp_path / "whole")
    whole = (tmp_path / "whole" / MODEL / "model.safetensors").read_bytes()
    train(entries, shorter, tmp_path / "run", mirror=url)
    train(entries, config, tmp_path / "run")
    monkeypatch.setattr(Trainer, "_step", None)
    train(entries, config, tmp_path / "run", mirror=url)
    assert (tmp_path / "run" / MODEL / "model.safetensors").read_bytes() == whole
    assert s3.objects("runs/first")[f"{MODEL}/model.safetensors"] == whole
    assert json.loads(s3.objects("runs/first")[RUN])["config"]["train"]["epochs"] == config.train.epochs


@pytest.mark.parametrize("damage", [b"", b"no state", (2).to_bytes(8, "little") + b"[]"])
def test_a_damaged_copy_is_mended_from_the_folder(config, entries, url, s3, tmp_path, damage):
    train(entries, config, tmp_path / "run", mirror=url)
    s3.put(f"runs/first/{STATE}", damage)
    train(entries, config, tmp_path / "run", mirror=url)
    assert s3.objects("runs/first")[STATE] == (tmp_path / "run" / STATE).read_bytes()
    s3.put(f"runs/first/{STATE}", damage)
    with pytest.raises(UsageError, match="not a state of this run"):
        train(entries, config, tmp_path / "elsewhere", mirror=url)


def test_a_worker_elsewhere_begins_with_what_the_copy_holds(config, entries, url, s3, tmp_path, whole):
    """Its folder may hold a state of the same run that the copy never had."""
    train(entries, config, tmp_path / "run")
    left = tmp_path / "left"
    shutil.copytree(tmp_path / "run", left)
    mirror = Mirror(url, tmp_path / "run")
    fingerprint = json.loads((left / RUN).read_bytes())["fingerprint"]
    (tmp_path / "run" / STATE).unlink()
    mirror.check(fingerprint, overwrite=False)
    mirror.claim(overwrite=False)
    Mirror(url, left).fetch(fingerprint)
    assert not (left / STATE).exists()
    new = tmp_path / "new"
    new.mkdir()
    Mirror(url, new).fetch(fingerprint)
    assert [path.name for path in new.iterdir()] == [RUN]


def test_a_state_that_is_there_already_is_not_written_again(config, entries, url, tmp_path):
    """Or every new group of workers would count as having got on."""
    train(entries, config, tmp_path / "run", mirror=url)
    before = (tmp_path / "run" / STATE).stat().st_mtime_ns
    mirror = Mirror(url, tmp_path / "run")
    version = mirror.version()
    mirror.fetch(json.loads((tmp_path / "run" / RUN).read_bytes())["fingerprint"])
    assert (tmp_path / "run" / STATE).stat().st_mtime_ns == before
    assert mirror.version() == version is not None


def test_a_place_of_something_else_is_left_alone(config, entries, url, s3, tmp_path):
    s3.put("runs/first/model/mine.bin", b"mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not empty and not a training run"):
            train(entries, config, tmp_path / "run", mirror=url, overwrite=overwrite)
    assert s3.objects("runs/first") == {"model/mine.bin": b"mine"}


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_that_share_no_disk(config, pyramids, url, s3, tmp_path, ray_head):
    """Each has a folder of its own, and a new one when the group starts again; rank 0 is the other's machine then."""
    values = plain(config)
    values["train"] |= PAPERS_COURSE  # the same whatever the number of epochs
    config, shorter = (parse_config({**values, "train": {**values["train"], "epochs": n}}, "") for n in (3, 1))
    train(read_manifest(pyramids), shorter, tmp_path / "driver", mirror=url)
    run = json.loads((tmp_path / "driver" / RUN).read_bytes())
    training = [entry for entry in read_manifest(pyramids) if entry.split != "test"]
    job = {
        "config": values,
        "entries": plain_entries(training),
        "target": run["target"],
        "channels": run["channels"],
        "fingerprint": run["fingerprint"],
        "mirror": url,
        "environment": {name: value for name, value in os.environ.items() if name.startswith("AWS_")},
        "folder": str(tmp_path / "worker"),
    }
    fit(apart, job, address="local", workers=2, device="cpu")
    copied = s3.objects("runs/first")
    assert [json.loads(line)["epoch"] for line in copied[METRICS].splitlines()] == [1, 2, 3]
    assert copied[f"{MODEL}/model.safetensors"] == (tmp_path / "worker-0" / MODEL / "model.safetensors").read_bytes()
    train(read_manifest(pyramids), config, tmp_path / "straight")
    there = load(copied[f"{MODEL}/model.safetensors"])
    for name, value in load_file(tmp_path / "straight" / MODEL / "model.safetensors").items():
        assert torch.allclose(there[name], value, atol=2e-3), name


def apart(context, arguments):
    """Train in a folder that no other worker has."""
    os.environ.update(arguments["environment"])
    return train_worker(context, {**arguments, "folder": f"{arguments['folder']}-{context.rank}"})


@pytest.mark.parametrize("path", [RUN, METRICS, STATE, "model.safetensors"])
def test_a_store_that_stays_away_ends_training_and_it_goes_on_later(config, entries, url, s3, tmp_path, whole, path):
    s3.fail("503", path=path, times=99)
    with pytest.raises((StorageError, UsageError), match=path):
        train(entries, config, tmp_path / "run", mirror=url)
    s3.heal()
    train(entries, config, tmp_path / "run", mirror=url)
    assert s3.objects("runs/first")[f"{MODEL}/model.safetensors"] == whole


@pytest.mark.parametrize("kind", ["503", "close", "lost"])
def test_passing_faults_are_absorbed(config, entries, url, s3, tmp_path, whole, kind):
    s3.fail(kind, path=STATE)
    train(entries, config, tmp_path / "run", mirror=url)
    assert s3.proxy.faults[0].times == 0
    assert s3.objects("runs/first")[f"{MODEL}/model.safetensors"] == whole


@pytest.mark.parametrize("bad", ["/shared/run", "s3:/bucket/run", "s3://", "https://host/run", "runs/first"])
def test_what_is_no_object_store_is_refused(config, entries, tmp_path, bad):
    with pytest.raises(UsageError, match="not the URL of an object store"):
        train(entries, config, tmp_path / "run", mirror=bad)
    assert not (tmp_path / "run").exists()


def test_a_bucket_that_is_not_there_is_named(config, entries, s3, tmp_path):
    with pytest.raises(
        UsageError, match=r"--mirror s3://nobody/run.* check its name, the credentials and the network"
    ):
        train(entries, config, tmp_path / "run", mirror="s3://nobody/run")
