"""The report: one page that needs nothing else, shows the worst first, and never shows another table's metrics."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.data.manifest import read_manifest
from pipeline.errors import UsageError
from pipeline.results.evaluate import evaluate
from pipeline.results.heatmap import heatmaps
from pipeline.results.localise import RATES, localise, read_annotation
from pipeline.results.look import LOOK, SHOWN_PATCHES, THUMBNAIL
from pipeline.results.map_files import MAP
from pipeline.results.predict import predict
from pipeline.results.report import describe_metrics, report
from pipeline.results.settings import prediction_settings
from pipeline.results.table import write_table
from pipeline.runs import model_fingerprint
from storage import Slide

VOID = {"meta", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Texts of the cells of every table, row by row, and of every attribute; refuses tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.attributes, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([("class", "wrong") in attrs])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def row(slide_id, label, prediction, *, error=""):
    about = {"slide_id": slide_id, "case_id": "", "label": label, "split": "test"}
    if error:
        return {**about, "status": "failed", "error": error}
    p = 0.8 if prediction == "bar" else 0.2
    return {**about, "prediction": prediction, "prob_bar": p, "prob_box": 1 - p, "status": "ok", "error": ""}


@pytest.fixture
def write(finished, tmp_path):
    """Write a table, evaluate it, and return its report."""

    def make(rows, **settings):
        write_table(tmp_path, [{**row, "model": model_fingerprint(finished)} for row in rows])
        evaluate(tmp_path)
        return report(finished, tmp_path, tmp_path / "page.html", **settings).read_text()

    return make


@pytest.fixture(scope="module")
def folder(finished, pyramids, tmp_path_factory):
    """Folder of the report of a real run with heatmaps."""
    folder = tmp_path_factory.mktemp("report")
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "test"]
    predict(entries, finished, folder / "predictions")
    evaluate(folder / "predictions")
    heatmaps(entries[:2], prediction_settings(finished), folder / "heatmaps")
    report(finished, folder / "predictions", folder / "page.html", heatmaps=folder / "heatmaps")
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    return (folder / "page.html").read_text()


def test_is_self_contained(whole, folder):
    """Nothing is asked of another host; `tests/browser` watches a browser open it."""
    pages = sorted((folder / "page_slides").iterdir())
    assert len(pages) == 2
    page = Page(whole)
    places = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert places == [f"page_slides/{path.name.replace(' ', '%20')}" for path in pages]
    for path in pages:
        slide = Page(path.read_text())
        places = [value for _, name, value in slide.attributes if name in ("src", "href", "srcset", "action")]
        assert places.pop(0) == "../page.html"
        assert len(places) > 2  # slide, attention, and patches
        assert all(re.match("data:image/(png|jpeg);base64,", place) for place in places)
        text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", path.read_text())
        assert not re.search(r"https?:|file:|url\(|@import|<link", text)


def test_a_page_of_a_slide_says_what_it_should(folder):
    text = (folder / "page_slides" / "slide 10.html").read_text()
    look = json.loads((folder / "heatmaps" / "slide 10" / LOOK).read_text())
    assert f"The model answers <b>{look['words']}</b>. The label is <b>bar</b>." in text
    cells = [cell for table in Page(text).tables for line in table for cell in line[1:]]
    for words in ("bar", "150 x 128 pixels", "0.5 micrometres", f"{look['answers']['bar'][0]:.4g}"):
        assert words in cells
    assert "10 \u00b5m" in text  # the scale bar
    patches = [value for tag, name, value in Page(text).attributes if tag == "rect" and name == "class"]
    assert patches.count("patch") == len(look["patches"]) > 0
    assert patches.count("region") == len(look["regions"]) > 0
    assert sum(patch["weight"] for patch in look["patches"]) == pytest.approx(1, abs=0.5)


def test_patches_say_what_they_add(folder):
    text = (folder / "page_slides" / "slide 10.html").read_text()
    look = json.loads((folder / "heatmaps" / "slide 10" / LOOK).read_text())
    score, patches = look["score"], look["patches"]
    assert f"The {score['name']} is {score['offset']:.3g} without any patch" in text
    assert f"{score['value']:.3g} in all." in text
    shown = [float(value) for value in re.findall("<b class=added>([^<]+)</b>", text)]
    added = [patch["contribution"] for patch in patches[:SHOWN_PATCHES]]
    assert shown == pytest.approx(added, abs=0.006 * max(map(abs, added)))
    assert text.count("<i class=for ") + text.count("<i class=against ") == min(len(patches), SHOWN_PATCHES)
    assert "contribution.png" not in text
    assert "id=contribution" not in text  # nothing was encoded everywhere


class TestAnnotations:
    @pytest.fixture
    def outlined(self, tmp_path):
        """Outlines of a triangle on one slide, and of nothing on another."""
        ring = [[40, 40], [100, 40], [70, 110], [40, 40]]
        lesion = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
        for name, features in (("slide 10", [lesion]), ("slide 11", [])):
            (tmp_path / f"{name}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        return tmp_path

    def test_attention_is_compared_with_them(self, folder, finished, outlined, tmp_path):
        page = tmp_path / "page.html"
        options = {"heatmaps": folder / "heatmaps", "annotations": outlined}
        text = report(finished, folder / "predictions", page, **options).read_text()
        with Slide(folder / "heatmaps" / "slide 10" / MAP) as heat:
            found = localise(
                heat.read(0, (0, 0, *heat.shape_yx))[0], 8.0, read_annotation(outlined, "slide 10", (150, 150))
            )
        assert found.area is not None
        table = next(table for table in Page(text).tables if table[0][1:2] == ["slide"] and "AUC" in table[0])
        assert table[1][1:3] == ["slide 10", f"{found.area:.3f}"]
        assert table[2][1:4] == ["slide 11", "", "0 of 0"]
        results = text.split("<h2>Localisation</h2>")[1].split("<h2>Training</h2>")[0]
        assert 'id="froc"' in results
        rows = {line[1]: line[2] for line in Page(results.split("</table>")[0] + "</table></div>").tables[0][1:]}
        assert rows["slides with outlines"] == "2"
        assert rows["localisation AUC, mean over slides"] == f"{found.area:.3f}"
        assert {f"found at {rate:g} false positives a slide" for rate in RATES} <= rows.keys()
        slide = (tmp_path / "page_slides" / "slide 10.html").read_text()
        assert '<path class=annotation d="M40 40 100 40 70 110 40 40Z"/>' in slide
        assert f"Localisation AUC of attention {found.area:.3f}" in slide
        assert "there is nothing to be found" in (tmp_path / "page_slides" / "slide 11.html").read_text()

    def test_without_them_nothing_is_said(self, whole, folder):
        assert "Localisation" not in whole
        assert "class=annotation" not in (folder / "page_slides" / "slide 10.html").read_text()

    def test_what_is_wrong_is_named(self, folder, finished, outlined, tmp_path):
        def write(**options):
            report(finished, folder / "predictions", tmp_path / "page.html", annotations=outlined, **options)

        with pytest.raises(UsageError, match="give --heatmaps too"):
            write()
        shutil.copytree(folder / "heatmaps", tmp_path / "maps")
        shutil.rmtree(tmp_path / "maps" / "slide 10" / MAP)
        with pytest.raises(UsageError, match=r"is gone; run nested-ats heatmap again, with omezarr"):
            write(heatmaps=tmp_path / "maps")
        for place in outlined.glob("*.geojson"):
            place.unlink()
        with pytest.raises(UsageError, match=r"no outlines of a slide with a heatmap; name them as in slide 10\.geo"):
            write(heatmaps=folder / "heatmaps")


@pytest.mark.parametrize("damage", ["gone", "not JSON"])
def test_heatmaps_that_are_damaged(whole, folder, finished, tmp_path, damage):
    shutil.copytree(folder / "heatmaps", tmp_path / "maps")
    if damage == "gone":
        (tmp_path / "maps" / "slide 10" / THUMBNAIL).unlink()
    else:
        (tmp_path / "maps" / "slide 10" / LOOK).write_text("{")
    with pytest.raises(UsageError, match=r"slide 10.*; run nested-ats heatmap again"):
        report(finished, folder / "predictions", tmp_path / "page.html", heatmaps=tmp_path / "maps")


def test_says_what_it_should(whole, finished):
    for words in ("balanced accuracy", "cross-entropy", "predicted bar", "label box", "slide 10", "learning_rate"):
        assert words in whole
    assert f"<h1>{finished.name}</h1>" in whole


def test_says_which_split_how_and_what_was_seen(whole, write):
    assert "The results are on: test.</p>" in whole
    assert "In brackets 95 % intervals over cases: Wilson" in whole
    seen = {**row("seen", "bar", "bar"), "split": "train", "seen": "train"}
    text = write([row("a", "bar", "bar") | {"seen": ""}, seen])
    assert "<p>1 of 2 slides were seen in training (1 as train) and are left out of the results." in text


def test_says_in_words_when_nothing_was_learned(write):
    rows = [row(str(i), ("bar", "box")[i // 5], "bar" if i % 2 else "box") for i in range(10)]
    results, training = write(rows).split("<h2>Training</h2>")
    assert "the model has learned nothing yet: cross-entropy 1.055 is worse than that of guessing" in results
    assert "<p class=wrong>The model attention is uniform" in training  # three epochs of a tiny data set
    right = [row(str(i), ("bar", "box")[i % 2], ("bar", "box")[i % 2]) for i in range(20)]
    assert "learned nothing" not in write(right).split("<h2>Training")[0]


def test_the_curves_are_drawn(whole):
    training = whole.split("<h2>Training</h2>")[1].split("<h2>Slides</h2>")[0]
    assert [
        name for name in ("cross_entropy", "accuracy", "auc", "entropy") if f'id="curve-{name}-run"' in training
    ] == [
        "cross_entropy",
        "accuracy",
        "entropy",
    ]


def test_what_is_plotted_of_classes(whole):
    assert all(f'id="{name}"' in whole for name in ("roc", "precision-recall", "calibration"))


def test_failed_then_wrong_then_the_rest(write):
    rows = [row("right", "bar", "bar"), row("unlabelled", "", "box"), row("wrong 1", "bar", "box")]
    rows += [row("failed", "bar", "", error="file: gone"), row("wrong 2", "box", "bar"), row("right 2", "box", "box")]
    table = Page(write(rows)).tables[-1]
    assert [line[1] for line in table[1:]] == ["failed", "wrong 1", "wrong 2", "right", "right 2", "unlabelled"]
    assert [line[0] for line in table[1:]] == [True, True, True, False, False, False]
    assert table[1][4] == "file: gone"
    assert table[2][1:] == ["wrong 1", "bar", "test", "box", "0.200", "0.800"]


def test_a_first_row_that_failed_does_not_hide_the_columns(write):
    table = Page(write([row("failed", "bar", "", error="gone"), row("a", "bar", "bar")])).tables[-1]
    assert table[0][1:] == ["slide", "label", "split", "prediction", "prob_bar", "prob_box"]


def test_many_slides_are_cut(write, monkeypatch):
    monkeypatch.setattr("pipeline.results.report._SHOWN_SLIDES", 50)
    page = write([row(str(i), "bar", "bar") for i in range(70)] + [row("bad", "bar", "box")])
    table = Page(page).tables[-1]
    assert len(table) == 51
    assert table[1][1] == "bad"
    assert "21 more in the table" in page


NASTY = "<script>alert('1')</script>&\""


def test_ids_labels_and_errors_are_escaped(write):
    rows = [row(NASTY, "bar", "bar"), row("x", "bar", "", error=NASTY), row("y", "", "bar")]
    page = write(rows)
    assert NASTY not in page
    cells = [cell for line in Page(page).tables[-1] for cell in line[1:]]
    assert cells.count(NASTY) == 2


def test_class_names_and_the_run_are_escaped(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "a<b>c")
    about = {"slide_id": "1", "case_id": "", "label": NASTY, "split": "test", "prediction": NASTY}
    about["model"] = model_fingerprint(finished)
    write_table(tmp_path, [{**about, f"prob_{NASTY}": 1.0, "prob_z": 0.0, "status": "ok", "error": ""}])
    evaluate(tmp_path)
    page = report(tmp_path / "a<b>c", tmp_path, tmp_path / "page.html").read_text()
    Page(page)
    assert "<script>alert" not in page
    assert "a<b>c" not in page


def test_a_run_given_as_here(finished, write, monkeypatch, tmp_path):
    write([row("a", "bar", "bar")])
    monkeypatch.chdir(finished)
    text = report(Path(), tmp_path, tmp_path / "page.html").read_text()
    assert f"<h1>{finished.name}</h1>" in text


def test_one_class(write):
    page = write([row(str(i), "bar", "bar") for i in range(3)])
    assert "undefined for one class" in page


def test_intervals_are_shown():
    metric = {"value": 0.5, "interval_95": [0.25, 0.75]}
    metrics = {"slides": 1, "failed": 0, "seen": {"train": 2, "val": 1}, "seen_included": False}
    metrics |= {"cross_entropy": 1.0, "guess_cross_entropy": 1.25}
    names = ("accuracy", "balanced_accuracy", "auc")
    rows = dict(describe_metrics(metrics | {"measures": names} | dict.fromkeys(names, metric)))
    assert rows["balanced accuracy"] == "0.500 [0.250, 0.750]"
    assert rows["seen, left out"] == "3"
    assert rows["cross-entropy"] == "1.000 (1.250 by guessing)"


class TestRefusals:
    def test_not_evaluated(self, finished, tmp_path):
        write_table(tmp_path, [row("a", "bar", "bar")])
        for damage in (None, "", "{"):
            if damage is not None:
                (tmp_path / "metrics.json").write_text(damage)
            with pytest.raises(UsageError, match="not evaluated yet; run nested-ats evaluate"):
                report(finished, tmp_path, tmp_path / "page.html")

    def test_predictions_that_changed_since(self, finished, tmp_path):
        model = {"model": model_fingerprint(finished)}
        write_table(tmp_path, [row("a", "bar", "bar") | model])
        evaluate(tmp_path)
        write_table(tmp_path, [row("a", "bar", "box") | model])
        with pytest.raises(UsageError, match="run nested-ats evaluate again"):
            report(finished, tmp_path, tmp_path / "page.html")
        evaluate(tmp_path)
        assert report(finished, tmp_path, tmp_path / "page.html").exists()

    @pytest.mark.parametrize("model", [{}, {"model": "of another run"}])
    def test_predictions_of_another_model(self, finished, tmp_path, model):
        write_table(tmp_path, [row("a", "bar", "bar") | model])
        evaluate(tmp_path)
        with pytest.raises(UsageError, match="predictions of another model than .*of another run, or from before"):
            report(finished, tmp_path, tmp_path / "page.html")
        assert not (tmp_path / "page.html").exists()

    def test_folders_that_are_something_else(self, finished, write, tmp_path):
        write([row("a", "bar", "bar")])
        page = tmp_path / "new.html"
        with pytest.raises(UsageError, match="no training run here"):
            report(tmp_path, tmp_path, page)
        with pytest.raises(UsageError, match="no predictions"):
            report(finished, finished, page)
        with pytest.raises(UsageError, match="no heatmaps here"):
            report(finished, tmp_path, page, heatmaps=tmp_path)
        assert not page.exists()

    def test_places_to_write_to(self, finished, write, tmp_path):
        write([row("a", "bar", "bar")])
        assert report(finished, tmp_path, tmp_path / "new" / "page.html").exists()
        (tmp_path / "folder").mkdir()
        for place in ("folder", "page.html/below.html"):
            with pytest.raises(UsageError, match=r"cannot be (written|made)"):
                report(finished, tmp_path, tmp_path / place)
