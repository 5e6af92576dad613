"""Features are encoded once, ahead of trainings, and written as others read them; no file is taken for another's."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from nested_ats.models.kinds import build_model
from pipeline.cli.app import app
from pipeline.config import parse_config, plain
from pipeline.data.bags import SOURCE
from pipeline.data.manifest import read_manifest, write_manifest
from pipeline.data.slides import SlideImage
from pipeline.files import alone
from pipeline.results import extract as module
from pipeline.runs import read_metrics
from pipeline.training.train import train
from storage import Slide, write_pyramid

from .test_features import patches_read  # noqa: F401  a fixture

MODELS: dict[str, dict[str, Any]] = {
    "ats": {},
    "one level": {"levels": [{"downsample": 4, "samples": 3, "stride": 4, "channels": [4]}]},
    "deepmil": {"kind": "deepmil", "stride": 20},
    "uniform": {"kind": "uniform", "samples": 4, "cell": 20},
}


@pytest.fixture
def frozen(config, tmp_path):
    """Make the file of a configuration of some model with a frozen encoder."""

    def write(kind="ats", folder="kept", gigabytes=1.0, **model):
        values = plain(config)
        there = values["model"] if MODELS[kind].get("kind", "ats") == "ats" else {"patch_size": 24, "features": 8}
        values["model"] = {**there, **MODELS[kind], "trainable": "none", **model}
        values["train"]["epochs"] = 1
        values["data"]["features"] = folder and {"folder": str(tmp_path / folder), "gigabytes": gigabytes}
        (tmp_path / "frozen.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "frozen.yaml"

    return write


@pytest.fixture
def few(pyramids, tmp_path):
    """A manifest of four slides."""
    entries = read_manifest(pyramids)
    write_manifest(tmp_path / "few.csv", [*entries[:3], entries[-1]])
    return tmp_path / "few.csv"


def run(slides, config, *words, code=0):
    command = ["features", slides, "--config", config, *words]
    result = CliRunner().invoke(app, [str(word) for word in command], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def told(*words, **options):
    return json.loads(run(*words, "--json", **options).stdout)


class TestStore:
    @pytest.mark.parametrize("kind", MODELS)
    def test_a_training_reads_no_patch_afterwards(self, frozen, few, patches_read, tmp_path, kind):  # noqa: F811
        config = frozen(kind)
        done = told(few, config)
        assert all(one["patches"] == one["encoded"] > 0 for one in done)
        patches_read.clear()
        settings = parse_config(yaml.safe_load(config.read_text()), "test")
        train(read_manifest(few), settings, tmp_path / "run")
        assert patches_read == []
        assert read_metrics(tmp_path / "run")[-1]["stored"] == 1

    def test_nothing_is_read_twice(self, frozen, few, patches_read):  # noqa: F811
        config = frozen()
        first = told(few, config)
        patches_read.clear()
        again = told(few, config)
        assert patches_read == []
        assert again == [{**one, "encoded": 0} for one in first]
        assert f"4 slides, {sum(one['patches'] for one in first)} patches, 0 of" in run(few, config).stdout

    def test_what_was_interrupted_goes_on(self, frozen, few, patches_read, monkeypatch):  # noqa: F811
        config, original, calls = frozen(), module.Extractor.__call__, []

        def dies(self, entry):
            calls.append(entry.slide_id)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(self, entry)

        monkeypatch.setattr(module.Extractor, "__call__", dies)
        assert "run the same command again" in run(few, config, code=130).stderr
        encoded = [one["encoded"] > 0 for one in told(few, config)]
        assert encoded == [False, False, True, True]

    def test_a_slide_that_fails_is_named_and_the_others_go_on(self, frozen, few, tmp_path):
        entries = read_manifest(few)
        write_manifest(few, [replace(entries[0], path=str(tmp_path / "gone.tif")), *entries[1:]])
        result = run(few, frozen(), "--json", code=3)
        done = json.loads(result.stdout)
        assert [bool(one["error"]) for one in done] == [True, False, False, False]
        assert "gone.tif: does not exist" in result.stderr

    def test_a_store_that_is_full_is_said_and_gone_on_with(self, frozen, few):
        config = frozen(gigabytes=1e-5)
        result = run(few, config, code=4)
        assert "kept: full, with 1e-05 GB: not all features could be kept" in result.stderr
        assert "data.features.gigabytes" in result.stderr
        assert all(not one["error"] for one in told(few, frozen()))

    def test_a_disk_that_is_full_is_said(self, frozen, few, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pipeline.data.features.os.write", full)
        assert "No space left on device: not all features" in run(few, frozen(), code=4).stderr

    def test_of_cases(self, frozen, few, patches_read):  # noqa: F811
        entries = [replace(entry, case_id=("a", "a", "b", "c")[i]) for i, entry in enumerate(read_manifest(few))]
        write_manifest(few, entries)
        config = frozen(prior="valid")
        words = ["--set", "data.unit=case"]
        assert [one["slide_id"] for one in told(few, config, *words)] == ["a", "b", "c"]
        patches_read.clear()
        assert all(one["encoded"] == 0 for one in told(few, config, *words))
        assert patches_read == []

    @pytest.mark.ray
    @pytest.mark.slow
    def test_on_workers(self, frozen, few, ray_head):
        config = frozen()
        done = told(few, config, "--cluster", "local", "--workers", "2")
        assert all(one["encoded"] > 0 for one in done)
        assert all(one["encoded"] == 0 for one in told(few, config))

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ("model.trainable=all", "set it to none"),
            ("model={kind: cnn, trainable: none}", "set it to none"),
            ("data.features=null", "name a folder, or give --out"),
        ],
    )
    def test_what_cannot_be_kept(self, frozen, few, settings, words):
        assert words in run(few, frozen(), "--set", settings, code=2).stderr


class TestFiles:
    def test_tridents_layout(self, frozen, few, tmp_path):
        config = frozen("deepmil")
        run(few, config, "--out", tmp_path / "h5")
        entries = read_manifest(few)
        assert sorted(path.name for path in (tmp_path / "h5").glob("*.h5")) == sorted(
            f"{entry.slide_id}.h5" for entry in entries
        )
        settings = parse_config(yaml.safe_load(config.read_text()), "test")
        torch.manual_seed(settings.seed)
        model = build_model(settings.model, in_channels=3, classes=2).eval()
        for entry in entries:
            with h5py.File(tmp_path / "h5" / f"{entry.slide_id}.h5") as file:
                features, coords, about = file["features"][:], file["coords"][:], dict(file["coords"].attrs)
            assert (features.dtype, coords.dtype) == (np.float32, np.int64)
            assert about["name"] == entry.slide_id
            assert (about["patch_size"], about["patch_size_level0"], about["overlap"]) == (24, 24, 4)
            assert (about["level0_magnification"], about["target_magnification"]) == (20, 20)
            with Slide(entry.path) as slide:
                assert (about["level0_height"], about["level0_width"]) == slide.shape_yx
                boxes = torch.cat([torch.from_numpy(coords).flip(-1), torch.full((len(coords), 2), 24)], -1)
                pixels = SlideImage(slide).read(0, boxes)
            with torch.no_grad():
                expected = model.encoder(model._prepare(pixels))
            np.testing.assert_allclose(features, expected, atol=1e-5)
            assert len(coords) == len({tuple(place) for place in coords.tolist()})

    def test_coordinates_are_of_the_slides_own_pixels(self, frozen, tmp_path):
        write_pyramid(
            tmp_path / "a.ome.zarr", np.random.default_rng(0).integers(0, 255, (3, 400, 400), np.uint8), mpp=0.25
        )
        run(tmp_path / "a.ome.zarr", frozen("deepmil"), "--set", "model.mpp=0.5", "--out", tmp_path)
        with h5py.File(tmp_path / "a.h5") as file:
            about, coords = file["coords"].attrs, file["coords"][:]
            assert (about["patch_size_level0"], about["level0_magnification"], about["target_magnification"]) == (
                48,
                40,
                20,
            )
            assert coords.max() > 300

    def test_clams_layout(self, frozen, few, tmp_path):
        run(few, frozen("deepmil"), "--out", tmp_path / "clam", "--format", "clam")
        for entry in read_manifest(few):
            with h5py.File(tmp_path / "clam" / "h5_files" / f"{entry.slide_id}.h5") as file:
                features = file["features"][:]
            pt = torch.load(tmp_path / "clam" / "pt_files" / f"{entry.slide_id}.pt", weights_only=True)
            assert np.array_equal(pt.numpy(), features)

    def test_files_that_are_there_are_left_and_missing_ones_made(self, frozen, few, tmp_path):
        config = frozen(folder=None)
        run(few, config, "--out", tmp_path / "h5")
        files = sorted((tmp_path / "h5").glob("*.h5"))
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
        files[0].unlink()
        assert [one["encoded"] > 0 for one in told(few, config, "--out", tmp_path / "h5")].count(True) == 1
        assert {path: path.stat().st_mtime_ns for path in files[1:]} == {path: before[path][0] for path in files[1:]}
        with h5py.File(files[0]) as file:
            assert len(file["features"]) > 0

    def test_features_of_another_encoder_or_slide_are_refused(self, frozen, few, pyramids, tmp_path):
        config, out = frozen(), ("--out", tmp_path / "h5")
        run(few, config, *out)
        words = "has features of another encoder, slide or grid; give another --out, or --overwrite"
        assert run(few, config, *out, "--set", "seed=8", code=4).stderr.count(words) == 4
        entries = read_manifest(few)
        write_manifest(few, [replace(entries[0], path=entries[1].path), *entries[1:]])
        result = run(few, config, *out, code=3)
        assert result.stderr.count(words) == 1
        run(few, config, *out, "--overwrite")
        run(few, config, *out)

    @pytest.mark.parametrize(
        "spoil", [lambda path: path.write_bytes(path.read_bytes()[:900]), lambda path: path.write_text("x")]
    )
    def test_a_damaged_file_is_named(self, frozen, few, tmp_path, spoil):
        config, out = frozen(), tmp_path / "h5"
        run(few, config, "--out", out)
        path = out / "slide 1.h5"
        spoil(path)
        assert f"{path}: not a whole file of features" in run(few, config, "--out", out, code=3).stderr

    def test_a_file_of_others_is_not_written_over(self, frozen, few, tmp_path):
        config, out = frozen(), tmp_path / "h5"
        run(few, config, "--out", out)
        with h5py.File(out / "slide 1.h5", "a") as file:
            del file["features"].attrs[SOURCE]
        assert "was not written here" in run(few, config, "--out", out, code=3).stderr

    def test_two_at_once_are_refused(self, frozen, few, tmp_path):
        (tmp_path / "h5").mkdir()
        with alone(tmp_path / "h5" / "features.lock", "x"):
            assert "by another process" in run(few, frozen(), "--out", tmp_path / "h5", code=2).stderr

    def test_cases_have_no_files(self, frozen, few, tmp_path):
        words = ["--out", tmp_path / "h5", "--set", "data.unit=case"]
        assert "data.unit=slide" in run(few, frozen(prior="valid"), *words, code=2).stderr

    def test_without_h5py(self, frozen, few, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "h5py", None)
        assert "pip install 'nested-ats[h5]'" in run(few, frozen(), "--out", tmp_path / "h5", code=2).stderr


def change(path, **datasets):
    """Change the datasets of a file by functions of their content."""
    with h5py.File(path, "a") as file:
        for name, new in datasets.items():
            content, about = new(file[name][:]), dict(file[name].attrs)
            del file[name]
            file.create_dataset(name, data=content).attrs.update(about)


class TestFilesOfOthers:
    """The files are those that the command has written, without what tells that it has."""

    @pytest.fixture(params=["trident", "clam"])
    def extracted(self, few, tmp_path, request):
        """Extract features by a configuration."""

        def write(config):
            out = tmp_path / "given"
            run(few, config, "--out", out, "--format", request.param)
            files = sorted(out.rglob("*.h5"))
            assert len(files) == 4
            for path in files:
                with h5py.File(path, "a") as file:
                    del file["features"].attrs[SOURCE]
                    for name in list(file["coords"].attrs) if request.param == "clam" else ():
                        del file["coords"].attrs[name]
            return out, files

        return write

    @pytest.fixture
    def given(self, extracted, frozen):
        return extracted(frozen("deepmil", folder=None))

    @pytest.mark.parametrize("kind", ["deepmil", "one level"])
    def test_a_training_reads_no_patch_of_them(self, frozen, few, extracted, patches_read, tmp_path, kind):  # noqa: F811
        out, _ = extracted(frozen(kind, folder=None))  # random weights of one kind are not those of another
        config = frozen(kind)
        done = told(few, config, "--from", out)
        assert all(one["patches"] > 0 == one["missing"] == one["encoded"] for one in done)
        patches_read.clear()
        train(read_manifest(few), parse_config(yaml.safe_load(config.read_text()), "test"), tmp_path / "run")
        assert patches_read == []
        assert read_metrics(tmp_path / "run")[-1]["stored"] == 1

    def test_half_precision_is_near_enough_and_what_is_missing_is_counted(self, frozen, few, given):
        out, files = given
        for path in files:
            change(path, features=lambda own: own[::2].astype(np.float16), coords=lambda own: own[::2])
        config = frozen("deepmil")
        done = told(few, config, "--from", out)
        assert all(one["missing"] == one["patches"] // 2 for one in done)
        assert (
            f"{sum(one['missing'] for one in done)} of them not in the files"
            in run(few, config, "--from", out).stdout
        )
        assert all(one["encoded"] == one["patches"] // 2 for one in told(few, config))

    def test_of_another_encoder(self, frozen, few, given):
        result = run(few, frozen("deepmil"), "--from", given[0], "--set", "seed=8", code=4)
        assert result.stderr.count("are not those that model.encoder makes") == 4

    def test_of_another_slide_of_the_same_name(self, frozen, few, given):
        out, files = given
        other = files[0].read_bytes()  # slide 0 and slide 13 have other sizes than the rest
        with h5py.File(files[0]) as a, h5py.File(files[1]) as b:
            same = min(len(a["coords"]), len(b["coords"]))
            content = b["features"][:same]
        change(files[0], features=lambda own: np.concatenate([content, own[same:]]))
        config = frozen("deepmil")
        assert "are not those that model.encoder makes" in run(few, config, "--from", out, code=3).stderr
        files[0].write_bytes(other)
        assert all(one["encoded"] == 0 for one in told(few, config, "--from", out))

    def test_nothing_of_a_refused_file_is_kept(self, frozen, few, given):
        config = frozen("deepmil")
        run(few, config, "--from", given[0], "--set", "seed=8", code=4)
        assert all(one["encoded"] == one["patches"] for one in told(few, config, "--set", "seed=8"))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"coords": lambda own: own + 7}, "none of its"),
            ({"coords": lambda own: own + 1000}, "of another slide than this one"),
            ({"features": lambda own: own[:, :5]}, "5 features a patch, where model.encoder has 8"),
            ({"features": lambda own: own[:-1]}, "extract it again"),
            ({"features": lambda own: own * np.nan}, "not finite"),
            ({"coords": lambda own: own[:, :1]}, "extract it again"),
        ],
    )
    def test_what_does_not_fit(self, frozen, few, given, changes, words):
        out, files = given
        change(files[0], **changes)
        result = run(few, frozen("deepmil"), "--from", out, code=3)
        assert words in result.stderr
        assert str(files[0]) in result.stderr

    def test_patches_of_another_size(self, frozen, few, given):
        out, files = given
        result = run(few, frozen("deepmil", patch_size=28), "--from", out, code=4)
        told = "none of its" if files[0].parent.name == "h5_files" else "patches of 24 pixels of the finest level"
        assert result.stderr.count(told) == 4  # CLAM's do not tell their size

    def test_one_that_is_missing_or_damaged(self, frozen, few, given):
        out, files = given
        files[0].unlink()
        files[1].write_bytes(files[1].read_bytes()[:700])
        result = run(few, frozen("deepmil"), "--from", out, code=3)
        assert "does not exist, nor" in result.stderr
        assert f"{files[1]}: not a whole file" in result.stderr

    def test_a_store_that_is_full(self, frozen, few, given):
        assert (
            "not all features could be kept"
            in run(few, frozen("deepmil", gigabytes=1e-6), "--from", given[0], code=4).stderr
        )

    def test_options_that_do_not_go_together(self, frozen, few, tmp_path):
        words = ["--from", tmp_path, "--out", tmp_path / "out"]
        assert "leave out --out" in run(few, frozen("deepmil"), *words, code=2).stderr


@pytest.mark.parametrize("kind", ["ats", "one level"])
def test_only_tissue_is_encoded(frozen, few, kind):
    """And all that such a model draws is among it."""
    config = parse_config(yaml.safe_load(frozen(kind, prior="tissue").read_text()), "test")
    torch.manual_seed(0)
    model = build_model(config.model, in_channels=3, classes=2)
    entry = read_manifest(few)[0]
    everywhere = build_model(replace(config.model, prior="none"), in_channels=3, classes=2)
    with Slide(entry.path) as slide:
        image: Any = SlideImage(slide)
        image.mask = _Left()
        centers = model.patch_centers(image)
        assert 0 < len(centers) < len(everywhere.patch_centers(image))
        known = {tuple(box) for box in model.patch_boxes(centers).tolist()}
        for key in range(20):
            phase = model([image], torch.tensor([key])).phases[-1]
            assert {tuple(box) for box in model.patch_boxes(phase.centers_l0[0]).tolist()} <= known


class _Left:
    """Says that the left half of an image is tissue."""

    nbytes = 0

    def area(self, boxes_l0):
        top, left, bottom, right = boxes_l0.double().unbind(-1)
        return (bottom - top) * (right.clamp_max(70) - left).clamp_min(0)
