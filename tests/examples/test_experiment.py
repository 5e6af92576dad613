"""The engine of the paper's experiments: runs in stages, what it keeps, its table and its figures."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import asdict, replace

import megapixel_mnist
import numpy as np
import pytest
from conduct import command_line, conduct, save
from experiment import (
    RESULTS,
    Experiment,
    Method,
    Paper,
    Point,
    Result,
    attention_maps,
    mean_and_error,
    measure_again,
    merge,
    read_results,
    run_experiment,
    run_folder,
    table,
    take_results,
)
from figures import (
    AttentionMap,
    attention_beside,
    attention_evolution,
    attention_grid,
    error_and_loss_against_time,
    normalise,
    over_image,
    weigh,
)

from nested_ats import Cost, ImageModel, load_model
from pipeline.data.manifest import Entry, read_manifest, write_manifest
from pipeline.errors import UsageError
from pipeline.runs import MODEL, read_metrics, read_run
from storage import write_pyramid

ATS = {
    "levels": [{"downsample": 2, "samples": 2, "stride": 4, "channels": [4]}],
    "patch_size": 24,
    "features": 4,
}
EXPERIMENT = Experiment(
    name="spots",
    title="Spots: 12 images",
    base={"train": {"epochs": 3, "batch_size": 4}, "predict": {"draws": 1}},
    methods=(
        Method("ATS-2", "0.5/1", {"model": ATS}, Paper("0.1", "0.2 ± 0.1", "3 ms", "4 MB")),
        Method("CNN", "1", {"model": {"kind": "cnn", "encoder": "resnet8", "features": 8}, "train": {"epochs": 2}}),
    ),
    runs=1,
    stages=(1,),
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Twelve images of 64 x 80 pixels, four of them to test; a class is the side that a bright square lies on."""
    folder = tmp_path_factory.mktemp("spots")
    rng = np.random.default_rng(0)
    entries = []
    for i in range(12):
        label = ("left", "right")[i % 2]
        pixels = rng.integers(0, 40, (1, 64, 80), dtype=np.uint8)
        x = 12 if label == "left" else 56
        pixels[:, 20:32, x : x + 12] = 250
        path = folder / f"{i}.ome.zarr"
        write_pyramid(path, pixels)
        entries.append(Entry(slide_id=f"{i}", path=str(path), label=label, split="train" if i < 8 else "test"))
    write_manifest(folder / "manifest.csv", entries)
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def finished(manifest, tmp_path_factory):
    """Folder and results of the experiment; nothing may change them."""
    out = tmp_path_factory.mktemp("out")
    return out, run_experiment(EXPERIMENT, manifest, out, attention_of=["9"], device="cpu")


# --- runs -------------------------------------------------------------------------------------------------


def test_every_method_is_trained_tested_and_measured(finished):
    out, results = finished
    assert [(r.method, r.seed, [p.epoch for p in r.points]) for r in results] == [
        ("ATS-2 0.5/1", 0, [1, 3]),
        ("CNN 1", 0, [1, 2]),
    ]
    for result in results:
        lines = read_metrics(run_folder(out, result.method, 0) / "run")
        assert result.last.train_loss == lines[-1]["cross_entropy"]
        assert result.last.seconds == pytest.approx(sum(line["seconds"] for line in lines))
        assert result.points[0].seconds < result.last.seconds
        assert result.last.test_error in {0, 0.25, 0.5, 0.75, 1}
        assert result.sample_seconds > 0
        assert result.peak_bytes > 1000
        assert result.title == "Spots: 12 images"
        assert "torch" in result.versions
    assert read_results(out / RESULTS) == results


def test_the_test_error_is_that_of_the_predictions(finished):
    out, results = finished
    for result in results:
        rows = (run_folder(out, result.method, 0) / "predictions" / "predictions.csv").read_text().splitlines()
        header, cells = rows[0].split(","), [row.split(",") for row in rows[1:]]
        wrong = [row[header.index("label")] != row[header.index("prediction")] for row in cells]
        assert len(wrong) == 4
        assert result.last.test_error == pytest.approx(np.mean(wrong))


