"""A cohort of feature files alone, without a slide, is trained on, predicted and evaluated."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nested_ats import read_batch
from nested_ats.models.kinds import build_model
from pipeline.cli.app import app
from pipeline.config import parse_config
from pipeline.data.bags import Bag
from pipeline.data.given import FeatureImage, lay_out
from pipeline.data.manifest import Entry, read_manifest
from pipeline.data.samples import open_sample
from pipeline.data.selection import select
from pipeline.errors import DataError, UsageError
from pipeline.results.classifier import Classifier
from pipeline.results.settings import prediction_settings
from pipeline.training.train import train

_DIM, _SIDE = 24, 256
OF_TILES = {"encoder": {"name": "given", "width": 16}, "patch_size": 1, "prior": "valid"}
MODELS = {
    "abmil": {**OF_TILES, "kind": "deepmil", "stride": 1, "attention_features": 16},
    "clam": {**OF_TILES, "kind": "deepmil", "stride": 1, "attention": "gated", "standardise": True},
    "ats": {
        **OF_TILES,
        "levels": [{"downsample": 1, "stride": 1, "samples": 32, "channels": [16]}],
        "standardise": True,
    },
    "uniform": {**OF_TILES, "kind": "uniform", "samples": 40, "cell": 1},
}


def write(path, features, coords, **about):
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features).attrs["name"] = about.pop("name", path.stem)
        file.create_dataset("coords", data=coords).attrs.update(about)


def tiles(rng, count, across=20, side=_SIDE):
    """Places of tiles of a slide with holes, x and y."""
    cells = rng.choice(across * across, count, replace=False)
    return np.stack([cells % across, cells // across], 1) * side + 512


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A manifest of 40 files; of one class a fifth of the tiles, wherever they lie, have a planted direction."""
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    sign = rng.normal(size=_DIM)
    rows = ["slide_id,path,label,split,case_id"]
    for number in range(40):
        label = ("normal", "tumour")[number % 2]
        coords = tiles(rng, int(rng.integers(40, 90)))
        features = 0.4 * rng.normal(size=(len(coords), _DIM)) + 1
        if label == "tumour":
            features[rng.choice(len(coords), len(coords) // 5, replace=False)] += 3 * sign
        size = {"level0_width": 20000, "level0_height": 20000, "patch_size_level0": _SIDE}
        savetodir = "/home/who/20x_256px_0px_overlap/features_uni_v1"
        write(folder / f"s{number}.h5", features.astype(np.float32), coords, savetodir=savetodir, **size)
        rows.append(f"s{number},s{number}.h5,{label},{'train' if number < 28 else 'test'},p{number // 4}{label}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder / "manifest.csv"


def configuration(kind="abmil", **data):
    course = {"epochs": 12, "batch_size": 4, "learning_rate": 5e-3, "average": 0}
    return parse_config({"model": MODELS[kind], "train": course, "data": data}, "test")


class TestImage:
    def test_every_tile_is_one_pixel_of_its_features(self, cohort):
        entry = read_manifest(cohort)[0]
        image = FeatureImage(entry)
        with h5py.File(entry.path) as file:
            features, coords = file["features"][:], file["coords"][:]
        cells = (coords[:, ::-1] - coords.min(0)[::-1]) // _SIDE
        boxes = torch.from_numpy(np.concatenate([cells, np.ones_like(cells)], 1))
        assert np.array_equal(image.read(0, boxes)[:, :, 0, 0].numpy(), features)
        assert int(image.mask.pixels.sum()) == len(features)

    def test_what_is_no_tile_is_zero_also_beyond_the_grid(self, tmp_path):
        write(tmp_path / "a.h5", np.ones((2, 3), np.float32), np.array([[0, 0], [512, 0]]), patch_size_level0=256)
        image = FeatureImage(Entry(slide_id="a", path=str(tmp_path / "a.h5")))
        seen = image.read(0, torch.tensor([[-1, -1, 3, 5]]))[0, 0]
        assert seen.nonzero().tolist() == [[1, 1], [1, 2]]  # the step is told by the tiles: 512

    def test_deepmil_sees_each_tile_once_and_nothing_else(self, cohort):
        config = configuration().model
        entry = read_manifest(cohort)[1]
        image = open_sample(entry, config)
        model = build_model(config, in_channels=_DIM, classes=2)
        centers = model.patch_centers(image)
        seen = read_batch([image], 1.0, model.patch_boxes(centers)[None])[0, :, :, 0, 0]
        assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, image.slide.features.tolist()))

    def test_tiles_of_contours_that_begin_anew_are_all_kept_and_near(self):
        """CLAM's contours have grids of their own, whose tiles can fall into one cell of ours."""
        one = np.stack(np.meshgrid(np.arange(6), np.arange(6)), -1).reshape(-1, 2) * 100
        other = one + np.array([540, 30])
        coords = np.concatenate([one, other])
        cells = lay_out(Bag(np.zeros((72, 1), np.float32), coords), "x")
        assert len({tuple(cell) for cell in cells.tolist()}) == 72
        assert np.abs(cells - (coords[:, ::-1] / 100)).mean() < 0.5

    @pytest.mark.parametrize("coords", [np.zeros((9, 2), int), np.arange(18).reshape(9, 2) ** 6])
    def test_coords_on_no_grid_are_refused(self, coords):
        with pytest.raises(DataError, match="grid"):
            lay_out(Bag(np.zeros((9, 1), np.float32), coords), "x")


class TestStudy:
    @pytest.mark.parametrize("kind", MODELS)
    def test_a_planted_sign_is_learned_without_a_slide(self, cohort, tmp_path, kind):
        run = tmp_path / "run"
        metrics, failures = train(read_manifest(cohort), configuration(kind), run)
        assert not failures
        assert "background" not in metrics["verdict"]
        for words in (["predict", run, cohort, "--split", "test", "--out", run / "test"], ["evaluate", run / "test"]):
            result = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
            assert result.exit_code == 0, result.output
        found = json.loads((run / "test" / "metrics.json").read_text())
        # Among uniform draws few are planted: its answer is better than chance and no more.
        assert found["auc"]["value"] > (0.6 if kind == "uniform" else 0.9)

    def test_a_case_is_one_sample(self, cohort, tmp_path):
        config = configuration("abmil", unit="case").model_copy(
            update={"train": configuration().train.model_copy(update={"epochs": 1})}
        )
        metrics, failures = train(read_manifest(cohort), config, tmp_path / "run")
        assert not failures
        assert math.isfinite(metrics["loss"])

    def test_the_model_remembers_whose_features_it_takes(self, cohort, tmp_path):
        config = configuration().model_copy(update={"train": configuration().train.model_copy(update={"epochs": 1})})
        train(read_manifest(cohort), config, tmp_path / "run")
        classifier = Classifier(prediction_settings(tmp_path / "run"))
        coords = tiles(np.random.default_rng(1), 50)
        place = tmp_path / "other.h5"
        write(place, np.zeros((50, _DIM), np.float32), coords, savetodir="x/features_phikon")
        row = classifier(Entry(slide_id="other", path=str(place)))
        assert "features of features_phikon, where the model's are of features_uni_v1" in row["error"]

    def test_init_writes_a_configuration_that_trains(self, cohort, tmp_path):
        out = tmp_path / "config.yaml"
        words = ["init", "features", "--manifest", str(cohort), "--out", str(out)]
        assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
        words = [
            "train",
            "--manifest",
            str(cohort),
            "--config",
            str(out),
            "--out",
            str(tmp_path / "run"),
            "--dry-run",
        ]
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        shown = CliRunner().invoke(app, ["info", str(cohort.parent / "s0.h5")], catch_exceptions=False).output
        assert f"{_DIM} features of" in shown
        assert "features_uni_v1" in shown


FAULTS = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:3000]), "not a whole file"),
    "no file of this kind": (lambda path: path.write_bytes(b"x" * 5000), "not a whole file"),
    "of another slide": (lambda path: again(path, name="b7"), "says that it is of slide b7"),
    "of another dimension": (lambda path: again(path, width=7), "7 channels, where 27 of 28 slides have 24"),
    "of another encoder": (lambda path: again(path, savetodir="y/features_virchow"), "features of features_virchow"),
    "beyond its slide": (lambda path: again(path, level0_width=600, level0_height=600), "beyond its slide's size"),
    "not finite": (lambda path: again(path, value=np.nan), "not finite"),
}


