"""A slide that turns out to be damaged while a model trains costs that slide, and is named at the end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cluster import LocalContext
from nested_ats import Classes
from pipeline.cli.app import app
from pipeline.config import parse_config, plain
from pipeline.data.manifest import plain_entries, read_manifest, write_manifest
from pipeline.data.samples import SampleCache
from pipeline.data.slides import SlideImage
from pipeline.errors import DataError
from pipeline.runs import read_metrics
from pipeline.training.dry_run import dry_run, measure_step
from pipeline.training.train import train
from pipeline.training.trainer import Trainer
from storage import CorruptImageError, write_pyramid
from storage.read.source import Counters

from .test_workers_agree import Peers

TARGET = Classes(("bar", "box"))


@pytest.fixture
def break_reads(monkeypatch):
    """Make reading some levels of some slides fail, as damaged chunks do; no level: opening them fails."""
    read, open_ = SlideImage.read, SampleCache.open

    def fail(slides, levels=()):
        def matches(path):
            return any(Path(path).name == f"{slide}.ome.zarr" for slide in slides)

        def reading(image, level, boxes):
            if level in levels and matches(image.slide.location):
                raise CorruptImageError("a damaged chunk")
            return read(image, level, boxes)

        def opening(cache, entry):
            if not levels and matches(entry.path):
                raise CorruptImageError("no sound metadata")
            return open_(cache, entry)

        monkeypatch.setattr(SlideImage, "read", reading)
        monkeypatch.setattr(SampleCache, "open", opening)

    return fail


def trained(config, entries, folder, size=1, **settings):
    """Trainers of a group that has trained in threads, the first one's first."""
    folder.mkdir()
    trainers = [Trainer(c, config, entries, TARGET, 3, folder, **settings) for c in Peers(size).contexts]
    with ThreadPoolExecutor(size) as pool:
        list(pool.map(lambda trainer: trainer.run(lambda *_: None), trainers))
    return trainers


def levels_of(config):
    """Numbers of the levels that the model reads: coarse view, ..., patches."""
    coarse = [int(level.downsample).bit_length() - 1 for level in config.model.levels]
    return [*coarse, 0]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("depth", [None, 0, -1], ids=["opening", "coarse view", "patches"])
def test_training_goes_on_as_if_the_slide_were_not_in_its_steps(
    config, pyramids, tmp_path, break_reads, depth, parts
):
    """One step of all slides: the same step without the slide, to the last digit of its gradient."""
    once = parse_config({**plain(config), "train": {"epochs": 1, "batch_size": 64, "parts": parts}}, "")
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "train"][:5]
    [without] = trained(once, [entries[0], *entries[2:]], tmp_path / "without")
    break_reads([entries[1].slide_id], () if depth is None else [levels_of(once)[depth]])
    [trainer] = trained(once, entries, tmp_path / "with")
    assert trainer.unreadable.reasons.keys() == {entries[1].slide_id}
    for (name, one), other in zip(without.model.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-6, rtol=1e-5, msg=name)
    assert read_metrics(tmp_path / "with")[-1]["loss"] == pytest.approx(
        read_metrics(tmp_path / "without")[-1]["loss"]
    )


def test_every_worker_learns_of_all_and_the_gradient_is_that_of_one(config, pyramids, tmp_path, break_reads):
    once = parse_config({**plain(config), "train": {"epochs": 1, "batch_size": 5}}, "")
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "train"][:5]
    break_reads([entries[1].slide_id, entries[2].slide_id], [0])
    [alone] = trained(once, entries, tmp_path / "1")
    for trainer in trained(once, entries, tmp_path / "3", size=3):
        assert trainer.unreadable.reasons == alone.unreadable.reasons
        assert len(trainer.unreadable.reasons) == 2
        for one, other in zip(alone.model.parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, atol=1e-6, rtol=1e-5)


