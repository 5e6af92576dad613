"""The cost benchmarks measure what they say: whole pyramids, the rule for levels, the paper's models."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nested_ats import DeepMILConfig, build_model
from nested_ats.cells import image_cells
from pipeline.config import Config
from storage import Slide, validate

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # benchmarks are scripts, which import each other

import cost_models
import cost_size


def test_a_tiled_pyramid_is_whole_and_repeats_its_block(tmp_path):
    path = cost_size.write_tiled(tmp_path / "scene.zarr", 8192, block=4096)
    assert not validate(path)
    with Slide(path) as slide:
        assert [level.downsample for level in slide.levels] == [2**level for level in range(8)]
        for level in range(3):
            side = 4096 >> level
            first = slide.read(level, (side - 50, 7, 100, 64))
            assert first.std() > 10
            np.testing.assert_array_equal(slide.read(level, (2 * side - 50, side + 7, 50, 64)), first[:, :50])
        # Every level is the mean of the finer one, across the seams of blocks and shards too.
        finer, coarser = (slide.read(level, (4096 - 64 >> level,) * 2 + (128 >> level,) * 2) for level in (0, 1))
        means = finer.reshape(3, 64, 2, 64, 2).mean((2, 4))
        assert np.abs(means - coarser).max() <= 0.5
    stored = {file.stat().st_ino: file.stat().st_size for file in path.rglob("0/c/**/*") if file.is_file()}
    assert len(stored) == 4  # of sixteen shards


def test_the_reference_is_the_default_model():
    default = build_model(Config().model, in_channels=3, classes=2)
    assert cost_size.make_model(cost_size.REFERENCE).config == default.config


def test_both_kinds_of_costs_by_size_are_measured(tmp_path, capsys, monkeypatch):
    # In this process, which may not grow at all: to start another takes seconds.
    monkeypatch.setattr(cost_size, "resident", lambda *which: max(1, cost_size.grow(*which)))
    paths = {side: cost_size.write_tiled(tmp_path / f"{side}.zarr", side) for side in (128, 256)}
    steps = cost_size.measure_steps(paths, repeats=1)
    patches = cost_size.measure_all_patches(paths, limit=60)
    assert all(step.peak > 0 and step.resident > 0 and step.read > step.metadata > 0 for step in steps)
    assert [each.patches for each in patches] == [4, 16]
    assert patches[1].peak > 3 * patches[0].peak
    cost_size.print_tables(steps, patches)
    assert len(capsys.readouterr().out.splitlines()) == 2 * (2 + 2)


def test_deep_mil_sees_the_patches_of_the_paper():
    def patches(task):
        (config,) = (m.config for m in cost_models.TASKS[task].methods if isinstance(m.config, DeepMILConfig))
        image = type("Image", (), {"shapes": [cost_models.TASKS[task].shape[1:]]})()
        return int(image_cells([image], config.patch_downsample * config.stride)[1].sum())

    assert (patches("colon"), patches("speed")) == (2500, 192)


def test_models_are_measured_on_a_view_of_any_size(capsys):
    small = replace(cost_models.TASKS["speed"], shape=(3, 96, 128), view=(29, 38))  # 96 / 29 is not the view's scale
    scaled = [replace(method, config=replace(method.config, downsample=96 / 29)) for method in small.methods[2:3]]
    small = replace(small, methods=(*scaled, small.methods[3]))
    torch.manual_seed(0)
    costs = cost_models.measure(small, 1, "cpu")
    assert costs[1].step_bytes > costs[0].step_bytes > 0
    cost_models.print_table(small, costs)
    assert "CNN 0.5" in capsys.readouterr().out
