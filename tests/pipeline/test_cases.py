"""Cases of several slides as one sample: found in the slide that matters, drawn there, and told apart from slides."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import parse_config
from pipeline.data.cases import CaseImage, group_cases
from pipeline.data.manifest import Entry, plain_entries, read_entry, write_manifest
from pipeline.data.samples import SampleCache, open_sample
from pipeline.data.splits import RunSplits
from pipeline.errors import DataError, UsageError
from pipeline.results.evaluate import evaluate
from pipeline.results.heatmap import heatmaps
from pipeline.results.map_files import OBJECTS
from pipeline.results.predict import predict
from pipeline.results.settings import prediction_settings
from pipeline.training.dry_run import dry_run
from pipeline.training.train import train
from storage import write_pyramid

CONFIG = {
    "seed": 1,
    "model": {
        "levels": [
            {"downsample": 4, "samples": 6, "stride": 4, "channels": [4]},
            {"downsample": 2, "samples": 8, "size": 16, "stride": 4, "channels": [4]},
        ],
        "patch_size": 24,
        "features": 16,
        "prior": "valid",
    },
    "train": {"epochs": 25, "batch_size": 6, "learning_rate": 0.005, "early_samples": 3, "entropy_weight": 0.0},
    "data": {"unit": "case"},
    "predict": {"draws": 4},
}


def slides_of(case, count, label="", **extra):
    return [
        Entry(slide_id=f"{case}-{i}", path=f"/{case}-{i}", label=label, case_id=case, **extra) for i in range(count)
    ]


class TestGroups:
    def test_slides_of_a_case_are_one_and_others_are_their_own(self):
        alone = Entry(slide_id="alone", path="/alone", label="b")
        slides = [replace(s, extra={"age": "7", "block": s.slide_id}) for s in slides_of("p", 3, "a")]
        found = group_cases([slides[0], alone, *slides[1:]])
        assert [entry.slide_id for entry in found] == ["p", "alone"]
        assert (found[0].label, found[0].extra, found[0].slides) == ("a", {"age": "7"}, tuple(slides))
        assert found[1] == alone
        assert group_cases(slides[:1])[0].slides == ()
        assert [read_entry(row) for row in json.loads(json.dumps(plain_entries(found)))] == [
            read_entry(row) for row in plain_entries(found)
        ]

    @pytest.mark.parametrize(
        ("entries", "reason"),
        [
            ([*slides_of("p", 1, "a"), *slides_of("p", 1, "b")], "case p have several values in column label: a, b"),
            ([*slides_of("p", 1, split="train"), *slides_of("p", 1, split="test")], "in column split: test, train"),
            ([*slides_of("p", 1), Entry(slide_id="p", path="/p")], "case p is called like a slide without a case"),
        ],
    )
    def test_what_is_no_case_is_refused(self, entries, reason):
        with pytest.raises(UsageError, match=rf"data.unit: case: .*{reason}.*mend the manifest"):
            group_cases(entries)

    def test_other_columns_tell_of_a_case_too(self):
        slides = [replace(s, extra={"time": str(i)}) for i, s in enumerate(slides_of("p", 2))]
        group_cases(slides)
        with pytest.raises(UsageError, match="several values in column time: 0, 1"):
            group_cases(slides, ("time",))

    def test_a_run_knows_a_case_by_its_slides(self):
        rows = plain_entries(group_cases([replace(s, split="train") for s in slides_of("p", 2)]))
        known = RunSplits(rows)
        assert known.seen(Entry(slide_id="new name", path="/p-1")) == "train"
        assert known.seen(Entry(slide_id="other", path="/other", case_id="p")) == "train"
        assert known.seen(Entry(slide_id="other", path="/other")) == ""


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"prior": "none"}, "data.unit: .*set model.prior to tissue or valid"),
        ({"prior": "valid", "location": True}, "data.unit: .*set model.location to false"),
        ({"kind": "cnn"}, "data.unit: .*set model.prior"),
    ],
)
def test_models_that_cannot_see_cases(model, reason):
    model = {**CONFIG["model"], **model} if "kind" not in model else model
    with pytest.raises(UsageError, match=reason):
        parse_config({"model": model, "data": {"unit": "case"}}, "")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """28 cases of 1 to 4 slides, and one of 12; in half of them one slide has a bright square."""
    folder, rng, entries = tmp_path_factory.mktemp("cases"), np.random.default_rng(0), []
    for case in range(28):
        positive, split = case % 2 == 0, "test" if case >= 18 else "train"
        count = 12 if case == 26 else 1 + case % 4
        bearer = rng.integers(count)
        for i in range(count):
            pixels = rng.integers(0, 60, (3, 136 + 8 * (i % 2), 150), dtype=np.uint8)
            if positive and i == bearer:
                y, x = rng.integers(8, 80, 2)
                pixels[:, y : y + 48, x : x + 48] = 220
            path = folder / f"{case}-{i}.ome.zarr"
            write_pyramid(path, pixels, mpp=0.5)
            label = "yes" if positive else "no"
            own = {"slide_id": f"{case}-{i}", "path": str(path), "label": label, "case_id": f"case {case}"}
            entries.append(Entry(**own, split=split, extra={"bearer": str(int(positive and i == bearer))}))
    write_manifest(folder / "manifest.csv", entries)
    return entries


def test_a_case_is_one_image(cohort):
    config = parse_config(CONFIG, "")
    [case] = group_cases([entry for entry in cohort if entry.case_id == "case 26"])
    image = open_sample(case, config.model)
    assert isinstance(image, CaseImage)
    assert len(image.slides) == 12
    assert image.identity is not None
    assert image.statistics.requests == sum(slide.statistics.requests for slide in image.slides) > 0
    cache = SampleCache(config.model)
    assert cache.open(case) is cache.open(case)
    other = replace(case, slides=case.slides[:-1])
    assert open_sample(other, config.model).identity != image.identity
    image.close()
    broken = replace(case, slides=(*case.slides, replace(case.slides[0], path="/nowhere")))
    with pytest.raises(Exception, match="/nowhere"):
        open_sample(broken, config.model)


def test_slides_of_a_case_have_the_same_channels(cohort, tmp_path):
    write_pyramid(tmp_path / "grey.ome.zarr", np.zeros((1, 144, 144), np.uint8))
    [case] = group_cases([entry for entry in cohort if entry.case_id == "case 3"])
    mixed = replace(case, slides=(*case.slides, replace(case.slides[0], path=str(tmp_path / "grey.ome.zarr"))))
    with pytest.raises(DataError, match=r"grey\.ome\.zarr: 1 channels where the model has 3"):
        open_sample(mixed, parse_config(CONFIG, "").model)


@pytest.mark.slow
def test_what_one_slide_of_a_case_shows_is_found(cohort, tmp_path):
    config = parse_config(CONFIG, "")
    lines, _ = dry_run(cohort, config, tmp_path / "run")
    assert any(line.startswith("class yes: 9 train") for line in lines)  # cases, not slides
    _, failures = train(cohort, config, tmp_path / "run")
    assert failures == []
    test = [entry for entry in cohort if entry.split == "test"]
    rows = predict(test, tmp_path / "run", tmp_path / "out")
    assert [row["slide_id"] for row in rows] == [f"case {i}" for i in range(18, 28)]
    assert {row["status"] for row in rows} == {"ok"}
    found = evaluate(tmp_path / "out")
    assert found["slides"] == found["cases"] == 10
    assert found["auc"]["value"] > 0.9, found
    # The case of 12 slides costs as many patches as the others, and each slide of it has its own heatmap.
    settings = prediction_settings(tmp_path / "run")
    drawn = {}
    for name in ("case 26", "case 20"):
        done = heatmaps([entry for entry in test if entry.case_id == name], settings, tmp_path / "maps")
        assert [one.error for one in done] == [""] * len(done)
        objects = [json.loads((one.folder / OBJECTS).read_text())["features"] for one in done]
        weights = [sum(each["properties"]["measurements"]["weight"] for each in own) for own in objects]
        draws = [sum(each["properties"]["measurements"]["draws"] for each in own) for own in objects]
        drawn[name] = (done, weights, sum(draws))
        corners = [point for own in objects for each in own for point in each["geometry"]["coordinates"][0]]
        assert np.abs(corners).max() < 200  # on the slide's own pixels, wherever it lies in the case
    (done, weights, _) = drawn["case 26"]
    assert len(done) == 12
    assert {one.prediction for one in done} == {"yes"}
    bearer = [entry.extra["bearer"] for entry in test if entry.case_id == "case 26"].index("1")
    assert weights[bearer] == max(weights)
    assert done[bearer].peak == max(one.peak for one in done)
    most = 8 * 4  # patches of all draws
    assert all(count <= most for _, _, count in drawn.values())
    # Another set of slides is another case, whose earlier result is not taken for it.
    fewer = [entry for entry in test if entry.slide_id != f"26-{bearer}"]
    again = predict(fewer, tmp_path / "run", tmp_path / "out")
    changed = [one["slide_id"] for one, before in zip(again, rows, strict=True) if one != before]
    assert changed == ["case 26"]
    assert again[-2]["prob_yes"] < rows[-2]["prob_yes"]
    with pytest.raises(UsageError, match="another configuration or of other slides"):
        train([entry for entry in cohort if entry.slide_id != "3-1"], config, tmp_path / "run")