def test_steps_of_bad_slides_alone_change_little_and_break_nothing(config, pyramids, tmp_path, break_reads):
    one_each = parse_config({**plain(config), "train": {"epochs": 2, "batch_size": 1}}, "")
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "train"][:3]
    break_reads([entries[0].slide_id])
    trained(one_each, entries, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [1, 2]


def test_a_bad_validation_slide_is_left_out(config, pyramids, tmp_path, break_reads):
    once = parse_config({**plain(config), "train": {"epochs": 1, "batch_size": 4}}, "")
    rows = [entry for entry in read_manifest(pyramids) if entry.split == "train"]
    entries = [replace(row, split="val") if i < 3 else row for i, row in enumerate(rows)]
    trained(once, [entries[0], *entries[2:]], tmp_path / "without")
    break_reads([entries[1].slide_id], [0])
    [trainer] = trained(once, entries, tmp_path / "with")
    assert trainer.unreadable.reasons.keys() == {entries[1].slide_id}
    expected, found = (read_metrics(tmp_path / name)[-1] for name in ("without", "with"))
    assert found["val_cross_entropy"] == pytest.approx(expected["val_cross_entropy"])
    break_reads([entry.slide_id for entry in entries[:3]], [0])
    trained(once, entries, tmp_path / "none")
    assert "val_cross_entropy" not in read_metrics(tmp_path / "none")[-1]


def test_nothing_readable_is_an_error(config, pyramids, tmp_path, break_reads):
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "train"][:3]
    break_reads([entry.slide_id for entry in entries], [0])
    with pytest.raises(DataError, match="no training slide can be read; slide slide .: a damaged chunk"):
        trained(config, entries, tmp_path / "run")


def test_a_dry_run_finds_what_its_steps_read(config, pyramids, tmp_path, break_reads):
    entries = read_manifest(pyramids)
    break_reads([entries[0].slide_id], [2])
    lines, failures = dry_run(entries, config, tmp_path / "run")
    assert [(failure.slide_id, failure.error) for failure in failures] == [(entries[0].slide_id, "a damaged chunk")]
    assert any(line.startswith("a step of ") for line in lines)
    with pytest.raises(DataError, match="slide slide 0: a damaged chunk"):
        dry_run(entries, config, tmp_path / "run", fail_fast=True)
    break_reads([entry.slide_id for entry in entries], [2])
    with pytest.raises(DataError, match="no training slide can be read; slide slide .: a damaged chunk"):
        dry_run(entries, config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_what_its_second_step_reads(config, pyramids, tmp_path, monkeypatch):
    """Both steps of one batch and one epoch draw the same: the second reads the same chunks, and no metadata."""
    once = parse_config({**plain(config), "train": {"epochs": 1, "batch_size": 10}}, "")
    add, read = Counters.add, []
    monkeypatch.setattr(Counters, "add", lambda *a, **words: (read.append(words), add(*a, **words)))
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "train"]
    arguments = {
        "config": plain(once),
        "entries": plain_entries(entries),
        "target": TARGET.plain,
        "channels": 3,
    }
    cost, _ = measure_step(LocalContext(), {**arguments, "folder": str(tmp_path)})
    chunks = sum(words["read"] for words in read if words.get("chunks"))
    assert cost.slides == 10
    assert 2 * cost.read_bytes == chunks
    assert list(tmp_path.iterdir()) == []


def test_fail_fast(config, pyramids, tmp_path, break_reads):
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "train"]
    break_reads([entries[1].slide_id], [0])
    with pytest.raises(DataError, match="slide slide 1: a damaged chunk"):
        train(entries, config, tmp_path / "run", fail_fast=True)


def test_the_command_names_it_and_its_exit_code_says_so(config, pyramids, tmp_path):
    """A chunk of the finest level is damaged on the disk: seen when a patch is drawn there, not when it is opened."""
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "train"]
    bad = tmp_path / "bad.ome.zarr"
    write_pyramid(bad, torch.randint(0, 60, (3, 120, 150), dtype=torch.uint8).numpy(), mpp=0.5)
    shard = bad / "0/c/0/0/0"
    data = bytearray(shard.read_bytes())
    for i in range(0, len(data) // 2, 50):  # in every chunk, and not in the index
        data[i] ^= 1
    shard.write_bytes(data)
    write_manifest(tmp_path / "m.csv", [*entries, replace(entries[0], slide_id="bad one", path=str(bad))])
    settings = [f"--set=train.{key}" for key in ("epochs=2", "batch_size=4")]
    levels = "model.levels=[{downsample: 4, samples: 4, stride: 2}, {downsample: 2, size: 16, samples: 4, stride: 4}]"
    arguments = ["train", "--manifest", str(tmp_path / "m.csv"), "--out", str(tmp_path / "run"), *settings]
    result = CliRunner().invoke(app, [*arguments, f"--set={levels}", "--set=model.patch_size=24"])
    assert result.exit_code == 3, result.output
    assert "1 of 11 failed" in result.output
    assert "bad one" in result.output
    assert "chunk (0, 0): the checksum" in result.output
    assert (tmp_path / "run" / "model").is_dir()
