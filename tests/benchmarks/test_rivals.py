"""IPS keeps the best of all patches, the others have no gradient, and the table comes of the result file."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, which import what lies beside them

import rivals
import rivals_data
import rivals_run
from example_data.mnist import load_pools
from rivals_ips import IPS, PatchEncoder, learn
from rivals_show import draw

from pipeline.data.slides import SlideImage
from pipeline.runs import read_metrics
from pipeline.sections import TrainConfig
from storage import Slide, write_pyramid


@pytest.fixture
def model() -> IPS:
    torch.manual_seed(0)
    return IPS(nn.Linear(6, 16), features=16, classes=2, width=32, heads=4, kept=7)


def bag(patches: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(patches, 6, generator=generator), torch.rand(patches, 2, generator=generator)


def in_chunks(patches: torch.Tensor, places: torch.Tensor, chunk: int):
    return zip(patches.split(chunk), places.split(chunk), strict=True)


@pytest.mark.parametrize("chunk", [1, 5, 7, 8, 64, 1000])
def test_what_is_kept_is_the_best_of_all_whatever_the_chunk(model, chunk):
    patches, places = bag(101, 1)
    with torch.no_grad():
        best = model.score(model.embed(patches, places)).topk(model.kept).indices
    kept, where = model.select(in_chunks(patches, places, chunk))
    assert {tuple(row) for row in kept.tolist()} == {tuple(row) for row in patches[best].tolist()}
    assert {tuple(row) for row in where.tolist()} == {tuple(row) for row in places[best].tolist()}


def test_all_are_kept_where_there_are_fewer(model):
    kept, _ = model.select(in_chunks(*bag(4, 2), 3))
    assert kept.shape == (4, 6)


def test_only_kept_patches_have_a_gradient(model):
    patches, places = bag(50, 3)
    patches.requires_grad_()
    kept, where = model.select(in_chunks(patches, places, 10))
    assert not kept.requires_grad
    kept.requires_grad_()
    torch.autograd.backward(model(kept[None], where[None]).sum())
    assert patches.grad is None
    assert kept.grad is not None
    assert bool(kept.grad.abs().sum(1).gt(0).all())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_black_patches_encoded_once_have_the_same_features():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    encoder = PatchEncoder(network, torch.tensor([0.1]), torch.tensor([0.3]))
    patches = torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8)
    patches[[0, 3, 4]] = 0
    apart = encoder.eval()(patches)
    encoder.train()
    torch.testing.assert_close(encoder(patches), apart)
    torch.testing.assert_close(encoder(patches[:1]), apart[:1])


PLANTED = [row % 2 for row in range(240)]  # classes of bags


def planted(row: int):
    """One patch of 60 tells the class of a bag."""
    patches, places = bag(60, row)
    patches = 0.3 * patches
    patches[row % 60] = torch.tensor([2.0, 2.0, 2.0, -2.0 if PLANTED[row] else 2.0, 0.0, 0.0])
    return in_chunks(patches, places, 20)


def trained(model: IPS, bags: int, epochs: int, state: Path) -> IPS:
    course = TrainConfig(epochs=epochs, batch_size=8, learning_rate=3e-3, schedule="constant", warmup=0)
    learn(model, planted, PLANTED[:bags], course, 0, state)
    return model


def test_a_planted_patch_tells_the_class_of_bags_that_were_not_trained_on(model, tmp_path):
    trained(model, 200, 10, tmp_path / "ips.pt").eval()
    kept = [model.select(planted(row)) for row in range(200, 240)]
    patches, places = (torch.stack(part) for part in zip(*kept, strict=True))
    right = model(patches, places).argmax(1) == torch.tensor(PLANTED[200:])
    assert int(right.sum()) >= 38


def test_learning_goes_on_where_it_was(model, tmp_path):
    again = copy.deepcopy(model)
    trained(copy.deepcopy(model), 24, 2, tmp_path / "parts.pt")
    trained(again, 24, 4, tmp_path / "parts.pt")
    trained(model, 24, 4, tmp_path / "whole.pt")
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_patches_tile_the_image_and_their_pixels_are_counted(tmp_path):
    write_pyramid(tmp_path / "image.ome.zarr", np.arange(120 * 150, dtype=np.uint16).reshape(1, 120, 150))
    with Slide(tmp_path / "image.ome.zarr") as slide, rivals_run.counted_pixels() as pixels:
        image = SlideImage(slide)
        found = list(rivals_run.patches_of(image, 50, 4))
    assert sum(pixels) == 120 * 150
    patches, places = (torch.cat(part) for part in zip(*found, strict=True))
    assert patches.shape == (9, 1, 50, 50)
    assert patches[5, 0, 0, 0] == 50 * 150 + 100
    torch.testing.assert_close(places[5], torch.tensor([75 / 120, 125 / 150]))


def test_scenes_are_the_same_again_and_their_names_tell_the_label(tmp_path, monkeypatch):
    pools = load_pools(None, None)
    monkeypatch.setattr(rivals_data, "_pools", lambda data: pools)
    for name in ("mnist-1500", "needles-1024"):
        folder = tmp_path / name
        rivals_data.write_scenes(name, tmp_path, folder, [3, rivals_data.FIRST_TEST])
        entries = rivals_data.make_images(name, 0, 1, tmp_path, tmp_path)  # nothing is missing
        label, pixels = rivals_data.draw_scene(name, rivals_data.FIRST_TEST, pools[1])
        assert [(entry.split, entry.label) for entry in entries] == [("test", label)]
        with Slide(entries[0].path) as slide:
            assert bool((slide.read(0, (0, 0, *slide.shape_yx))[0] == pixels).all())


@pytest.mark.parametrize("method", [m for m in rivals_run.METHODS if m != rivals_run.SELECTION])
@pytest.mark.parametrize("task", rivals_data.TASKS)
def test_every_method_has_a_configuration_of_every_task(tmp_path, task, method):
    if not rivals.fits(method, task):
        pytest.skip("is not for that task")
    config = rivals_run.configure(task, method, 3, 5, tmp_path / "weights.pth", tmp_path / "store")
    assert (config.seed, config.train.epochs) == (3, 5)
    assert config.model.kind == rivals_run.KINDS[method]


def test_a_curriculum_goes_from_smaller_scenes_to_those_of_the_task(tmp_path, monkeypatch):
    pools = load_pools(None, None)
    monkeypatch.setattr(rivals_data, "_pools", lambda data: pools)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # a piece sets its own
    monkeypatch.setattr(rivals_run, "BEFORE", {"needles-1024": ("needles-256", 2)})
    numbers = [*range(8), *range(rivals_data.FIRST_TEST, rivals_data.FIRST_TEST + 16)]
    for name in ("needles-256", "needles-1024"):
        rivals_data.write_scenes(name, tmp_path, tmp_path / name, numbers)
    entries = rivals_data.make_images("needles-1024", 8, 16, tmp_path, tmp_path)
    known = {entry.label for entry in entries if entry.split == "train"}
    entries = [entry for entry in entries if entry.label in known]
    folder = tmp_path / "runs/piece"
    seconds, (four, one) = rivals_run.run("needles-1024", rivals_run.CURRICULUM, 0, 1, entries, tmp_path, folder)
    before = rivals_run.folder_of(tmp_path / "runs", "needles-256", 8, rivals_run.CURRICULUM, 0, 2) / "run"
    small, large = (read_metrics(run) for run in (before, folder / "run"))
    assert (len(small), len(large)) == (2, 1)
    assert seconds == pytest.approx(sum(line["seconds"] for line in [*small, *large]))
    assert json.loads((folder / "run/run.json").read_text())["init"]["folder"] == str(before / "model")
    assert len(four.rows) == len(one.rows) == len(entries) - 8 > 0
    assert four.pixels > one.pixels > 0


def test_rows_are_printed_and_drawn_of_the_result_file(tmp_path, monkeypatch, capsys):
    figures = {"tests": 1000, "test_error": 0.05, "bytes": 20_000, "pixels": 0.03, "test_seconds": 0.01}
    cost = {"training_seconds": 7200.0, "image_seconds": 0.02, "peak_bytes": 5 * 10**8, "versions": {"torch": "9"}}
    pieces = [
        {
            "task": task,
            "images": images,
            "method": method,
            "seed": seed,
            "epochs": 9,
            "one_draw": [],
            **figures,
            **cost,
        }
        for task, images, method, seed in [
            ("mnist-1500", 5000, "IPS", 0),
            ("mnist-1500", 1000, "ours", 0),
            ("mnist-1500", 1000, "ours", 1),
            ("idrid", 343, "Deep MIL", 0),
        ]
    ]
    pieces[2] |= {"test_error": 0.15}
    pieces[3] |= {"auc": 0.91}
    for piece in pieces[1:3]:
        piece["one_draw"] = [{**figures, "test_error": 0.2}]
    (tmp_path / "results.json").write_text(json.dumps(pieces))
    words = ["rivals.py", "--show", "--results", str(tmp_path / "results.json"), "--figure", str(tmp_path / "a.png")]
    monkeypatch.setattr(sys, "argv", words)
    rivals.main()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "ours 1000 9 2 10.0 [8.3, 12.0] % 20.0 3.0% 0.010 0.0200 2.00 0.50" in lines
    assert "ours, one draw 1000 9 2 20.0 [17.6, 22.6] % 20.0 3.0% 0.010 0.0200 2.00 0.50" in lines
    assert lines.index("ours 1000 9 2 10.0 [8.3, 12.0] % 20.0 3.0% 0.010 0.0200 2.00 0.50") < lines.index(
        "IPS 5000 9 1 5.0 [3.8, 6.5] % 20.0 3.0% 0.010 0.0200 2.00 0.50"
    )
    assert any(line.startswith("Deep MIL 343 9 1") and " 0.910 " in line for line in lines)
    assert any("99.1 % accuracy" in line for line in lines)
    assert (tmp_path / "a.png").stat().st_size > 1000
    draw(pieces[:1], tmp_path / "one.png")
