"""The experiments on published data: small data in their layouts, their settings, and a run of each in small."""

from __future__ import annotations

import sys
from functools import partial

import colon_cancer
import made
import pytest
import speed_limits
import torch
from example_data import published
from experiment import RESULTS, read_results

from nested_ats import ArrayImage, build_model
from storage import open_image

TABLE_1 = ["U-10 0.25/1", "U-50 0.25/1", "CNN 0.5", "CNN 1", "Deep MIL 1", "ATS-10 0.25/1", "ATS-50 0.25/1"]
TABLE_2 = [
    "U-5 0.25/1", "U-10 0.25/1", "CNN 0.25", "CNN 0.5", "CNN 1", "Deep MIL 1", "ATS-5 0.25/1", "ATS-10 0.25/1",
]  # fmt: skip


def pixels_of(path):
    with open_image(path) as image:
        return image.read(0, 0, *image.shape[1:]).astype(int)


# --- made data --------------------------------------------------------------------------------------------


def test_made_tissue_has_the_published_layout(tmp_path):
    folder = made.write_colon_cancer(tmp_path / "made", images=4)
    entries = published.colon_cancer(folder)
    assert [entry.label for entry in entries] == ["epithelial", "none"] * 2
    points = published.colon_cancer_points(folder)
    assert len(points["img1"]) > 30
    image = pixels_of(entries[0].path)
    assert image.shape == (3, 500, 500)
    y, x = points["img1"].round().astype(int).T
    assert image[0, y, x].mean() < image[0].mean() - 50  # nuclei are dark where the points are
    (folder / "img2" / "img2.bmp").unlink()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*.bmp")}
    made.write_colon_cancer(folder, images=4)  # writes what is missing and touches nothing else
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*.bmp")}
    assert {path: after[path] for path in before} == before
    assert len(after) == 4


def test_made_streets_have_the_published_layout(tmp_path):
    folder = made.write_traffic_signs(tmp_path, train=6, test=3, size_yx=(384, 512))
    entries = published.traffic_signs(folder)
    assert [entry.label for entry in entries] == [*made.STREETS, *made.STREETS[:3]]
    assert [entry.split for entry in entries] == ["train"] * 6 + ["test"] * 3
    boxes = published.traffic_sign_boxes(folder)
    assert [len(boxes[entry.slide_id]) for entry in entries] == [0, 2, 0, 2, 0, 2, 0, 2, 0]
    image = pixels_of(entries[1].path)
    assert image.shape == (3, 384, 512)
    for y, x, height, width in boxes[entries[1].slide_id]:
        red, green, _ = image[:, round(y + height / 2), round(x + 3)]  # within the ring
        assert red > green + 60
        assert height == width > 35
    assert (pixels_of(entries[0].path) != pixels_of(entries[6].path)).any()  # other scenes to test


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(("module", "keys"), [(colon_cancer, TABLE_1), (speed_limits, TABLE_2)])
def test_every_row_of_the_papers_table_can_be_run(module, keys, quick):
    experiment = module.build(quick=quick, made=quick)
    assert [method.key for method in experiment.methods] == keys
    for method in experiment.methods:
        assert all(vars(method.paper).values())
        config = experiment.config(method, seed=1)
        build_model(config.model, in_channels=3, classes=4)
        assert config.train.augment.contrast == 0.2


