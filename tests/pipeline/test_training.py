"""Training: what was interrupted ends as what was not, and nothing is half-written or mixed up."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cluster import LocalContext
from nested_ats import Classes, ModelFileError
from pipeline.cli.app import app
from pipeline.config import parse_config, plain
from pipeline.data.manifest import Entry, plain_entries, read_manifest
from pipeline.data.slides import SlideImage
from pipeline.errors import DataError, UsageError
from pipeline.results.classifier import Classifier
from pipeline.results.predict import predict
from pipeline.results.settings import prediction_settings
from pipeline.runs import LOCK, METRICS, STATE, load_state, read_metrics
from pipeline.training.train import train
from pipeline.training.trainer import Trainer, make_trainer, train_worker
from storage.place.locks import locked

TARGET = Classes(("bar", "box"))


def arguments(config, manifest, folder):
    folder.mkdir(exist_ok=True)
    entries = [entry for entry in read_manifest(manifest) if entry.split == "train"]
    return {
        "config": plain(config),
        "entries": plain_entries(entries),
        "target": TARGET.plain,
        "channels": 3,
        "folder": str(folder),
    }


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def whole(config, pyramids, tmp_path_factory):
    """Folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train_worker(LocalContext(), arguments(config, pyramids, folder))
    return folder


class Stop(Exception):
    """Stands for whatever may end a process."""


def stop_at(step):
    def on_step(done, total, words):
        if done == step:
            raise Stop

    return on_step


def test_a_seed_makes_a_run_repeatable(config, pyramids, whole, tmp_path):
    train_worker(LocalContext(), arguments(config, pyramids, tmp_path / "run"))
    assert_same(weights(tmp_path / "run"), weights(whole))
    other = parse_config({**plain(config), "seed": 4}, "")
    train_worker(LocalContext(), arguments(other, pyramids, tmp_path / "other"))
    assert not torch.equal(weights(tmp_path / "other")["head.weight"], weights(whole)["head.weight"])


def test_a_batch_in_parts_trains_the_same_model(config, pyramids, whole, tmp_path):
    parted = parse_config({**plain(config), "train": {**plain(config)["train"], "parts": 3}}, "test")
    train_worker(LocalContext(), arguments(parted, pyramids, tmp_path / "run"))
    one, other = weights(whole), weights(tmp_path / "run")
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-5)


def test_parts_read_while_others_wait(config, pyramids, tmp_path, monkeypatch):
    """Reads of patches come in pairs here: a part that did not let the other go on would wait in vain."""
    parted = parse_config({**plain(config), "train": {"epochs": 1, "batch_size": 2, "parts": 2}}, "test")
    together = threading.Barrier(2)
    read, size = SlideImage.read, parted.model.patch_size

    def in_pairs(self, level, boxes):
        if boxes[0, 2] == size:
            together.wait(30)
        return read(self, level, boxes)

    monkeypatch.setattr(SlideImage, "read", in_pairs)
    train_worker(LocalContext(), arguments(parted, pyramids, tmp_path / "run"))


def test_an_error_in_one_part_ends_the_step(config, pyramids, tmp_path, monkeypatch):
    parted = parse_config({**plain(config), "train": {"epochs": 1, "batch_size": 4, "parts": 4}}, "test")
    labels, calls = Trainer._truth, itertools.count(1)

    def fails(self, batch):
        if next(calls) == 7:  # several threads compute: each has a number of its own
            raise ValueError("gone")
        return labels(self, batch)

    monkeypatch.setattr(Trainer, "_truth", fails)
    with pytest.raises(ValueError, match="gone"):
        train_worker(LocalContext(), arguments(parted, pyramids, tmp_path / "run"))


@pytest.mark.parametrize("minutes", [5.0, 1e-9])  # states at the ends of epochs only, or after every step
@pytest.mark.parametrize("step", [1, 4, 5, 9])
def test_an_interrupted_run_ends_as_one_that_was_not(config, pyramids, whole, tmp_path, step, minutes):
    config = parse_config({**plain(config), "train": {**plain(config)["train"], "checkpoint_minutes": minutes}}, "")
    job = arguments(config, pyramids, tmp_path / "run")
    with pytest.raises(Stop):
        train_worker(LocalContext(), job, stop_at(step))
    assert not (tmp_path / "run" / "model").exists()
    train_worker(LocalContext(), job)
    assert_same(weights(tmp_path / "run"), weights(whole))
    resumed, straight = read_metrics(tmp_path / "run"), read_metrics(whole)
    assert [line["epoch"] for line in resumed] == [1, 2, 3]
    for one, other in zip(resumed, straight, strict=True):
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=1e-6)


