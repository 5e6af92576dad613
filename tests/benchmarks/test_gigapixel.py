"""Scenes of a gigapixel: levels are means, decoys weigh as much as signs, and the runs of the benchmark run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, which import what lies beside them

import gigapixel
import gigapixel_scenes
from gigapixel_scenes import DOWNSAMPLES, LABELS, Scene

from pipeline.data import samples


@pytest.mark.parametrize("task", ["villages", "needles"])
def test_coarse_levels_are_means_of_the_finest(task):
    scene = Scene(task, 4, gigapixel.SIDE)
    middle = len(scene.discs.top) // 2
    for y, x in [(0, 0), (scene.discs.top[middle], scene.discs.left[middle]), (32_768 - 512, 32_768 - 512)]:
        corner = torch.tensor([int(y), int(x)]) // 64 * 64
        fine = scene.read(0, torch.cat([corner, torch.tensor([512, 512])])[None]).float()
        for level, downsample in enumerate(DOWNSAMPLES):
            box = torch.cat([corner, torch.tensor([512, 512])])[None] // downsample
            both = scene.read(level, box).float(), functional.avg_pool2d(fine, downsample)
            assert (both[0] - both[1]).abs().max() <= 1  # each is rounded once
    assert fine.min() > 0
    assert fine.max() < 255  # nothing is clipped


def test_a_box_is_alike_in_whatever_window():
    scene = Scene("villages", 7, 8192)
    large = scene.read(1, torch.tensor([[-40, 100, 300, 300]]))
    small = scene.read(1, torch.tensor([[60, 150, 64, 64]]))
    assert torch.equal(large[..., 100:164, 50:114], small)


def test_decoys_weigh_as_much_as_signs_and_show_nothing_at_downsample_64():
    rows, added = gigapixel_scenes._kinds()
    signs = np.concatenate(rows[: len(LABELS)])
    np.testing.assert_allclose(added[rows[len(LABELS)]].sum((1, 2)), added[signs].sum((1, 2)), rtol=1e-4)
    assert not np.allclose(added[rows[len(LABELS)]], added[signs])


def test_scenes_are_what_they_say():
    for index in range(6):
        rows, _ = gigapixel_scenes._kinds()
        villages, needles = (Scene(task, index, gigapixel.SIDE) for task in ("villages", "needles"))
        assert villages.label == LABELS[index % 3]
        for scene, fewest, most in ((villages, 1650, 5600), (needles, 24, 24)):
            kinds = scene.discs.kind
            assert fewest <= np.isin(kinds, rows[index % 3]).sum() <= most
            others = [row for label in range(3) if label != index % 3 for row in rows[label]]
            assert not np.isin(kinds, others).any()
            cells = np.stack([scene.discs.top, scene.discs.left], 1) // gigapixel_scenes.CELL
            assert len(np.unique(cells, axis=0)) == len(cells)
        assert np.isin(needles.discs.kind, rows[3]).sum() == 8000
        assert villages.shapes[-1] == (512, 512)


@pytest.mark.slow
def test_a_curriculum_and_its_rows(tmp_path, monkeypatch, capsys):
    """In small: the benchmark's own functions on scenes of 2048 pixels."""
    monkeypatch.setattr(samples, "_open_one", lambda entry, *_, **__: Scene.at(entry.path))
    monkeypatch.setattr(gigapixel, "SIDE", 2048)
    arms, runs = gigapixel.ARMS["needles"], []
    for name in ("small", "medium", "curriculum"):
        first = tmp_path / arms[name].init / "run" if arms[name].init else None
        arm = arms[name]._replace(side=min(arms[name].side, 2048))
        found = gigapixel.train_and_test("needles", arm, 0, tmp_path / name, first, quick=True)
        runs.append({"task": "needles", "arm": name, "seed": 0, **found, "versions": {}})
    assert runs[2]["updates"] == 12 // gigapixel.BATCH
    assert 0 < runs[2]["read"] < 0.2
    gigapixel.show({"runs": runs})
    shown = capsys.readouterr().out
    assert all(f"\n{name:14}    0" in shown for name in ("small", "medium", "curriculum"))


def test_an_interval_of_wilson_s():
    assert gigapixel.interval(97, 102) == "0.951 [0.890, 0.979]"
