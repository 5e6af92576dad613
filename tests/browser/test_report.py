"""The report in Chromium: nothing is asked of others, tables sort, attention fades, and everybody can use it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe

from nested_ats import LevelConfig, ModelConfig, build_model, save_model
from pipeline.config import parse_config, plain
from pipeline.data.manifest import Entry, plain_entries
from pipeline.files import write_json
from pipeline.results.evaluate import evaluate
from pipeline.results.heatmap import heatmaps
from pipeline.results.predict import predict
from pipeline.results.report import report
from pipeline.results.settings import prediction_settings
from pipeline.runs import METRICS, MODEL, RUN
from storage import write_pyramid

NASTY = "</script><script>document.title = 'broken'</script>"
CLASSES = ("normal", NASTY)


@pytest.fixture(scope="module")
def page_of_report(tmp_path_factory):
    """A report of eight slides with two classes, one with a name that must stay a text, and of two heatmaps."""
    folder, rng, entries = tmp_path_factory.mktemp("report"), np.random.default_rng(0), []
    for number in range(8):
        grey = rng.integers(200, 250, (1, 300, 420), dtype=np.uint8)
        pixels = np.repeat(grey, 3, 0)
        pixels[1, 80:220, 120:300] //= 3  # stained
        place = folder / f"slide {number}.ome.zarr"
        write_pyramid(place, pixels, mpp=2.0)
        split = "train" if number < 2 else "test"
        entries.append(Entry(slide_id=f"slide {number}", path=str(place), label=CLASSES[number % 2], split=split))
    levels = (
        LevelConfig(downsample=4, samples=4, stride=4, channels=(4,)),
        LevelConfig(downsample=2, samples=6, size=16, stride=4, channels=(4,)),
    )
    chosen = ModelConfig(levels=levels, patch_size=24, features=8, prior="tissue", min_tissue=0.1)
    model = build_model(chosen, in_channels=3, classes=2)
    save_model(folder / "run" / MODEL, model, classes=CLASSES)
    config = parse_config({"model": {"levels": [{"downsample": 4, "samples": 4, "stride": 4}]}}, "")
    run = {"fingerprint": "f", "channels": 3, "config": plain(config), "versions": {"python": "3"}}
    run |= {"target": {"kind": "classes", "classes": list(CLASSES)}, "entries": plain_entries(entries)}
    write_json(folder / "run" / RUN, run)
    epochs = [
        {"epoch": i + 1, "cross_entropy": 0.7 / (i + 1), "accuracy": 0.6, "entropy": 3.0, "verdict": ""}
        | {"val_cross_entropy": 0.5 + abs(i - 2) / 10, "val_accuracy": 0.7}
        for i in range(5)
    ]
    (folder / "run" / METRICS).write_text("".join(f"{line}\n".replace("'", '"') for line in epochs))
    predict(entries[2:], folder / "run", folder / "predictions")
    evaluate(folder / "predictions")
    heatmaps(entries[2:4], prediction_settings(folder / "run"), folder / "heatmaps", dense=True)
    ring = [[150, 100], [260, 90], [270, 180], [160, 190], [150, 100]]
    lesion = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    (folder / "outlines").mkdir()
    (folder / "outlines" / "slide 2.geojson").write_text(json.dumps(lesion))
    places = {"heatmaps": folder / "heatmaps", "annotations": folder / "outlines"}
    return report(folder / "run", folder / "predictions", folder / "page.html", **places)


@pytest.fixture
def opened(chromium, page_of_report):
    """Open the report in a scheme; what it asks of others, and what its console says, must be nothing."""
    asked, said, contexts = [], [], []

    def make(scheme="light"):
        context = chromium.new_context(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(page_of_report.as_uri())
        page.wait_for_selector("#roc .main-svg")
        return page

    yield make
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_whole_and_plots_fit_the_page(opened, screenshots, scheme):
    page = opened(scheme)
    assert page.title() == "run"  # no name of a class was run
    plots = page.locator(".plotly-graph-div")
    assert plots.count() == 7
    for number in range(plots.count()):
        box, frame = plots.nth(number).bounding_box(), page.locator("figure").nth(number).bounding_box()
        assert box["width"] <= frame["width"] + 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200
    text = page.evaluate("getComputedStyle(document.querySelector('#roc .xtitle')).fill")
    assert text == ("rgb(28, 28, 34)" if scheme == "light" else "rgb(236, 236, 241)")
    # The epoch of the lowest validation loss is marked.
    assert page.evaluate("document.getElementById('curve-cross_entropy-run').layout.shapes[0].x0") == 3
    page.screenshot(path=screenshots / f"report-{scheme}.png", full_page=True)


def test_the_table_sorts_and_filters(opened):
    page = opened()

    def column(number):
        cells = page.locator(f"table.sortable tbody tr:visible td:nth-child({number})")
        return [cell.strip() for cell in cells.all_text_contents()]

    first = column(1)
    assert len(first) == 6
    button = page.get_by_role("button", name="slide")
    button.click()
    assert column(1) == sorted(first)
    button.press("Enter")  # by the keyboard too
    assert column(1) == sorted(first, reverse=True)
    page.get_by_role("button", name="prob_normal").click()
    assert column(5) == sorted(column(5), key=float)
    page.get_by_label("wrong ones only").check()
    labels, predictions = column(2), column(4)
    assert labels
    assert all(label != prediction for label, prediction in zip(labels, predictions, strict=True))
    assert page.locator("#shown").text_content() == f"{len(labels)} shown"
    page.get_by_label("wrong ones only").uncheck()
    page.get_by_label("find").fill("slide 4")
    assert column(1) == ["slide 4"]


def test_a_slide_opens_and_its_attention_fades(opened, screenshots):
    page = opened()
    page.get_by_role("region", name="Slides").get_by_role("link", name="slide 2").click()
    page.wait_for_selector("#attention")
    assert page.locator("h1").text_content() == "slide 2"
    slider, attention = page.get_by_label("attention").first, page.locator("#attention")
    assert attention.evaluate("each => each.style.opacity") == "0.7"
    slider.fill("0")
    assert attention.evaluate("each => each.style.opacity") == "0"
    slider.fill("100")
    assert attention.evaluate("each => each.style.opacity") == "1"
    # The pixels of attention lie on the slide's own: the map covers the slide, or a part of a cell more.
    slide, over = page.locator(".slide > img").first.bounding_box(), attention.bounding_box()
    assert (over["x"], over["y"]) == (slide["x"], slide["y"])
    assert 1 <= over["width"] / slide["width"] < 1.05
    assert 1 <= over["height"] / slide["height"] < 1.05
    page.get_by_label("patches drawn").uncheck()
    assert page.locator(".slide .patch:visible").count() == 0
    page.get_by_label("patches drawn").check()
    assert page.locator(".slide .patch:visible").count() > 0
    assert all(page.evaluate("[...document.images].map(each => each.naturalWidth > 0)"))
    for words, shape in (("tissue", "path.tissue"), ("annotation", "path.annotation")):
        assert page.locator(f".slide {shape}").count() == 1
        page.get_by_label(words, exact=True).uncheck()
        assert page.locator(f".slide {shape}:visible").count() == 0
        page.get_by_label(words, exact=True).check()
    added = page.locator("#contribution")
    assert added.evaluate("each => each.style.opacity") == "0"  # one map at a time, at first
    page.get_by_label("contribution").fill("80")
    assert added.evaluate("each => each.style.opacity") == "0.8"
    slider.fill("0")
    page.screenshot(path=screenshots / "report-contribution.png", full_page=True)
    slider.fill("70")
    page.get_by_label("contribution").fill("0")
    page.screenshot(path=screenshots / "report-slide.png", full_page=True)
    page.get_by_role("link", name="Report").click()
    page.wait_for_selector("#roc .main-svg")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(opened, scheme):
    """No serious fault of accessibility, as axe-core finds them."""
    page = opened(scheme)
    for follow in (
        lambda: None,
        lambda: page.get_by_role("region", name="Slides").get_by_role("link", name="slide 2").click(),
    ):
        follow()
        page.wait_for_load_state()
        found = Axe().run(page).response["violations"]
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert [(each["id"], each["nodes"][0]["html"]) for each in serious] == []