def test_features_are_standardised_once_by_the_first_patches(config, pyramids, tmp_path):
    raw = plain(config)
    config = parse_config({**raw, "model": {**raw["model"], "standardise": True}}, "")
    job = arguments(config, pyramids, tmp_path / "run")
    with pytest.raises(Stop):
        train_worker(LocalContext(), job, stop_at(4))
    train_worker(LocalContext(), job)
    train_worker(LocalContext(), arguments(config, pyramids, tmp_path / "straight"))
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "straight"))
    first = make_trainer(LocalContext(), arguments(config, pyramids, tmp_path / "first"))
    with ThreadPoolExecutor(4) as readers:
        first._look_first(readers)
    assert first.observer.take().tolist() == [0, 0]
    looked = first.model.state_dict()
    for name in ("_feature_mean", "_feature_std"):
        torch.testing.assert_close(weights(tmp_path / "straight")[name], looked[name])
    assert looked["_feature_std"].min() > 0
    assert not torch.equal(looked["_feature_std"], torch.ones_like(looked["_feature_std"]))


def test_a_metrics_line_without_its_state_is_written_again(config, pyramids, tmp_path):
    job = arguments(config, pyramids, tmp_path / "run")
    with pytest.raises(Stop):
        train_worker(LocalContext(), job, stop_at(5))
    with (tmp_path / "run" / METRICS).open("a") as file:
        file.write('{"epoch": 2, "cross_entropy": 9}\n{"epo')
    train_worker(LocalContext(), job)
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert all(line["cross_entropy"] < 9 for line in read_metrics(tmp_path / "run"))


def test_more_epochs_go_on_and_other_settings_are_refused(config, pyramids, tmp_path):
    entries, folder = read_manifest(pyramids), tmp_path / "run"
    train(entries, config, folder)
    first = (folder / STATE).read_bytes()
    same = {"model": plain(config)["model"] | {"allow_gaps": True}}  # a permission; older runs do not know of it
    longer = parse_config({**plain(config), **same, "train": {**plain(config)["train"], "epochs": 4}}, "")
    metrics, failures = train(entries, longer, folder)
    assert metrics["epoch"] == 4
    assert not failures
    assert len(read_metrics(folder)) == 4
    assert (folder / STATE).read_bytes() != first
    other = parse_config({**plain(config), "train": {**plain(config)["train"], "learning_rate": 0.1}}, "")
    with pytest.raises(UsageError, match="another configuration.*--overwrite"):
        train(entries, other, folder)
    with pytest.raises(UsageError, match="other slides"):
        train(entries[1:], config, folder)
    metrics, _ = train(entries, other, folder, overwrite=True)
    assert metrics["epoch"] == 3