def test_settings_of_section_4_3():
    experiment = colon_cancer.build(quick=False, made=False)
    configs = {method.key: experiment.config(method, 0) for method in experiment.methods}
    train = configs["ATS-10 0.25/1"].train
    training = round((1 - colon_cancer.TEST) * 100)
    assert train.epochs * -(-training // train.batch_size) == 30_000
    assert (train.entropy_weight, train.learning_rate, experiment.runs) == (0.01, 1e-3, 5)
    assert cells(configs["Deep MIL 1"].model, (500, 500)) == 2500
    assert cells(configs["ATS-50 0.25/1"].model, (500, 500)) == cells(configs["U-50 0.25/1"].model, (500, 500))


def test_settings_of_section_4_4():
    experiment = speed_limits.build(quick=False, made=False)
    configs = {method.key: experiment.config(method, 0) for method in experiment.methods}
    train = configs["ATS-5 0.25/1"].train
    assert (train.entropy_weight, train.class_weights, experiment.runs) == (0.05, "balanced", 3)
    assert cells(configs["Deep MIL 1"].model, (960, 1280)) == 12 * 16
    assert cells(configs["ATS-10 0.25/1"].model, (960, 1280)) == cells(configs["U-10 0.25/1"].model, (960, 1280))


def cells(config, shape):
    """Places that a model of small features may look at."""
    model = build_model(config, in_channels=3, classes=2).eval()
    image = ArrayImage(torch.zeros(3, *shape, dtype=torch.uint8), levels=3)
    with torch.no_grad():
        return model([image], torch.tensor([0])).phases[-1].population.log_attention.numel()


@pytest.mark.parametrize("quick", [False, True])
def test_ablations_vary_one_thing(quick):
    for what, path in {"entropy": ("train", "entropy_weight"), "patches": ("model", "levels")}.items():
        experiment = colon_cancer.build_ablation(what, quick=quick, made=quick)
        configs = [experiment.config(method, 0) for method in experiment.methods]
        values = [getattr(getattr(config, path[0]), path[1]) for config in configs]
        assert len(set(map(str, values))) == len(values) == 4
        assert all(stage < configs[0].train.epochs for stage in experiment.stages)
        if what == "entropy":
            assert values == [0, 0.01, 0.1, 1]  # appendix E
            assert len({str(config.model) for config in configs}) == 1


# --- runs -------------------------------------------------------------------------------------------------


def run(monkeypatch, module, *arguments):
    """Run a script, for one epoch."""
    base = module._base

    def short(*, quick):
        values = base(quick=quick)
        values["train"] |= {"epochs": 1, "batch_size": 4}
        return values

    monkeypatch.setattr(module, "_base", short)
    monkeypatch.setattr(sys, "argv", [module.__name__, "--device", "cpu", *map(str, arguments)])
    module.main()


@pytest.mark.parametrize("module", [colon_cancer, speed_limits])
def test_data_are_asked_for(module, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="error: --data FOLDER"):
        run(monkeypatch, module, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_colon_cancer_in_small(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(colon_cancer, "IMAGES", 6)
    monkeypatch.setattr(colon_cancer, "write_colon_cancer", partial(made.write_colon_cancer, side=250))
    out, saved = tmp_path / "out", tmp_path / "saved"
    only = [word for name in ("U-10", "CNN 0.5", "Deep MIL", "ATS-10") for word in ("--only", name)]
    run(monkeypatch, colon_cancer, "--quick", "--runs", 1, "--out", out, "--save", saved, *only)
    printed = capsys.readouterr().out
    keys = ["U-10 0.25/1", "CNN 0.5", "Deep MIL 1", "ATS-10 0.25/1"]
    assert [result.method for result in read_results(out / RESULTS)] == keys
    assert "| ATS-50 | 0.25/1 |" in printed
    assert "0.093 ± 0.019" in printed
    assert {path.name for path in saved.iterdir()} == {
        "colon_cancer-quick.json", "colon_cancer-quick.md", "colon_cancer-quick-figure8-0.png",
    }  # fmt: skip
    # An ablation in the same folder, whose images are made already; then the published experiment, given the data.
    run(monkeypatch, colon_cancer, "--quick", "--ablation", "patches", "--only", "ATS, 5 patches", "--out", out)
    assert (out / "colon_cancer-patches-quick.png").read_bytes()[:4] == b"\x89PNG"
    assert len(read_results(out / RESULTS)) == len(keys) + 1
    full = ("--data", out / "made", "--out", tmp_path / "full")
    run(monkeypatch, colon_cancer, *full, "--only", "ATS-10", "--runs", 1)
    assert "the published images" in capsys.readouterr().out
    run(monkeypatch, colon_cancer, "--quick", "--table", saved / "colon_cancer-quick.json")
    assert "0.093 ± 0.019" in capsys.readouterr().out


@pytest.mark.slow
def test_speed_limits_in_small(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(speed_limits, "SIZE_YX", (192, 256))
    monkeypatch.setattr(speed_limits, "TRAIN", 6)
    monkeypatch.setattr(speed_limits, "TEST", 6)
    monkeypatch.setattr(speed_limits, "_epochs", lambda epochs, *, quick: {})
    out = tmp_path / "out"
    only = [word for name in ("U-5", "CNN 0.25", "Deep MIL", "ATS-5") for word in ("--only", name)]
    run(monkeypatch, speed_limits, "--quick", "--out", out, *only)
    keys = ["U-5 0.25/1", "CNN 0.25", "Deep MIL 1", "ATS-5 0.25/1"]
    assert [result.method for result in read_results(out / RESULTS)] == keys
    assert len(list(out.glob("speed_limits-quick-figure9-*.png"))) == 3
    assert "| Deep MIL | 1 |" in capsys.readouterr().out
    full = ("--data", out / "made", "--out", tmp_path / "full")
    run(monkeypatch, speed_limits, *full, "--only", "ATS-5", "--runs", 1)
    assert "the published images" in capsys.readouterr().out
