"""The command line: exit codes, one clear line for every mistake, and a whole chain of commands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml
from pyarrow import parquet
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config import load_config, plain
from pipeline.data.manifest import read_manifest, write_manifest
from pipeline.results.classifier import Classifier
from pipeline.results.parts import part_files
from storage import Slide, write_pyramid, write_tiff

COMMANDS = [
    "init",
    "convert",
    "validate",
    "info",
    "tissue",
    "stats",
    "split",
    "train",
    "predict",
    "evaluate",
    "heatmap",
]
COMMANDS += ["calibrate", "report", "runs", "view", "doctor", "features", "synth", "synth signs"]
COMMANDS += ["model", "model card", "model export"]


NOT_JSON = ("view", "synth", "model", "model card")  # a server, groups of commands, and what is Markdown


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in NOT_JSON])
def test_every_command_that_ends_can_print_json(command):
    assert "--json" in CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"}).output


@pytest.fixture
def cli():
    """Run a command in this process; its result holds exit_code, stdout and stderr."""

    def run(*words):
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert "Traceback" not in result.output
        return result

    return run


def complaints(result):
    """Lines on standard error that are neither progress nor the next command."""
    return [line for line in result.stderr.splitlines() if not re.match(r"\w+: +\d+%|next: ", line)]


def following(result):
    """The command that is said to come next."""
    return [
        line.removeprefix("next: nested-ats ") for line in result.stderr.splitlines() if line.startswith("next: ")
    ]


@pytest.fixture
def small(config, tmp_path):
    """A configuration file of a model small enough to train at once."""
    values = plain(config)
    values["train"]["epochs"] = 1
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "small.yaml"


@pytest.fixture(scope="module")
def predicted(finished, pyramids, tmp_path_factory):
    """Folder of evaluated predictions."""
    folder = tmp_path_factory.mktemp("predicted")
    for words in (["predict", finished, pyramids, "--out", folder, "--split", "test"], ["evaluate", folder]):
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    return folder


def imported_by(*words, code=0, folder=None):
    """Modules that a command imports in a fresh interpreter; this one has imported everything."""
    program = """