def test_a_folder_of_something_else_is_left_alone(config, pyramids, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a training run"):
        train(read_manifest(pyramids), config, tmp_path, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_another_process_trains_into_is_left_alone(config, pyramids, tmp_path, overwrite):
    entries, folder = read_manifest(pyramids), tmp_path / "run"
    train(entries, config, folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert LOCK not in before
    with locked(folder / LOCK):
        with pytest.raises(UsageError, match="another training is running there"):
            train(entries, config, folder, overwrite=overwrite)
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != LOCK} == before
    train(entries, config, folder, overwrite=overwrite)


def test_overwrite_removes_a_run_and_nothing_else(config, pyramids, tmp_path):
    entries, folder = read_manifest(pyramids), tmp_path / "run"
    train(entries, config, folder)
    (folder / "predictions").mkdir()
    (folder / "predictions" / "mine.csv").write_text("mine")
    train(entries, config, folder, overwrite=True)
    assert (folder / "predictions" / "mine.csv").read_text() == "mine"
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="not that of a training run"):
        train(entries, config, stranger, overwrite=True)


@pytest.mark.parametrize("left", [[], ["run.json"], ["run.json", "config.yaml"], [".run.json.123.tmp"]])
def test_a_run_killed_as_it_began_can_be_started_again(config, pyramids, tmp_path, left):
    entries, folder = read_manifest(pyramids), tmp_path / "run"
    train(entries, config, folder)
    for path in list(folder.iterdir()):
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in left:
        (folder / name).touch()
    assert train(entries, config, folder)[0]["epoch"] == 3


def test_an_extended_run_keeps_its_last_model_until_the_next_takes_its_place(config, pyramids, tmp_path):
    job = arguments(config, pyramids, tmp_path / "run")
    train_worker(LocalContext(), job)
    before = weights(tmp_path / "run")
    job["config"] = {**job["config"], "train": {**job["config"]["train"], "epochs": 5}}
    with pytest.raises(Stop):
        train_worker(LocalContext(), job, stop_at(10))
    assert_same(weights(tmp_path / "run"), before)
    train_worker(LocalContext(), job)
    assert not torch.equal(weights(tmp_path / "run")["head.weight"], before["head.weight"])


AUGMENT = {"brightness": 0.2, "contrast": 0.3, "translation": 0.2, "jitter": 0.1, "warp": 0.1, "flip": True}
# As many samples as there are cells: all are drawn, whatever rounding does to the attention.
EVERY = {
    "ats": {
        "levels": [
            {"downsample": 4, "samples": 25, "stride": 8, "channels": [4]},
            {"downsample": 2, "samples": 100, "size": 16, "stride": 8, "channels": [4]},
        ],
        "patch_size": 24,
        "features": 8,
        "location": True,
    },
    "deepmil": {"kind": "deepmil", "patch_size": 24, "stride": 24, "features": 8, "attention": "gated"},
    "recomputed": {"kind": "deepmil", "patch_size": 24, "stride": 24, "features": 8, "recompute": True, "chunk": 7},
    "uniform": {"kind": "uniform", "patch_size": 24, "samples": 25, "cell": 32, "features": 8, "allow_gaps": True},
    "cnn": {"kind": "cnn", "encoder": "resnet8", "downsample": 2, "features": 8},
}


class Peer(LocalContext):
    """One of two workers that are threads of this process."""

    def __init__(self, rank, meeting, shared):
        super().__init__()
        self.rank, self.world_size, self.meeting, self.shared = rank, 2, meeting, shared

    def all_reduce(self, tensor):
        self.shared[self.rank] = tensor.clone()
        self.meeting.wait(60)
        total = self.shared[0] + self.shared[1]
        self.meeting.wait(60)
        tensor.copy_(total)


def test_two_workers_augment_as_one_does(config, pyramids, tmp_path):
    config = parse_config({**plain(config), "train": {"epochs": 2, "batch_size": 4, "augment": AUGMENT}}, "test")
    train_worker(LocalContext(), arguments(config, pyramids, tmp_path / "one"))
    job = arguments(config, pyramids, tmp_path / "two")
    meeting, shared = threading.Barrier(2), {}
    entries = [Entry(**row) for row in job["entries"]]
    workers = [
        Trainer(Peer(rank, meeting, shared), config, entries, TARGET, 3, tmp_path / "two") for rank in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(worker.run, lambda *_: None) for worker in workers]:
            done.result()
    one, other = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_trains_on_augmented_slides_and_validates_on_plain_ones(pyramids, tmp_path, kind):
    metrics = {}
    for name, augment in (("plain", {}), ("augmented", AUGMENT)):
        if kind not in ("ats", "uniform"):  # which draw patches
            augment = {key: value for key, value in augment.items() if key not in ("jitter", "warp")}
        still = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-30, "augment": augment}
        job = arguments(parse_config({"model": EVERY[kind], "train": still}, "test"), pyramids, tmp_path / name)
        job["entries"] = [{**row, "split": "val" if i < 3 else "train"} for i, row in enumerate(job["entries"])]
        metrics[name], _ = train_worker(LocalContext(), job)
    plain_one, augmented = metrics["plain"], metrics["augmented"]
    assert augmented["val_cross_entropy"] == plain_one["val_cross_entropy"]
    assert augmented["cross_entropy"] != plain_one["cross_entropy"]