def test_training_in_stages_gives_the_model_that_training_at_once_gives(finished, manifest, tmp_path):
    out, results = finished
    alone = replace(EXPERIMENT, stages=(), methods=EXPERIMENT.methods[:1])
    once = run_experiment(alone, manifest, tmp_path, device="cpu")[0]
    assert [point.epoch for point in once.points] == [3]
    assert once.last.train_loss == results[0].last.train_loss
    models = [load_model(run_folder(o, once.method, 0) / "run" / MODEL)[0] for o in (out, tmp_path)]
    for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
        assert (a == b).all()


def test_runs_of_a_machine_that_is_gone_are_taken_over(finished, manifest, monkeypatch, tmp_path):
    """Their results were saved; what was run since then stays, and other configurations are run again."""
    _, results = finished
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps([asdict(result) for result in results]))
    take_results(tmp_path / "out", saved)
    monkeypatch.setattr("experiment.train", lambda *_, **__: pytest.fail("trained again"))
    assert run_experiment(EXPERIMENT, manifest, tmp_path / "out", device="cpu") == results
    saved.write_text(json.dumps([asdict(replace(result, peak_bytes=1)) for result in results]))
    take_results(tmp_path / "out", saved)
    assert read_results(tmp_path / "out" / RESULTS) == results
    saved.write_text(json.dumps([asdict(replace(result, fingerprint="other")) for result in results]))
    take_results(tmp_path / "new", saved)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        run_experiment(EXPERIMENT, manifest, tmp_path / "new", device="cpu")
    take_results(tmp_path / "none", tmp_path / "gone.json")
    assert read_results(tmp_path / "none" / RESULTS) == []


def test_results_are_told_as_they_come(manifest, tmp_path):
    told = []
    results = run_experiment(EXPERIMENT, manifest, tmp_path, device="cpu", on_results=told.append)
    assert told == [results[:1], results]


def test_finished_runs_are_not_done_again_and_others_are_added(finished, manifest, monkeypatch, tmp_path):
    out, results = finished
    monkeypatch.setattr("experiment.train", lambda *_, **__: pytest.fail("trained again"))
    assert run_experiment(EXPERIMENT, manifest, out, device="cpu") == results
    assert run_experiment(EXPERIMENT, manifest, out, only=["CNN"], device="cpu") == results
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        run_experiment(replace(EXPERIMENT, runs=2), manifest, out, only=["ATS-2"], device="cpu")
    assert read_results(out / RESULTS) == results


def test_what_another_process_added_meanwhile_is_kept(finished, manifest, monkeypatch, tmp_path):
    _, results = finished
    other = replace(results[1], fingerprint="of another process")

    def measure(*_):
        (tmp_path / RESULTS).write_text(json.dumps([asdict(other)]))
        return Cost(1.0, 1)

    monkeypatch.setattr("experiment._train_in_stages", lambda *_: results[0].points)
    monkeypatch.setattr("experiment._measure", measure)
    found = run_experiment(EXPERIMENT, manifest, tmp_path, only=["ATS-2"], device="cpu")
    assert [result.method for result in found] == ["CNN 1", "ATS-2 0.5/1"]
    assert read_results(tmp_path / RESULTS) == found
    assert run_experiment(replace(EXPERIMENT, methods=EXPERIMENT.methods[:1]), manifest, tmp_path) == found[1:]