def again(path, width=_DIM, value=0.5, **about):
    coords = tiles(np.random.default_rng(0), 50)
    write(path, np.full((50, width), value, np.float32), coords, **about)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_named_and_the_others_go_on(cohort, tmp_path, fault):
    spoil, words = FAULTS[fault]
    entries = [entry for entry in read_manifest(cohort) if entry.split == "train"]
    path = tmp_path / "s0.h5"
    path.write_bytes((cohort.parent / "s0.h5").read_bytes())
    spoil(path)
    entries[0] = replace(entries[0], path=str(path))
    chosen = select(entries, configuration(), fail_fast=False)
    assert [failure.slide_id for failure in chosen.failures] == ["s0"]
    assert words in chosen.failures[0].error
    assert str(path) in chosen.failures[0].error


def test_features_and_images_are_not_taken_for_each_other(cohort, pyramids, config):
    with pytest.raises(DataError, match="an image, where model.encoder given takes"):
        select(read_manifest(pyramids), configuration(), fail_fast=True)
    with pytest.raises(DataError, match="a file of features, where the model looks at pixels"):
        select(read_manifest(cohort), config, fail_fast=True)


@pytest.mark.parametrize("change", [{"brightness": 0.1}, {"hed": 0.05}, {"jitter": 0.1}, {"warp": 0.1}])
def test_tiles_change_as_features_can(change):
    with pytest.raises(UsageError, match="flip and translation move tiles"):
        parse_config({"model": MODELS["abmil"], "train": {"augment": change}}, "test")


@pytest.mark.parametrize("change", [{"patch_size": 2}, {"prior": "none"}, {"mpp": 0.5}])
def test_a_model_of_tiles_has_one_pixel_a_tile(change):
    with pytest.raises(UsageError, match="each tile has one pixel"):
        parse_config({"model": {**MODELS["abmil"], **change}}, "test")