@pytest.mark.parametrize("kind", ["deepmil", "cnn"])
@pytest.mark.parametrize("change", [{"jitter": 0.1}, {"warp": 0.1}])
def test_patches_that_are_not_drawn_are_not_said_to_change(kind, change):
    with pytest.raises(UsageError, match=f"kind {kind} draws none; leave them out"):
        parse_config({"model": EVERY[kind], "train": {"augment": change}}, "test")


@pytest.mark.parametrize("change", [{"jitter": 0.3}, {"warp": 0.2}])
def test_patches_change_in_training_alone(config, pyramids, tmp_path, change):
    metrics = {}
    for name, augment in (("plain", {}), ("moved", change)):
        still = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-30, "augment": augment}
        job = arguments(parse_config({**plain(config), "train": still}, "test"), pyramids, tmp_path / name)
        job["entries"] = [{**row, "split": "val" if i < 3 else "train"} for i, row in enumerate(job["entries"])]
        metrics[name], _ = train_worker(LocalContext(), job)
    assert metrics["moved"]["val_cross_entropy"] == metrics["plain"]["val_cross_entropy"]
    assert metrics["moved"]["entropy"] == metrics["plain"]["entropy"]  # as the attention sees what it saw
    assert metrics["moved"]["cross_entropy"] != metrics["plain"]["cross_entropy"]


def test_slides_change_from_epoch_to_epoch_and_resume_as_they_would_have(config, pyramids, tmp_path):
    config = parse_config({**plain(config), "train": {"epochs": 2, "batch_size": 4, "augment": AUGMENT}}, "test")
    for folder, step in (("whole", None), ("halves", 2)):
        job = arguments(config, pyramids, tmp_path / folder)
        if step:
            with pytest.raises(Stop):
                train_worker(LocalContext(), job, stop_at(step))
        train_worker(LocalContext(), job)
    assert_same(weights(tmp_path / "halves"), weights(tmp_path / "whole"))
    entries = [Entry(**row) for row in job["entries"]]
    trainer = Trainer(LocalContext(), config, entries, TARGET, 3, tmp_path)
    views = [trainer.model.coarse_view(trainer._augmented(epoch, entries[0])).float() for epoch in (0, 0, 1)]
    assert torch.equal(views[0], views[1])
    assert views[0].shape != views[2].shape or not torch.equal(views[0], views[2])


def test_an_epoch_says_when_nothing_was_learned(config, pyramids, tmp_path):
    """The learning rate is nearly zero; the verdict is on validation slides, and in the line of each epoch."""
    still = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-30}
    job = arguments(parse_config({**plain(config), "train": still}, "test"), pyramids, tmp_path / "run")
    job["entries"] = [{**row, "split": "val" if i < 4 else "train"} for i, row in enumerate(job["entries"])]
    metrics, _ = train_worker(LocalContext(), job)
    for line in read_metrics(tmp_path / "run"):
        assert line["val_auc_low"] < 0.5
        assert line["val_auc_low"] <= line["val_auc"] <= line["val_auc_high"]
        assert line["background"] == 0.0  # noise everywhere
        assert 0 < line["entropy"] <= line["uniform_entropy"] + 1e-6
        assert line["verdict"].startswith("has learned nothing yet: cross-entropy 0.")
        assert "of guessing by class frequencies (0.693); AUC 0." in line["verdict"]
    assert metrics["verdict"] == line["verdict"]


def test_the_command_says_when_nothing_was_learned(config, pyramids, tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps(plain(config)))
    words = ["train", "--manifest", pyramids, "--out", tmp_path / "run", "--config", tmp_path / "config.yaml"]
    words += ["--set", "train.epochs=1", "--set", "train.learning_rate=1e-30"]
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    numbers, verdict, _ = result.stdout.splitlines()
    assert "verdict" not in numbers
    assert verdict.startswith("has learned nothing yet: cross-entropy 0.")


def test_a_state_of_an_earlier_version_is_refused_with_what_to_do(config, pyramids, tmp_path, monkeypatch):
    """It had no averaged weights."""
    job = arguments(config, pyramids, tmp_path / "run")
    with pytest.raises(Stop):
        train_worker(LocalContext(), job, stop_at(4))
    monkeypatch.setattr(
        "pipeline.training.trainer.load_state", lambda *args: (*(found := load_state(*args))[:2], {}, found[3])
    )
    with pytest.raises(UsageError, match="earlier version.*--overwrite"):
        train_worker(LocalContext(), job)