def test_a_run_that_was_stopped_goes_on_from_its_last_stage(manifest, monkeypatch, tmp_path):
    import experiment

    trained = []

    def stop(entries, config, *arguments, **options):
        trained.append(config.train.epochs)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return actual(entries, config, *arguments, **options)

    actual = experiment.train  # type: ignore[attr-defined]
    monkeypatch.setattr(experiment, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(EXPERIMENT, manifest, tmp_path, only=["ATS-2"], device="cpu")
    assert not (tmp_path / RESULTS).exists()
    (result,) = run_experiment(EXPERIMENT, manifest, tmp_path, only=["ATS-2"], device="cpu")
    assert trained == [1, 3, 3]
    assert [point.epoch for point in result.points] == [1, 3]


def test_a_folder_of_other_settings_is_refused(finished, manifest):
    out, _ = finished
    other = replace(EXPERIMENT, base=merge(EXPERIMENT.base, {"train": {"learning_rate": 0.01}}))
    for changed in (other, replace(EXPERIMENT, stages=(1, 2))):
        with pytest.raises(UsageError, match="another configuration, other stages"):
            run_experiment(changed, manifest, out, only=["ATS-2"], device="cpu")
    with pytest.raises(UsageError, match="no method ATS-3; there are ATS-2 0.5/1, CNN 1"):
        run_experiment(EXPERIMENT, manifest, out, only=["ATS-3"])


def test_seeds_split_a_manifest_without_splits_anew(manifest, tmp_path):
    entries = [replace(entry, split="") for entry in read_manifest(manifest)]
    write_manifest(tmp_path / "manifest.csv", entries)
    cnn = replace(EXPERIMENT, methods=EXPERIMENT.methods[1:], runs=2, stages=())
    small = replace(cnn, base=merge(cnn.base, {"data": {"test": 0.34}}))
    run_experiment(small, tmp_path / "manifest.csv", tmp_path / "out", device="cpu")
    tests = []
    for seed in (0, 1):
        folder = run_folder(tmp_path / "out", "CNN 1", seed)
        tests.append({row["slide_id"] for row in read_run(folder / "run")["entries"] if row["split"] == "test"})
        predicted = (folder / "predictions" / "predictions.csv").read_text().splitlines()[1:]
        assert {line.split(",")[0] for line in predicted} == tests[seed]
    assert tests[0] != tests[1]


def test_costs_are_measured_again_without_touching_the_rest(finished, tmp_path):
    out, results = finished
    shutil.copytree(out, tmp_path / "out")
    rows = [replace(result, sample_seconds=99.0, peak_bytes=1) for result in results]
    (tmp_path / "out" / RESULTS).write_text(json.dumps([asdict(row) for row in rows]))
    again = measure_again(tmp_path / "out", "cpu")
    assert read_results(tmp_path / "out" / RESULTS) == again
    for old, new in zip(results, again, strict=True):
        assert 0 < new.sample_seconds < 99
        assert new.peak_bytes == pytest.approx(old.peak_bytes, rel=0.2)
        assert replace(new, sample_seconds=old.sample_seconds, peak_bytes=old.peak_bytes) == old


def test_a_command_measures_saves_draws_and_prints(finished, manifest, monkeypatch, capsys, tmp_path):
    out, results = finished
    shutil.copytree(out, tmp_path / "out")
    monkeypatch.setattr("experiment._measure", lambda *_: Cost(0.5, 7_000_000))
    words = ["--out", str(tmp_path / "out"), "--save", str(tmp_path / "saved"), "--device", "cpu"]
    drawn = []

    def run(*more):
        chosen = command_line("Spots.", "unused").parse_args([*words, *more])
        conduct(
            EXPERIMENT, chosen, lambda: manifest, lambda entries: entries[9:10], lambda *given: drawn.append(given)
        )
        return capsys.readouterr().out

    printed = run("--measure")
    again = [replace(result, sample_seconds=0.5, peak_bytes=7_000_000) for result in results]
    assert read_results(tmp_path / "saved" / "spots.json") == again
    assert drawn == [(again, read_manifest(manifest)[9:10], tmp_path / "saved")]
    assert printed == (tmp_path / "saved" / "spots.md").read_text()
    assert "500.0 ms" in printed
    assert run("--table", str(tmp_path / "saved" / "spots.json")) == printed
    assert len(drawn) == 1
    with pytest.raises(SystemExit, match="error: spots: no method CNN-2; there are ATS-2"):
        run("--only", "CNN-2")


def test_settings_are_merged_key_by_key_and_lists_replaced():
    assert merge({"a": {"b": 1, "c": [1, 2]}, "d": 3}, {"a": {"c": [4]}, "e": {"f": 5}}) == {
        "a": {"b": 1, "c": [4]},
        "d": 3,
        "e": {"f": 5},
    }
    config = EXPERIMENT.config(EXPERIMENT.methods[1], seed=7)
    assert (config.seed, config.train.epochs, config.train.batch_size, config.model.kind) == (7, 2, 4, "cnn")
    with pytest.raises(UsageError, match="spots, U-2: .*unknown key"):
        EXPERIMENT.config(Method("U-2", "", {"model": {"kind": "uniform", "sample": 3}}), seed=0)


# --- table ------------------------------------------------------------------------------------------------


def result(method, seed, loss, error, seconds=0.0023, peak=21_000_000, epoch=30):
    point = Point(epoch=epoch, seconds=60.0 + seed, train_loss=loss, test_error=error)
    first = Point(epoch=1, seconds=2.0 + seed, train_loss=2 * loss, test_error=0.9)
    return Result(method, seed, "Spots", "0", (first, point), seconds, peak, "a machine", {"torch": "3.0"})


def test_the_table_has_the_papers_figures_beside_ours():
    losses, errors = (0.1, 0.3), (0.25, 0.35)
    results = [result("ATS-2 0.5/1", i, losses[i], errors[i], seconds=0.001 * (i + 1)) for i in range(2)]
    lines = table(EXPERIMENT, [*results, result("other", 0, 1, 1)]).splitlines()
    assert len(lines) == 7
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[2] == (
        "| ATS-2 | 0.5/1 | 0.200 ± 0.100 | 0.1 | 0.300 ± 0.050 | 0.2 ± 0.1 | 1.5 ms | 3 ms | 21 MB | 4 MB | 30 | 2 |"
    )
    assert lines[3].startswith("| CNN | 1 |  |  |")  # not run
    assert lines[5].startswith("Train loss: cross-entropy as trained")
    assert lines[6] == "Run: Spots; a machine; torch 3.0"


def test_mean_and_standard_error():
    assert mean_and_error([0.5]) == "0.500"
    assert mean_and_error([0.1, 0.2, 0.6]) == "0.300 ± 0.153"  # sqrt(0.07 / 3)


def test_results_are_saved_with_their_table(tmp_path):
    results = [result("CNN 1", 0, 0.5, 0.25)]
    save(EXPERIMENT, results, tmp_path / "results")
    assert read_results(tmp_path / "results" / "spots.json") == results
    assert (tmp_path / "results" / "spots.md").read_text() == table(EXPERIMENT, results) + "\n"
    for text in ("{", "[1]", json.dumps([{"points": []}])):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UsageError, match=r"bad\.json: not the results"):
            read_results(tmp_path / "bad.json")