import sys
from pipeline.cli.app import main
sys.argv = ["nested-ats", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print("\\n", end.code or 0, *sys.modules)
"""
    command = [sys.executable, "-c", program, *(str(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    ended, *names = done.stdout.splitlines()[-1].split()
    assert int(ended) == code, done
    return set(names)


class TestHelp:
    @pytest.mark.parametrize("command", ["", *COMMANDS])
    def test_of_every_command(self, cli, command):
        result = cli(*command.split(), "--help")
        assert result.exit_code == 0
        assert "Usage:" in result.stdout
        assert cli(*command.split(), "-h").stdout == result.stdout

    def test_no_command_is_missing_above(self, cli):
        names = [command.name or command.callback.__name__ for command in app.registered_commands]
        assert {*names, "synth", "model"} == {command for command in COMMANDS if " " not in command}

    def test_version(self, cli):
        result = cli("--version")
        assert (result.exit_code, result.stdout) == (0, f"nested-ats {version('nested-ats')}\n")

    def test_needs_no_heavy_package(self):
        heavy = {"torch", "zarr", "ray", "numpy", "pandas", "tifffile", "pyarrow", "sklearn", "matplotlib"}
        for words, code in (["--help"], 0), (["train", "--help"], 0), (["predict", "--nonsense"], 2):
            assert imported_by(*words, code=code) & heavy == set()

    def test_commands_that_need_no_model_do_not_wait_for_torch(self, tmp_path):
        pixels = np.zeros((64, 64, 3), dtype=np.uint8)
        write_tiff(tmp_path / "one.tif", [pixels], shape=pixels.shape, dtype="uint8", tile=64)
        pyramids = tmp_path / "pyramids"
        for words in ("info", "one.tif"), ("convert", "one.tif", "--out", pyramids), ("validate", pyramids):
            loaded = imported_by(*words, folder=tmp_path)
            assert "numpy" in loaded
            assert "torch" not in loaded

    def test_is_installed_as_a_module_and_exits_with_the_code(self, tmp_path):
        command = [sys.executable, "-m", "pipeline.cli", "info", "gone.tif"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 4
        assert done.stderr == "error: gone.tif: does not exist; check the path\n"


# (exit code, words of the message, command); {x} are the places of `places`.
MISTAKES = [
    (2, "Missing", "convert"),
    (2, "No such command", "convrt"),
    (2, "No such option", "info --nonsense x"),
    (4, "notes.tif: not an image of a kind that is read", "convert {notes} --out {new}"),
    (4, "gone.tif: does not exist", "convert {gone} --out {new}"),
    (2, "empty: no image here", "convert {empty} --out {new}"),
    (2, "gone.csv: cannot be read", "convert gone.csv --out {new}"),
    (2, "unknown column lable", "convert {wrong_manifest} --out {new}"),
    (2, "mpp must be positive", "convert {notes} --out {new} --mpp 0"),
    (2, "codec must be one of", "convert {notes} --out {new} --codec jpeg"),
    (2, "--workers", "convert {notes} --out {new} --workers 0"),
    (2, "cannot be made", "convert {notes} --out {notes}/below"),
    (4, "notes.tif: not an image of a kind that is read", "convert {notes} --out {new} --fail-fast"),
    (2, "empty: no slide here", "validate {empty}"),
    (4, "gone.tif: does not exist", "validate {gone}"),
    (4, "not an image of a kind that is read", "info {notes}"),
    (4, "empty", "info {empty}"),
    (2, "unknown column lable", "train --manifest {wrong_manifest} --out {new}"),
    (2, "row 2: label is missing", "train --manifest {no_label} --out {new}"),
    (2, "missing column label", "train --manifest {no_labels} --out {new}"),
    (2, "gone.csv: cannot be read", "train --manifest gone.csv --out {new}"),
    (2, "did you mean epochs", "train --manifest {pyramids} --out {new} --config {wrong_config}"),
    (2, "nested-ats split --folds 5 writes one", "train --manifest {pyramids} --out {new} --fold all"),
    (2, "there are no --labels to join", "train --manifest {pyramids} --out {new} --join case_id"),
    (2, "--missing maybe: choose fail, drop", "train --manifest {pyramids} --out {new} --missing maybe"),
    (2, "the manifest has no such column", "train --manifest {pyramids} --out {new} --target grade"),
    (2, "gone.csv: cannot be read", "train --manifest {pyramids} --out {new} --labels gone.csv"),
    (2, "gone.csv: cannot be read", "train --manifest {pyramids} --out {new} --splits gone.csv"),
    (2, "empty: no splits_0.csv", "train --manifest {pyramids} --out {new} --splits {empty} --fold 0"),
    (2, "no training run here", "calibrate {empty}"),
    (2, "no training run here or below", "runs {empty}"),
    (2, "gone.yaml: cannot be read", "train --manifest {pyramids} --out {new} --config gone.yaml"),
    (2, "write it as key=value", "train --manifest {pyramids} --out {new} --set train.epochs"),
    (2, "unknown key train.epoch", "train --manifest {pyramids} --out {new} --set train.epoch=3"),
    (2, "--workers 2: several workers need", "train --manifest {pyramids} --out {new} --workers 2"),
    (2, "--workers 4-1: give a number or a range", "train --manifest {pyramids} --out {new} --workers 4-1"),
    (2, "--workers 4-: give a number or a range", "train --manifest {pyramids} --out {new} --workers 4-"),
    (2, "--device gpu: choose auto, cpu or cuda", "train --manifest {pyramids} --out {new} --device gpu"),
    (2, "no GPU", "train --manifest {pyramids} --out {new} --device cuda"),
    (4, "no level at downsample 16", "train --manifest {pyramids} --out {new}"),
    (2, "cannot be made", "train --manifest {pyramids} --out {notes}/below --config {small}"),
    (2, "not empty and not a training run", "train --manifest {pyramids} --out {full} --config {small}"),
    (2, "has splits or folds already", "split {pyramids} --out {new}.csv"),
    (2, "gone.csv: cannot be read", "split gone.csv --out {new}.csv"),
    (2, "row 2: label is missing", "split {no_label} --out {new}.csv"),
    (2, "name it .csv", "split {unsplit} --out {new}.parquet"),
    (2, "unsplit.csv: is there already", "split {unsplit} --out {unsplit}"),
    (2, "leave nothing to train on", "split {unsplit} --out {new}.csv --validation 0.5 --test 0.5"),
    (2, "--spatial-block", "split {unsplit} --out {new}.csv --spatial-block 0"),
    (4, "1 of 1 scenes have no place on the Earth", "split {unsplit} --out {new}.csv --spatial-block 5"),
    (2, "no training run here", "predict {empty} {pyramids} --out {new}"),
    (2, "no training run here", "predict gone {pyramids} --out {new}"),
    (2, "training has not finished", "predict {unfinished} {pyramids} --out {new}"),
    (2, "no slide in split 'tset'", "predict {run} {pyramids} --out {new} --split tset"),
    (2, "--samples 3,x: give whole numbers", "predict {run} {pyramids} --out {new} --samples 3,x"),
    (2, "2 levels; give that many", "predict {run} {pyramids} --out {new} --samples 3"),
    (2, "--draws", "predict {run} {pyramids} --out {new} --draws 0"),
    (2, "--workers 2: several workers need", "predict {run} {pyramids} --out {new} --workers 2"),
    (2, "--device tpu: choose", "predict {run} {pyramids} --out {new} --device tpu"),
    (2, "no GPU", "predict {run} {pyramids} --out {new} --device cuda"),
    (2, "cannot be made", "predict {run} {pyramids} --out {notes}/below"),
    (4, "not an image of a kind that is read", "predict {run} {notes} --out {new}"),
    (4, "gone", "predict {run} gone.ome.zarr --out {new}"),
    (2, "would both be slide x", "predict {run} a/x.ome.zarr b/x.ome.zarr --out {new}"),
    (2, "no predictions.parquet here", "evaluate {empty}"),
    (2, "no predictions.parquet here", "evaluate gone"),
    (2, "0 slides are there", "evaluate {predicted} --split val"),
    (2, "--seed", "evaluate {predicted} --seed -1"),
    (2, "--device tpu: choose", "heatmap {run} {pyramids} --out {new} --device tpu"),
    (2, "training has not finished", "heatmap {unfinished} {pyramids} --out {new}"),
    (2, "--limit", "heatmap {run} {pyramids} --out {new} --limit 0"),
    (2, "cannot be made", "heatmap {run} {pyramids} --out {notes}/below"),
    (4, "gone", "heatmap {run} gone.ome.zarr --out {new}"),
    (2, "no training run here", "report {empty} {predicted} --out {new}"),
    (2, "no predictions.parquet here", "report {run} {empty} --out {new}"),
    (2, "no heatmaps here", "report {run} {predicted} --heatmaps {empty} --out {new}"),
    (2, "cannot be made", "report {run} {predicted} --out {notes}/below/page.html"),
    (2, "cannot be written", "report {run} {predicted} --out {empty}"),
    (2, "--seed", "synth signs --out {new} --count 1 --size 64 --seed -3"),
    (2, "--compression", "synth signs --out {new} --count 1 --size 64 --compression foo"),
    (2, "unknown label '60'", "synth signs --out {new} --count 1 --size 64 --label 60"),
    (2, "--size", "synth signs --out {new} --count 1 --size 8"),
    (2, "cannot be made", "synth signs --out {notes} --count 1 --size 64"),
]


@pytest.fixture
def places(tmp_path, monkeypatch, pyramids, finished, predicted, small):
    """Good and bad inputs by name."""
    names = {"pyramids": pyramids, "run": finished, "predicted": predicted, "small": small}
    texts = {
        "notes.tif": "no image",
        "wrong_manifest.csv": "slide_id,path,lable\na,b,c\n",
        "no_label.csv": "slide_id,path,label\na,b,\n",
        "no_labels.csv": "slide_id,path\na,b\n",
        "unsplit.csv": "slide_id,path,label\na,notes.tif,c\n",
        "wrong_config.yaml": "train: {epochs_: 3}\n",
        "full/precious.txt": "mine",
    }
    for name in ("empty", "full"):
        names[name] = tmp_path / name
        names[name].mkdir()
    for name, text in texts.items():
        path = tmp_path / name
        path.write_text(text)
        names.setdefault(path.stem, path)
    names["unfinished"] = tmp_path / "unfinished"
    shutil.copytree(finished, names["unfinished"], ignore=shutil.ignore_patterns("model", "tensorboard"))
    monkeypatch.chdir(tmp_path)
    return names | {"new": tmp_path / "new", "gone": tmp_path / "gone.tif"}


class TestMistakes:
    @pytest.mark.parametrize(("code", "words", "command"), MISTAKES, ids=[mistake[2] for mistake in MISTAKES])
    def test_are_named_in_one_line(self, cli, places, code, words, command):
        if "no GPU" in words:
            import torch

            if torch.cuda.is_available():
                pytest.skip("this machine has a GPU")
        result = cli(*(part.format(**places) for part in command.split()))
        assert result.exit_code == code
        assert result.stdout == "" or code == 4
        lines = complaints(result)
        if lines[0].startswith("Usage:"):  # typer's own, in a frame
            assert words in " ".join(re.sub(r"[│\s]+", " ", line) for line in lines)
        else:
            assert len(lines) == 1
            assert lines[0].startswith("error: ")
            assert words in lines[0]

    def test_what_was_there_is_left_alone(self, cli, places):
        cli("train", "--manifest", places["pyramids"], "--out", places["full"], "--config", places["small"])
        assert [path.name for path in places["full"].iterdir()] == ["precious.txt"]

    def test_a_bug_is_shown_whole(self, monkeypatch, pyramids):
        def bug(*_, **__):
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr("pipeline.results.evaluate.evaluate", bug)
        result = CliRunner().invoke(app, ["evaluate", str(pyramids)])
        assert result.exit_code == 1
        assert isinstance(result.exception, ZeroDivisionError)


class TestSomeFailed:
    def test_convert(self, cli, places, tmp_path):
        assert cli("synth", "signs", "--out", "set", "--count", 2, "--size", 128).exit_code == 0
        (tmp_path / "set" / "images" / "bad.tif").write_text("no image")
        result = cli("convert", "set/images", "--out", "out")
        assert result.exit_code == 3
        title, row = complaints(result)
        assert title == "1 of 3 failed:"
        assert row.startswith(f"  bad  {tmp_path}/set/images/bad.tif: not an image of a kind that is read; give TIFF")
        assert "2 converted" in result.stdout
        assert (
            "0 converted (0 MB raw, 0 MB stored), 2 up to date" in cli("convert", "set/images", "--out", "out").stdout
        )
        assert len(read_manifest(tmp_path / "out" / "manifest.csv")) == 2

    def test_predict_and_heatmap(self, cli, places, pyramids, tmp_path):
        good = pyramids.parent / "slide 10.ome.zarr"
        for command in ("predict", "heatmap"):
            result = cli(command, places["run"], good, "gone.ome.zarr", "--out", command)
            assert result.exit_code == 3
            assert complaints(result)[0] == "1 of 2 failed:"
            assert complaints(result)[1].startswith("  gone  ")
            assert "does not exist" in complaints(result)[1]

    def test_train_and_fail_fast(self, cli, places, pyramids, tmp_path):
        text = pyramids.read_text().replace("slide 1.ome.zarr", "gone.ome.zarr")
        (pyramids.parent / "some.csv").write_text(text)
        words = ["train", "--manifest", pyramids.parent / "some.csv", "--config", places["small"], "--out", "run"]
        result = cli(*words, "--fail-fast")
        assert (result.exit_code, len(complaints(result))) == (4, 1)
        assert "slide slide 1: " in complaints(result)[0]
        result = cli(*words)
        assert result.exit_code == 3
        assert complaints(result)[0] == "1 of 14 failed:"
        assert "cross_entropy" in result.stdout

    def test_info(self, cli, places, pyramids):
        result = cli("info", places["notes"], pyramids.parent / "slide 0.ome.zarr", "--json")
        assert result.exit_code == 3
        assert [about["kind"] for about in json.loads(result.stdout)] == ["pyramid"]
        assert complaints(result)[0] == "1 of 2 failed:"

    def test_info_of_an_encoder(self, cli):
        text = cli("info", "virchow2").stdout
        assert "2560 features (token and mean), needs timm" in text
        assert "patches of 224 pixels at 0.25, 0.5, 1, 2 micrometres per pixel" in text
        assert "https://huggingface.co/paige-ai/Virchow2" in text
        [about] = json.loads(cli("info", "conch", "--json").stdout)
        assert (about["patch_size"], about["features"]) == (448, 512)
        assert "CONCH" in about["needs"]


class TestInterrupts:
    def test_predict_keeps_what_has_finished(self, cli, places, pyramids, monkeypatch, tmp_path):
        original, calls = Classifier.__call__, []

        def dies(self, entry):
            calls.append(entry.slide_id)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(self, entry)

        monkeypatch.setattr(Classifier, "__call__", dies)
        words = ["predict", places["run"], pyramids, "--out", "out", "--split", "test"]
        result = cli(*words)
        assert result.exit_code == 130
        assert len(complaints(result)) == 1
        assert "run the same command again" in complaints(result)[0]
        assert sum(parquet.read_metadata(path).num_rows for path in part_files(tmp_path / "out" / "parts")) == 2
        assert cli(*words).exit_code == 0
        assert len(calls) == 5


class TestJson:
    def test_info(self, cli, tmp_path):
        write_pyramid(tmp_path / "a.ome.zarr", np.zeros((2, 65, 40), np.uint16), mpp=0.5, channels=("x", "y"))
        [about] = json.loads(cli("info", tmp_path / "a.ome.zarr", "--json").stdout)
        assert (about["size"], about["channels"], about["dtype"], about["mpp"]) == (
            [65, 40],
            ["x", "y"],
            "uint16",
            0.5,
        )
        assert [level["size"] for level in about["levels"]] == [[65, 40], [33, 20]]
        assert [level["downsample"] for level in about["levels"]] == [1, 2]
        text = cli("info", tmp_path / "a.ome.zarr").stdout
        assert "pyramid, 65 x 40 pixels, 2 channels of uint16, 0.5 micrometres per pixel" in text

    def test_info_of_an_image(self, cli, tmp_path):
        cli("synth", "signs", "--out", tmp_path / "set", "--count", 1, "--size", 70)
        path = tmp_path / "set" / "images" / "signs-00000.tif"
        [about] = json.loads(cli("info", path, "--json").stdout)
        assert (about["kind"], about["size"], about["channels"]) == ("image", [70, 70], ["R", "G", "B"])
        assert about["mpp"] is None
        assert "pixel size unknown" in cli("info", path).stdout

    @pytest.mark.data
    def test_info_and_validate_of_a_dicom_folder(self, cli, data, tmp_path):
        pytest.importorskip("openslide")
        folder = data / "wsi-flavours" / "dicom-cmu-1-small-region"
        [about] = json.loads(cli("info", folder, "--json").stdout)
        assert (about["kind"], about["size"]) == ("DICOM series", [2967, 2220])
        (tmp_path / "slides.csv").write_text(f"slide_id,path\na,{folder}\n")
        assert cli("validate", tmp_path / "slides.csv").exit_code == 0

    def test_info_of_urls(self, cli, tmp_path, monkeypatch):
        """A URL with the name of an image is opened as one, any other as a pyramid."""
        opened = []
        cli("synth", "signs", "--out", tmp_path / "set", "--count", 1, "--size", 70)
        path = tmp_path / "set" / "images" / "signs-00000.tif"

        def open_here(location):
            opened.append(location)
            return Slide(path)

        monkeypatch.setattr("pipeline.info.Slide", open_here)
        urls = ["http://127.0.0.1:9/a.svs?key=1", "http://127.0.0.1:9/b.PNG"]
        found = json.loads(cli("info", *urls, "--json").stdout)
        assert [(about["path"], about["kind"]) for about in found] == [(url, "image") for url in urls]
        assert opened == urls

    def test_evaluate(self, cli, predicted):
        result = cli("evaluate", predicted, "--json")
        found = json.loads(result.stdout, parse_constant=pytest.fail)
        assert found["slides"] == 4
        assert found == json.loads((predicted / "metrics.json").read_text())
        text = cli("evaluate", predicted).stdout
        assert f"{found['accuracy']['value']:.3f}" in text

    def test_train_and_predict(self, cli, pyramids, small, tmp_path):
        entries = read_manifest(pyramids)
        entries[0] = replace(entries[0], path=str(tmp_path / "gone.tif"))
        write_manifest(tmp_path / "some.csv", entries)
        words = ["train", "--manifest", tmp_path / "some.csv", "--config", small, "--out", tmp_path / "run", "--json"]
        result = cli(*words)
        assert result.exit_code == 3
        told = json.loads(result.stdout, parse_constant=pytest.fail)
        assert (told["total"], told["failed"], told["run"]) == (14, 1, str(tmp_path / "run"))
        assert [each["name"] for each in told["failures"]] == ["slide 0"]
        assert told["metrics"]["cross_entropy"] > 0
        assert cli(*words, "--dry-run").exit_code == 2
        result = cli("predict", tmp_path / "run", tmp_path / "some.csv", "--out", tmp_path / "out", "--json")
        told = json.loads(result.stdout, parse_constant=pytest.fail)
        assert (told["total"], told["failed"], result.exit_code) == (14, 1, 3)
        assert told["seen"]["train"] == 9
        assert len(Path(told["table"]).read_text().splitlines()) == 15

    def test_train_by_folds(self, cli, pyramids, small, tmp_path):
        entries = [replace(entry, split="", fold=str(i // 2 % 2)) for i, entry in enumerate(read_manifest(pyramids))]
        write_manifest(tmp_path / "folds.csv", entries)
        words = ["--config", small, "--folds", "all", "--out", tmp_path / "runs", "--json"]
        told = json.loads(cli("train", "--manifest", tmp_path / "folds.csv", *words).stdout)
        assert [each["fold"] for each in told["folds"]] == ["0", "1"]
        assert all((Path(each["run"]) / "model").is_dir() for each in told["folds"])


class TestDryRun:
    def test_prints_a_configuration_and_touches_nothing(self, cli, pyramids, small, tmp_path):
        words = ["train", "--manifest", pyramids, "--out", tmp_path / "run", "--config", small, "--dry-run"]
        result = cli(*words, "--set", "train.epochs=7", "--set", "model.levels.1.samples=5")
        assert result.exit_code == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["small.yaml"]
        (tmp_path / "printed.yaml").write_text(result.stdout)
        printed = load_config(tmp_path / "printed.yaml")
        assert printed == load_config(small, ["train.epochs=7", "model.levels.1.samples=5"])
        assert printed.train.epochs == 7

    def test_without_a_file(self, cli, pyramids, tmp_path):
        result = cli("train", "--manifest", pyramids, "--out", tmp_path / "run", "--dry-run")
        assert result.exit_code == 4  # they lack level 16
        assert "no level at downsample 16" in result.stderr
        (tmp_path / "printed.yaml").write_text(result.stdout)
        assert load_config(tmp_path / "printed.yaml") == load_config(None)

    def test_says_what_a_training_would_use_and_cost(self, cli, pyramids, small, tmp_path):
        words = ["train", "--manifest", pyramids, "--out", tmp_path / "run", "--config", small, "--dry-run"]
        result = cli(*words, "--set", "train.epochs=7")
        said = [line.removeprefix("# ") for line in result.stdout.splitlines() if line.startswith("#")]
        assert said[:4] == [
            "class bar: 5 train, 2 test",
            "class box: 5 train, 2 test",
            "14 slides: levels 4x, 2x, 1x",
            "updates: 3 an epoch, 21 in all",
        ]
        patterns = [
            r"a step of 4 slides: reads 0\.\d MB, takes [\d.e-]+ s",
            r"an epoch: .* s, all: .* s, without validation",
            r"peak: [\d,]+ MB of memory; measured in one step of one worker on cpu",
        ]
        assert len(said) == 4 + len(patterns)
        for line, pattern in zip(said[4:], patterns, strict=True):
            assert re.fullmatch(pattern, line), line

    def test_names_slides_as_training_would(self, cli, pyramids, small, tmp_path):
        entries = read_manifest(pyramids)
        entries[0] = replace(entries[0], path=str(tmp_path / "gone.ome.zarr"))
        write_pyramid(tmp_path / "grey.ome.zarr", np.zeros((1, 120, 150), np.uint8))
        entries[1] = replace(entries[1], path=str(tmp_path / "grey.ome.zarr"))
        write_manifest(tmp_path / "some.csv", entries)
        words = ["train", "--manifest", tmp_path / "some.csv", "--out", tmp_path / "run", "--config", small]
        looked = cli(*words, "--dry-run")
        assert not (tmp_path / "run").exists()
        trained = cli(*words)
        assert looked.exit_code == trained.exit_code == 3
        assert complaints(looked)[-3:] == complaints(trained)[-3:]
        assert complaints(looked)[-3] == "2 of 14 failed:"

    @pytest.mark.parametrize("folder", ["{full}", "{notes}/below", "{notes}"])
    def test_refuses_a_folder_as_training_would(self, cli, places, pyramids, small, folder):
        words = ["train", "--manifest", pyramids, "--out", folder.format(**places), "--config", small]
        looked = cli(*words, "--dry-run")
        assert looked.exit_code == cli(*words).exit_code == 2

    def test_of_the_run_that_is_there(self, cli, finished, pyramids, config, tmp_path):
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(plain(config)))
        words = ["train", "--manifest", pyramids, "--out", finished, "--config", tmp_path / "own.yaml", "--dry-run"]
        before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
        assert cli(*words).exit_code == 0
        other = cli(*words, "--set", "train.batch_size=5")
        assert other.exit_code == 2
        assert "holds a run of another configuration" in other.stderr
        assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before

    def test_finds_mistakes(self, cli, places):
        result = cli("train", "--manifest", places["no_label"], "--out", places["new"], "--dry-run")
        assert result.exit_code == 2


def test_a_whole_chain(cli, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def ok(*words):
        result = cli(*words)
        assert result.exit_code == 0, result.output
        assert not complaints(result)
        said.extend(following(result))
        return result.stdout

    said: list[str] = []
    manifest = ok("synth", "signs", "--out", "set", "--count", 8, "--size", 192, "--test", 0.5).strip()
    assert manifest == "set/manifest.csv"
    assert "8 converted" in ok("convert", manifest, "--out", "pyramids")
    labels = {entry.slide_id: entry.label for entry in read_manifest(tmp_path / manifest)}
    entries = read_manifest(tmp_path / "pyramids" / "manifest.csv", labelled=True)
    assert {entry.slide_id: entry.label for entry in entries} == labels
    trained = ok("train", "--manifest", "pyramids/manifest.csv", "--out", "run", "--config", small)
    assert "accuracy" in trained
    ok("train", "--manifest", "pyramids/manifest.csv", "--out", "run", "--config", small)
    table = ok("predict", "run", "pyramids/manifest.csv", "--out", "predictions", "--split", "test").strip()
    assert len((tmp_path / table).read_text().splitlines()) == 5
    assert "accuracy" in ok("evaluate", "predictions", "--split", "test")
    assert said == [
        "init PRESET --manifest pyramids/manifest.csv",
        *["predict run pyramids/manifest.csv --split test --out run/test"] * 2,
        "evaluate predictions",
        "report RUN predictions --out report.html",
    ]
    words = ("heatmap", "run", "pyramids/manifest.csv", "--out", "maps", "--split", "test", "--limit", 2)
    assert len(ok(*words).splitlines()) == 2
    page = ok("report", "run", "predictions", "--heatmaps", "maps", "--out", "page.html").strip()
    assert "page_slides/" in (tmp_path / page).read_text()
    assert len(list((tmp_path / "page_slides").glob("*.html"))) == 2
    shutil.move(tmp_path / "pyramids", tmp_path / "moved")  # a set may move: its paths are relative
    ok("train", "--manifest", "moved/manifest.csv", "--out", "run", "--config", small, "--set", "train.epochs=2")