def test_the_course_and_the_best_weights_go_on_where_they_were(config, pyramids, tmp_path):
    """Falling rates, averages and the best epoch by validation are those of a run that nothing interrupted."""
    job = arguments(config, pyramids, tmp_path / "whole")
    job["entries"] = [{**row, "split": "val" if i < 3 else "train"} for i, row in enumerate(job["entries"])]
    train_worker(LocalContext(), job)
    stopped = {**job, "folder": arguments(config, pyramids, tmp_path / "stopped")["folder"]}
    for step in (1, 3, 4):
        with pytest.raises(Stop):
            train_worker(LocalContext(), stopped, stop_at(step))
    train_worker(LocalContext(), stopped)
    assert_same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


def test_training_ends_when_validation_has_not_become_better(config, pyramids, tmp_path):
    patient = parse_config({**plain(config), "train": {**plain(config)["train"], "epochs": 9, "patience": 1}}, "")
    job = arguments(patient, pyramids, tmp_path / "run")
    job["entries"] = [{**row, "split": "val" if i < 3 else "train"} for i, row in enumerate(job["entries"])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.training.course.KeptWeights.judge", worse_every_time)
        train_worker(LocalContext(), job)
    assert len(read_metrics(tmp_path / "run")) == 1
    train_worker(LocalContext(), job)  # again: nothing more to do
    assert len(read_metrics(tmp_path / "run")) == 1


def worse_every_time(kept, score):
    kept._stale += 1


def test_balanced_steps_have_as_many_slides_of_each_class(config, pyramids, tmp_path):
    balanced = parse_config({**plain(config), "train": {**plain(config)["train"], "sampling": "balanced"}}, "")
    job = arguments(balanced, pyramids, tmp_path / "run")
    rows = [row for row in job["entries"] if row["split"] == "train"]
    job["entries"] = [row for i, row in enumerate(rows) if row["label"] == "box" or i < 4]
    trainer = Trainer(
        LocalContext(),
        balanced,
        [Entry(**row) for row in job["entries"]],
        TARGET,
        3,
        tmp_path / "run",
    )
    seen = set()
    for epoch in range(6):
        order = trainer._order(epoch)
        labels = [trainer.training[i].label for i in order]
        assert len(order) == len(trainer.training)
        for start in range(0, len(labels), balanced.train.batch_size):
            step = labels[start : start + balanced.train.batch_size]
            assert abs(step.count("bar") - step.count("box")) <= 1
        seen |= set(order)
    assert seen == set(range(len(trainer.training)))


def gradient(trainer):
    """Gradient of the first step, and what the model put out in it."""
    outputs = []
    classify = trainer.model.classify

    def remember(*arguments, **options):
        outputs.append((yield from classify(*arguments, **options)))
        return outputs[-1]

    trainer.model.classify = remember
    with ThreadPoolExecutor(2) as readers:
        _, batch, images, views = next(trainer._batches(0, 0))
        trainer._step(0, 0, batch, images, views, readers)
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {parameter.grad.dtype for parameter in parameters} == {torch.float32}
    return torch.cat([parameter.grad.flatten() for parameter in parameters]), outputs


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", EVERY)
def test_a_step_in_bfloat16_is_nearly_that_in_float32(pyramids, tmp_path, kind, parts):
    found = {}
    for precision in ("float32", "bfloat16"):
        settings = {"batch_size": 10, "parts": parts, "precision": precision}
        config = parse_config({"seed": 5, "model": EVERY[kind], "train": settings}, "test")
        job = arguments(config, pyramids, tmp_path)
        # The slides have one label: gradients of two would nearly cancel, and leave little but rounding.
        entries = [Entry(**row) for row in job["entries"] if row["label"] == "bar"]
        found[precision], outputs = gradient(Trainer(LocalContext(), config, entries, TARGET, 3, tmp_path))
        for output in outputs:
            assert output.logits.dtype == torch.float32
            for phase in output.phases:
                assert phase.population.log_attention.dtype == torch.float32
                total = phase.population.log_attention.exp().sum(-1)
                torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)
    exact, rounded = found["float32"], found["bfloat16"]
    assert not torch.equal(exact, rounded)  # or nothing ran in bfloat16
    # Normalisation takes most of a gradient away, and what is left has the same rounding.
    assert (exact - rounded).norm() < (0.2 if kind == "cnn" else 0.05) * exact.norm()