# --- figures ----------------------------------------------------------------------------------------------


def size_of(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def test_attention_is_kept_at_every_stage_and_sums_to_one(finished):
    out, _ = finished
    maps = attention_maps(out, "ATS-2 0.5/1", "9")
    assert list(maps) == [1, 3]
    for weights, pitch in maps.values():
        assert (weights.shape, pitch) == ((8, 10), 8.0)
        assert weights.sum() == pytest.approx(1)
    assert (maps[1].weights != maps[3].weights).any()
    with pytest.raises(UsageError, match="no attention of 9"):
        attention_maps(out, "CNN 1", "9")


def test_the_last_kept_attention_is_that_of_the_trained_model(finished, manifest):
    from pipeline.data.slides import SlideImage, open_slide

    out, _ = finished
    model, _ = load_model(run_folder(out, "ATS-2 0.5/1", 0) / "run" / MODEL, expect=ImageModel)
    with open_slide(next(e.path for e in read_manifest(manifest) if e.slide_id == "9")) as slide:
        image = SlideImage(slide)
        population = model.attend([image], [model.coarse_view(image)])
    grid = np.zeros((8, 10))
    cells = (population.centers_l0[0, 0].numpy() // 8).astype(int)
    grid[cells[:, 0], cells[:, 1]] = population.log_attention[0, 0].detach().exp().numpy()
    np.testing.assert_allclose(attention_maps(out, "ATS-2 0.5/1", "9")[3].weights, grid, rtol=1e-5)


def test_weights_are_stretched_to_one_and_multiply_their_own_patches():
    attention = AttentionMap(np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.1]]), pitch=4.0)
    np.testing.assert_allclose(normalise(attention.weights), [[0, 0.5, 1], [0, 0.5, 0]])
    assert not normalise(np.full((2, 2), 0.25)).any()
    image = np.full((7, 10), 200, np.uint8)  # the last cells reach past the image
    shown = over_image(attention, image.shape)
    np.testing.assert_array_equal(shown[:4, :4], 0.1)
    np.testing.assert_array_equal(shown[:4, 8:], 0.3)
    np.testing.assert_array_equal(shown[4:, 4:8], 0.2)
    weighed = weigh(image, attention)
    assert weighed.shape == (7, 10, 3)
    np.testing.assert_allclose(weighed[:4, 8:], 200 / 255)
    np.testing.assert_allclose(weighed[4:, 4:8], 100 / 255)
    assert not weighed[:, :4].any()


