"""``init`` writes configurations that fit the slides they are made for, and that train."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from typer.testing import CliRunner

from nested_ats.networks.presets import PRESETS
from pipeline.cli.app import app
from pipeline.config import load_config
from storage import Slide, write_pyramid

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = os.environ.get("NESTED_ATS_DATA")
real_data = pytest.mark.skipif(not DATA, reason="NESTED_ATS_DATA does not name the real data")


def run(*words, code=0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(autouse=True)
def bare_machine(tmp_path, monkeypatch):
    """No weights lie in a cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pipeline.presets.cached", lambda repository: None)
    monkeypatch.chdir(tmp_path)


def write_manifest(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["slide_id", "path", "label"], *rows])
    return path


def init(kind, *words):
    run("init", kind, *words)
    return load_config(Path("config.yaml")), Path("config.yaml").read_text()


@pytest.mark.parametrize("kind", ["histology", "scenes"])
def test_the_examples_are_what_init_writes_for_no_slides(kind):
    assert init(kind)[1] == (EXAMPLES / f"{kind}.yaml").read_text()


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.library])
@pytest.mark.parametrize("longer", [3000, 30_000, 300_000])
def test_levels_fit_every_encoder_at_every_size(name, longer, monkeypatch):
    """The configuration itself checks that regions cover what is drawn, and patches their cells."""
    from pipeline import presets

    slides = presets.Slides(60, 60, (longer, longer // 2), 0.5, 3, None, ())
    monkeypatch.setattr(presets, "look_at", lambda entries: slides)
    text, _ = presets.write_preset("histology", ["any"], name, "a.csv")
    Path("config.yaml").write_text(text)
    model = load_config(Path("config.yaml")).model
    assert model.patch_size == PRESETS[name].pixels
    assert longer * 0.5 / model.mpp / model.levels[0].downsample <= 4096
    assert model.levels[-1].extent_l0 > model.patch_size - 16


def test_scale_epochs_and_levels_come_from_the_slides():
    for number, mpp in enumerate((0.25, 0.5)):
        write_pyramid(Path(f"{number}.ome.zarr"), np.zeros((3, 600, 900), np.uint8), mpp=mpp)
    rows = [[str(number), f"{number}.ome.zarr", "a"] for number in range(2)]
    config, text = init("histology", "--manifest", write_manifest(Path("a.csv"), rows))
    assert config.model.mpp == 0.5
    assert config.train.epochs == 100
    assert "Made for 2 slides of a.csv: up to 600 x 900 pixels, 3 channels, 0.5 micrometres" in text


@pytest.mark.parametrize("side", [150, 300, 500, 700, 1500])
def test_levels_are_those_that_small_slides_have(side):
    write_pyramid(Path("a.ome.zarr"), np.zeros((3, side, side // 2), np.uint8), mpp=0.5)
    config, _ = init("histology", "--manifest", write_manifest(Path("a.csv"), [["a", "a.ome.zarr", "a"]]))
    with Slide("a.ome.zarr") as slide:
        there = {level.downsample for level in slide.levels}
    assert {level.downsample for level in config.model.levels} <= there


def test_weights_on_this_machine_are_found(monkeypatch):
    Path("mobilenet_v2-b0353104.pth").touch()
    assert Path(init("histology")[0].model.encoder["weights"]) == Path.cwd() / "mobilenet_v2-b0353104.pth"
    monkeypatch.setattr("pipeline.presets.cached", lambda name: Path("x") if name == "owkin/phikon-v2" else None)
    run("init", "histology", "--overwrite")
    model = load_config(Path("config.yaml")).model
    assert (model.encoder, model.patch_size) == ("phikon-v2", 224)


def test_scenes_of_other_channels_train_their_own_network():
    write_pyramid(Path("0.ome.zarr"), np.zeros((4, 600, 900), np.uint16))
    config, _ = init("scenes", "--manifest", write_manifest(Path("a.csv"), [["0", "0.ome.zarr", "a"]]))
    assert (config.model.encoder, config.model.trainable, config.model.prior) == ("resnet", "all", "none")


def test_three_bands_of_scenes_are_chosen_and_measured():
    bands = np.random.default_rng(0).integers(100, 3000, (4, 600, 900)).astype(np.uint16)
    write_pyramid(Path("0.ome.zarr"), bands, channels=("B02", "B03", "B04", "B08"))
    manifest = write_manifest(Path("a.csv"), [["0", "0.ome.zarr", "a"]])
    config, _ = init("scenes", "--channels", "B04,B03,B02", "--manifest", manifest)
    assert (config.data.channels, config.model.encoder["name"], config.model.trainable) == (
        ("B04", "B03", "B02"),
        "mobilenet_v2",
        "none",
    )
    assert config.model.mean == pytest.approx(bands[[2, 1, 0]].mean((1, 2)) / 65535, rel=1e-3)
    assert config.model.std == pytest.approx(bands[[2, 1, 0]].std((1, 2)) / 65535, rel=1e-3)
    assert "init scenes a --manifest" in run("init", "scenes", "--overwrite", "--channels", "0", code=2).stderr


def test_what_goes_wrong_is_said():
    assert "no such preset; choose one of histology" in run("init", "pathology", code=2).stderr
    assert "choose one of uni" in run("init", "histology", "--encoder", "unicorn", code=2).stderr
    assert (
        "no slide can be opened"
        in run("init", "scenes", "--manifest", write_manifest(Path("a.csv"), [["0", "gone.tif", "a"]]), code=4).stderr
    )
    Path("config.yaml").write_text("mine: 1")
    assert "config.yaml: is there already" in run("init", "scenes", code=2).stderr
    assert yaml.safe_load(Path("config.yaml").read_text()) == {"mine": 1}
    write_pyramid(Path("0.ome.zarr"), np.zeros((3, 600, 900), np.uint8))
    rows = [["0", "0.ome.zarr", "a"], ["1", "gone.tif", "a"]]
    done = run("init", "scenes", "--overwrite", "--manifest", write_manifest(Path("a.csv"), rows), code=3)
    assert "1 of 2 failed" in done.stderr


def all_the_way(manifest, kind, *settings):
    """From files where they lie to a report, by the commands of the README."""
    run("init", kind, "--manifest", manifest)
    words = [word for setting in ("train.epochs=1", "data.test=0.5", *settings) for word in ("--set", setting)]
    run("train", "--manifest", manifest, "--out", "run", "--config", "config.yaml", *words)
    run("predict", "run", manifest, "--split", "test", "--out", "test")
    run("evaluate", "test")
    run("heatmap", "run", manifest, "--split", "test", "--limit", "1", "--out", "heatmaps")
    run("report", "run", "test", "--heatmaps", "heatmaps", "--out", "report.html")
    with open("test/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert not any(row["error"] for row in rows)
    [page] = Path("report_slides").iterdir()
    assert f"report_slides/{page.name}" in Path("report.html").read_text()
    assert "<img" in page.read_text()
    return rows


def rows_of(places):
    return [[place.stem, place, "ab"[number % 2]] for number, place in enumerate(places)]


@real_data
@pytest.mark.slow
class TestRealFiles:
    def test_a_folder_of_svs_and_a_table_become_a_report(self):
        with Slide(f"{DATA}/CMU-1-Small-Region.svs") as slide:
            _, height, width = 3, *slide.shape_yx
            places = []
            for number in range(8):
                y, x = (number // 4) * (height - 1200), (number % 4) * (width - 1200) // 4
                pixels = slide.read(0, (y, x, 1200, 1200)).transpose(1, 2, 0)
                places.append(Path(f"slide-{number}.svs"))
                description = "Aperio Image Library v11.2.1\n1200x1200 |AppMag = 20|MPP = 0.4990"
                tifffile.imwrite(
                    places[-1], pixels, tile=(256, 256), photometric="rgb", description=description, metadata=None
                )
        weights = f"model.encoder.weights={DATA}/weights/mobilenet_v2-b0353104.pth"
        all_the_way(write_manifest(Path("slides.csv"), rows_of(places)), "histology", weights, "model.prior=tissue")
        assert load_config(Path("config.yaml")).model.mpp == 0.5

    def test_a_folder_of_geotiffs_and_a_table_become_a_report(self):
        with tifffile.TiffFile(f"{DATA}/wsi-flavours/RGB.byte.tif") as tif:
            pixels = tif.asarray()
            tags = [
                (tag.code, tag.dtype, tag.count, tag.value, True) for tag in tif.pages[0].tags if tag.code > 33000
            ]
        pixels = pixels if pixels.shape[-1] == 3 else pixels.transpose(1, 2, 0)
        places = []
        for number in range(8):
            places.append(Path(f"scene-{number}.tif"))
            part = np.roll(pixels, 17 * number, 0)
            tifffile.imwrite(places[-1], part, tile=(256, 256), photometric="rgb", extratags=tags, metadata=None)
        weights = f"model.encoder.weights={DATA}/weights/mobilenet_v2-b0353104.pth"
        rows = all_the_way(write_manifest(Path("scenes.csv"), rows_of(places)), "scenes", weights)
        assert load_config(Path("config.yaml")).model.prior == "valid"
        assert all(float(row["background"]) < 0.5 for row in rows)

    def test_photographs_of_megapixels_become_a_report(self):
        places = sorted(Path(f"{DATA}/idrid-half").rglob("*.jpg"))[:8]
        assert len(places) == 8
        all_the_way(write_manifest(Path("eyes.csv"), rows_of(places)), "megapixel", "model.prior=tissue")