def test_a_run_that_could_not_begin_gives_way(config, pyramids, tmp_path):
    """Its encoder's weights were not there: they are named, and the same command goes on in the same folder."""
    entries, folder = read_manifest(pyramids), tmp_path / "run"
    values = plain(config)
    model = {**values["model"], "encoder": {"name": "lenet", "weights": str(tmp_path / "w.pth")}}
    with pytest.raises(ModelFileError, match=r"w\.pth: no such file"):
        train(entries, parse_config({**values, "model": model}, ""), folder)
    metrics, _ = train(entries, config, folder)
    assert metrics["epoch"] == config.train.epochs


def test_another_precision_or_augmentation_is_another_run(config, pyramids, tmp_path):
    entries, folder = read_manifest(pyramids), tmp_path / "run"
    train(entries, config, folder)
    for change in ({"precision": "bfloat16"}, {"augment": AUGMENT}):
        other = parse_config({**plain(config), "train": {**plain(config)["train"], **change}}, "")
        with pytest.raises(UsageError, match="another configuration"):
            train(entries, other, folder)
    rows = {}
    for precision in ("float32", "bfloat16"):
        settings = replace(prediction_settings(folder), precision=precision)
        rows[precision] = Classifier(settings)(entries[0])
    assert rows["bfloat16"]["prob_bar"] == pytest.approx(rows["float32"]["prob_bar"], abs=0.05)
    assert rows["bfloat16"]["prob_bar"] != rows["float32"]["prob_bar"]


def test_a_run_in_bfloat16_trains_resumes_and_predicts_in_it(config, pyramids, tmp_path):
    settings = {**plain(config), "train": {"epochs": 2, "batch_size": 4, "parts": 2, "precision": "bfloat16"}}
    config = parse_config({**settings, "predict": {"draws": 2, "precision": "bfloat16"}}, "test")
    metrics, _ = train(read_manifest(pyramids), config, tmp_path / "run")
    assert 0 < metrics["cross_entropy"] < 3
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}
    longer = parse_config({**plain(config), "train": {**plain(config)["train"], "epochs": 3}}, "test")
    assert train(read_manifest(pyramids), longer, tmp_path / "run")[0]["epoch"] == 3
    assert prediction_settings(tmp_path / "run").precision == "bfloat16"
    rows = predict(read_manifest(pyramids)[:2], tmp_path / "run", tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "ok"]


class OtherState(LocalContext):
    """One of two workers, whose peer has come to another epoch."""

    def all_reduce(self, tensor):
        tensor.add_(tensor + torch.tensor([1.0, 0.0, 0.0]))


def test_workers_with_different_states_do_not_train_together(config, pyramids, tmp_path):
    context = OtherState()
    context.world_size = 2
    with pytest.raises(DataError, match="different states.*share"):
        train_worker(context, arguments(config, pyramids, tmp_path / "run"))


def test_divergence_seen_in_validation_is_named(config, pyramids, tmp_path):
    wild = parse_config({**plain(config), "train": {"learning_rate": 1e30, "epochs": 1, "batch_size": 64}}, "")
    job = arguments(wild, pyramids, tmp_path / "run")
    job["entries"] = [{**row, "split": "val" if i < 2 else "train"} for i, row in enumerate(job["entries"])]
    with pytest.raises(DataError, match="no longer finite"):
        train_worker(LocalContext(), job)