def test_figures_are_written(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
    maps = [AttentionMap(weights / weights.sum(), 8.0) for weights in rng.random((6, 8, 10))]
    error_and_loss_against_time([result("A", i, 0.5, 0.2) for i in range(2)], tmp_path / "deep" / "2.png")
    attention_evolution(image, dict(enumerate(maps)), tmp_path / "3.png", marks=[(20, 30)], box=(10, 10, 30, 40))
    attention_beside(image, {"Deep MIL": maps[0], "ATS": maps[1]}, [(5, 5, 10, 10)], tmp_path / "4.png")
    patches = [image[:20, :20], image[20:40, :20, 0]]
    attention_beside(image[..., 0], {"ATS": maps[1]}, [], tmp_path / "5.png", patches=patches)
    attention_grid({"0": maps[:3], "0.01": maps[3:]}, tmp_path / "6.png", columns=["1", "2", "3"])
    sizes = [size_of(tmp_path / name) for name in ("deep/2.png", "3.png", "4.png", "5.png", "6.png")]
    assert sizes[0] == (900, 360)
    assert sizes[1][0] == 1000
    assert sizes[2][0] == 1200  # image, ground truth, two methods
    assert sizes[3][0] == 600
    assert all(150 < height < 1000 for _, height in sizes)


# --- Megapixel MNIST --------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["pyramid", "pasted"])
def test_the_full_experiment_is_the_papers(view):
    data = replace(megapixel_mnist.FULL, view=view)
    assert (data.size, data.noise, data.train, data.test) == (1500, 50, 5000, 1000)
    experiment = megapixel_mnist.build(data, quick=False)
    assert [method.name for method in experiment.methods] == ["ATS-5", "ATS-10", "ATS-25", "ATS-50", "ATS-100", "CNN"]
    assert experiment.runs == 5
    *ats, cnn = (experiment.config(method, 0) for method in experiment.methods)
    assert {config.train.epochs for config in (*ats, cnn)} == {500}
    assert {(config.train.learning_rate, config.train.entropy_weight) for config in ats} == {(1e-3, 0.01)}
    assert [config.model.levels[0].samples for config in ats] == [5, 10, 25, 50, 100]
    for config in ats:
        (level,) = config.model.levels
        cells = 1500 / level.extent_l0
        assert cells == (pytest.approx(180) if view == "pasted" else 187.5)  # the paper's is 180 x 180
        assert (config.model.patch_size, config.model.encoder, config.model.features) == (50, "lenet", 32)
    assert (cnn.model.encoder, cnn.model.features, cnn.model.downsample) == ("resnet16", 32, 1)


@pytest.mark.slow
def test_the_script_leaves_results_table_and_figures(tmp_path, monkeypatch, capsys):
    words = "--quick --view pasted --size 150 --noise 1 --train 20 --test 6 --only ATS-5 --device cpu"
    monkeypatch.setattr("sys.argv", ["megapixel_mnist.py", "--out", str(tmp_path), *words.split()])
    megapixel_mnist.main()
    name = "megapixel_mnist-quick-pasted"
    printed = capsys.readouterr().out
    assert "| ATS-5 | 0.12/1 | " in printed
    assert (
        "150 x 150 pixels, 1 noise patches, pasted view, 20 training and 6 test images of scikit-learn's digits"
        in printed
    )
    assert printed == (tmp_path / f"{name}.md").read_text()
    (result,) = read_results(tmp_path / f"{name}.json")
    assert [point.epoch for point in result.points] == [1, 2, 4, 8, 12, 20, 28]
    assert size_of(tmp_path / f"{name}-figure2.png") == (900, 360)
    assert size_of(tmp_path / f"{name}-figure3.png")[0] == 1000
    maps = attention_maps(tmp_path, "ATS-5 0.12/1", "mnist-00020")
    assert {weights.shape for weights, _ in maps.values()} == {(18, 18)}
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--view", "pasted", "--table", str(tmp_path / f"{name}.json")])
    megapixel_mnist.main()
    assert capsys.readouterr().out == printed


def test_a_cnn_alone_has_no_figure_of_attention(tmp_path):
    experiment = megapixel_mnist.build(megapixel_mnist.QUICK, quick=True)
    entry = Entry(slide_id="mnist-02000", path="nowhere", split="test")
    results = [result("CNN 1", 0, 0.5, 0.25)]
    megapixel_mnist.draw(experiment, results, entry, megapixel_mnist.QUICK, None, tmp_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["megapixel_mnist-quick-figure2.png"]


def test_options_change_the_data():
    parser = command_line("", "runs")
    for name in ("size", "noise", "train", "test", "view", "digits"):
        parser.add_argument(f"--{name}", type=int)
    data = megapixel_mnist._data(parser.parse_args(["--quick", "--noise", "0", "--train", "7"]))
    assert (data.noise, data.train, data.size) == (0, 7, megapixel_mnist.QUICK.size)


def test_a_folder_without_digits_is_refused(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    with pytest.raises(UsageError, match=f"{tmp_path}: no t10k"):
        megapixel_mnist.digit_files(tmp_path)


def test_digits_are_found_by_their_names(tmp_path):
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (tmp_path / name).touch()
    t10k = tmp_path / "t10k-images-idx3-ubyte.gz", tmp_path / "t10k-labels-idx1-ubyte.gz"
    assert megapixel_mnist.digit_files(None) == {}
    assert "8,000 to train" in megapixel_mnist.name_digits(megapixel_mnist.digit_files(tmp_path))
    assert megapixel_mnist.digit_files(tmp_path) == {"images": t10k[0], "labels": t10k[1]}
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (tmp_path / name).touch()
    assert megapixel_mnist.digit_files(tmp_path) == {
        "images": tmp_path / "train-images-idx3-ubyte",
        "labels": tmp_path / "train-labels-idx1-ubyte",
        "test_images": t10k[0],
        "test_labels": t10k[1],
    }
    assert megapixel_mnist.name_digits(megapixel_mnist.digit_files(tmp_path)) == "MNIST's digits"
