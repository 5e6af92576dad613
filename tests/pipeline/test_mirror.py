"""The copy of a run in an object store: a run goes on from it without its folder, and never from that of another."""

from __future__ import annotations

import json
import shutil

import pytest

from pipeline.config import parse_config, plain
from pipeline.errors import UsageError
from pipeline.manifest import read_manifest
from pipeline.mirror import Mirror
from pipeline.runs import METRICS, MODEL, RUN, STATE, read_metrics
from pipeline.train import train
from pipeline.training import Trainer
from storage import StorageError


class Stop(Exception):
    """As if the process were killed."""


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
    s3.put("runs/first/notes.txt", b"mine")
    train(entries, other, tmp_path / "other", mirror=url, overwrite=True)
    after = s3.objects("runs/first")
    assert after.pop("notes.txt") == b"mine"
    assert json.loads(after[RUN])["config"]["seed"] == 1
    assert after[STATE] == (tmp_path / "other" / STATE).read_bytes()
    assert not (before.keys() - after.keys()) - {name for name in before if name.startswith("tensorboard/")}


def test_an_extended_run_has_no_model_until_it_has_ended(config, entries, url, s3, tmp_path, monkeypatch):
    train(entries, config, tmp_path / "run", mirror=url)
    values = plain(config)
    longer = parse_config({**values, "train": {**values["train"], "epochs": config.train.epochs + 1}}, "")
    stop_after(1, monkeypatch)
    with pytest.raises(Stop):
        train(entries, longer, tmp_path / "run", mirror=url)
    assert not [name for name in s3.objects("runs/first") if name.startswith(MODEL)]


def test_of_two_trainings_one_finds_out(config, entries, url, s3, tmp_path, monkeypatch):
    """The second starts from the same state, on another machine, and puts its own first."""
    stop_after(1, monkeypatch)
    with pytest.raises(Stop):
        train(entries, config, tmp_path / "run", mirror=url)
    mirrors = []
    for name in ("one", "two"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        mirrors.append(Mirror(url, tmp_path / name))
        mirrors[-1].fetch()
        (tmp_path / name / STATE).write_bytes(name.encode())
    mirrors[1].put()
    with pytest.raises(UsageError, match="another training with this --mirror is running"):
        mirrors[0].put()
    assert s3.objects("runs/first")[STATE] == b"two"
    (tmp_path / "two" / STATE).write_bytes(b"two again")
    mirrors[1].put()
    assert s3.objects("runs/first")[STATE] == b"two again"


@pytest.mark.parametrize("path", [RUN, METRICS, STATE, "model.safetensors"])
def test_a_store_that_stays_away_ends_training_and_it_goes_on_later(config, entries, url, s3, tmp_path, whole, path):
    s3.fail("503", path=path, times=99)
    with pytest.raises(StorageError, match=path):
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
    with pytest.raises(StorageError, match="s3://nobody/run"):
        train(entries, config, tmp_path / "run", mirror="s3://nobody/run")