def test_validation_is_measured_and_written(config, pyramids, tmp_path):
    job = arguments(config, pyramids, tmp_path / "run")
    job["entries"] = [{**row, "split": "val" if i < 3 else "train"} for i, row in enumerate(job["entries"])]
    metrics, _ = train_worker(LocalContext(), job)
    assert metrics["val_accuracy"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    assert 0 < metrics["val_cross_entropy"] < 3


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\x80\x04K\x01."])
def test_a_damaged_state_is_refused(config, pyramids, tmp_path, damage):
    train(read_manifest(pyramids), config, tmp_path / "run")
    (tmp_path / "run" / STATE).write_bytes(damage)
    with pytest.raises(UsageError, match="--overwrite"):
        train(read_manifest(pyramids), config, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_with_the_last_state(config, pyramids, tmp_path):
    wild = parse_config({**plain(config), "train": {**plain(config)["train"], "learning_rate": 1e30}}, "")
    with pytest.raises(DataError, match="no longer finite.*last state stands"):
        train(read_manifest(pyramids), wild, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_slides_that_cannot_be_used_are_left_out_and_named(config, pyramids, tmp_path):
    entries = read_manifest(pyramids)
    bad = [
        entries[0].__class__(slide_id="gone", path=str(tmp_path / "gone.ome.zarr"), label="bar", split="train"),
        entries[0].__class__(slide_id="file", path=str(pyramids), label="box", split="train"),
    ]
    metrics, failures = train([*bad, *entries], config, tmp_path / "run")
    assert metrics["epoch"] == 3
    assert {failure.slide_id for failure in failures} == {"gone", "file"}
    assert "not an image of a kind that is read" in next(f.error for f in failures if f.slide_id == "file")
    with pytest.raises(DataError, match="slide gone"):
        train([*bad, *entries], config, tmp_path / "other", fail_fast=True)
    with pytest.raises(DataError, match="no slide can be used"):
        train(bad, config, tmp_path / "none")


def test_labels_that_allow_no_training(config, pyramids, tmp_path):
    entries = read_manifest(pyramids)
    with pytest.raises(UsageError, match="two different labels"):
        train([entry for entry in entries if entry.label == "bar"], config, tmp_path / "run")
    strange = [*entries, entries[0].__class__(slide_id="x", path=entries[0].path, label="ring", split="test")]
    with pytest.raises(UsageError, match="no training slide has: ring"):
        train(strange, config, tmp_path / "run")


def test_a_level_the_slides_lack_is_named(config, pyramids, tmp_path):
    deep = plain(config)
    deep["model"] |= {"levels": [{"downsample": 64, "samples": 2, "stride": 1}], "patch_size": 64}
    with pytest.raises(DataError, match="no level at downsample 64"):
        train(read_manifest(pyramids), parse_config(deep, ""), tmp_path / "run")


def test_balanced_class_weights_have_mean_one(config, pyramids, tmp_path):
    balanced = parse_config({**plain(config), "train": {"class_weights": "balanced"}}, "")
    entries = [e for e in read_manifest(pyramids) if e.split == "train"][:7]  # 4 bars, 3 boxes
    trainer = Trainer(LocalContext(), balanced, entries, TARGET, 3, tmp_path)
    assert trainer.class_weights.tolist() == pytest.approx([7 / 8, 7 / 6])


# A shell that began the tests in the background has had SIGINT ignored, which children inherit.
LISTENING = """
import signal
from pipeline.cli.app import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


PATIENCE_S = 300  # with a process beside which others work


@pytest.fixture
def start(pyramids):
    """Start the command in a process of its own, which does not outlive the test."""
    processes = []

    def start(folder, epochs=40):
        command = [sys.executable, "-c", LISTENING, "train", "--manifest", str(pyramids), "--out", str(folder)]
        command += ["--config", str(folder.parent / "config.yaml"), "--set", f"train.epochs={epochs}"]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE_S)
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_the_command_goes_on_after_a_signal(start, config, pyramids, tmp_path, kind):
    (tmp_path / "config.yaml").write_text(json.dumps(plain(config)))
    process = start(tmp_path / "run")
    deadline = time.monotonic() + PATIENCE_S
    while len(read_metrics(tmp_path / "run")) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, kind)
    _, errors = process.communicate(timeout=PATIENCE_S)
    done = len(read_metrics(tmp_path / "run"))
    assert 2 <= done < 40, errors
    if kind == signal.SIGINT:
        assert process.returncode == 130, errors
        assert "run the same command again" in errors
        assert "Traceback" not in errors
    process = start(tmp_path / "run")
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == list(range(1, 41))
    longer = parse_config({**plain(config), "train": {**plain(config)["train"], "epochs": 40}}, "")
    train_worker(LocalContext(), arguments(longer, pyramids, tmp_path / "straight"))
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "straight"))
