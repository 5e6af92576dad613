"""The viewer's page in Chromium: what it shows, where it asks, and whether everybody can use it."""

from __future__ import annotations

import base64
import json
import re
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Error

from pipeline.data.discovery import find_slides
from pipeline.data.manifest import Entry, write_manifest
from pipeline.notebook import view
from pipeline.results.drawn import Patch, to_geojson
from pipeline.results.map_files import MAP, OBJECTS, REGIONS
from pipeline.results.table import write_table
from pipeline.view.cohort import cases_of
from pipeline.view.serving import Serving
from storage import Slide, write_pyramid

SIZE = {"width": 1280, "height": 800}
WAIT_MS = 60_000  # the machine may be busy
EXACT = 3.0  # in the mean: what JPEG changes


def tissue(seed, height=1600, width=2400):
    """A slide that looks like one: pink and violet on glass, different everywhere."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 400
    folds = sum(np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-3, 3, (6, 3)))
    inside = ((y - 2) / 1.6) ** 2 + ((x - 3) / 2.5) ** 2 + 0.05 * folds < 1
    stain = np.stack([200 + 12 * folds, 120 + 20 * folds, 170 + 14 * np.roll(folds, 77, 0)])
    glass = np.full_like(stain, 243) - 2 * np.stack([x, x, x])
    return np.where(inside, stain, glass).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A folder with a manifest of four slides, with predictions, heatmaps and annotations."""
    folder = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    for number, name in enumerate(("first", "second")):
        write_pyramid(folder / f"{name}.ome.zarr", tissue(number), mpp=0.5)
    cells = np.stack(
        [np.abs(np.sin(np.add.outer(np.arange(900), np.arange(900)) / step)) for step in (17, 31, 53, 90)]
    )
    cells = (cells * np.array([700, 3000, 12000, 50000])[:, None, None] + rng.integers(0, 200, cells.shape)).astype(
        np.uint16
    )
    write_pyramid(folder / "fluorescence.ome.zarr", cells, mpp=0.325, channels=("DAPI", "CD3", "CD8", "PanCK"))
    (folder / "damaged.tif").write_bytes(b"II*\0" + bytes(100))
    places = {name: folder / f"{name}.ome.zarr" for name in ("first", "second", "fluorescence")}
    places["damaged"] = folder / "damaged.tif"
    labels = ("tumour", "normal", "normal", "tumour")
    entries = [
        Entry(slide_id=name, path=str(place), label=label)
        for (name, place), label in zip(places.items(), labels, strict=True)
    ]
    write_manifest(folder / "labels.csv", entries)
    rows = [
        {
            "slide_id": name,
            "prediction": "tumour",
            "prob_tumour": 0.9,
            "prob_normal": 0.1,
            "status": "ok",
            "error": "",
        }
        for name in ("first", "second")
    ]
    (folder / "predictions").mkdir()
    write_table(folder / "predictions", rows)
    own = folder / "heatmaps" / "first"
    y, x = np.mgrid[0:50, 0:75]
    heat = 0.2 + 12 * np.exp(-((y - 24) ** 2 + (x - 30) ** 2) / 40)
    write_pyramid(own / MAP, (heat / heat.mean())[None].astype(np.float32), mpp=0.5, downsample=32)
    patches = [Patch(700 + 40 * i, 900 + 30 * i, 96, 0.2, 3.0, 1) for i in range(3)]
    (own / OBJECTS).write_text(json.dumps(to_geojson(patches)))
    (own / REGIONS).write_text(json.dumps(to_geojson([Patch(600, 800, 512, 0.4, 1.0, 2)])))
    (folder / "annotations").mkdir()
    ring = [[400, 500], [1000, 420], [1200, 900], [500, 1000], [400, 500]]
    about = {"name": "focus", "classification": {"name": "Tumour", "color": [200, 0, 0]}}
    drawn = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": about}
    (folder / "annotations" / "first.geojson").write_text(json.dumps(drawn))
    return folder


@pytest.fixture(scope="module")
def serving(cohort):
    cases = cases_of(
        find_slides([str(cohort / "labels.csv")]),
        predictions=[cohort / "predictions"],
        heatmaps=[cohort / "heatmaps"],
        annotations=cohort / "annotations",
        tissue=True,
    )
    with Serving(cases) as serving:
        yield serving


class Page:
    """A page that notes what it complains of and where it asks."""

    def __init__(self, chromium, url, scheme="light"):
        self.context = chromium.new_context(viewport=SIZE, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.complaints, self.asked = [], []
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type != "log" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.url = url

    def open(self, place="#slide=first"):
        self.page.goto(f"{self.url}{place}")
        self.wait()
        return self.page

    def wait(self):
        """Wait until all that is seen is there."""
        self.page.wait_for_function(
            "() => viewer.world.getItemCount() > 0 && viewer.world._items.every((item) => item.getFullyLoaded())"
        )
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


@pytest.fixture
def opened(chromium, serving):
    """Open pages, which must not have complained in the end, of anything but what they are expected to."""
    pages = []

    def make(url=serving.url, **settings):
        pages.append(Page(chromium, url, **settings))
        return pages[-1]

    yield make
    for each in pages:
        each.context.close()


def shown(page):
    """The canvas of the slide as (H, W, 3), without what lies over it."""
    text = page.evaluate(
        "() => { const {width, height} = viewer.drawer.canvas;"
        " const {data} = viewer.drawer.context.getImageData(0, 0, width, height);"
        " let text = ''; for (let i = 0; i < data.length; i += 4) text += String.fromCharCode(data[i], data[i + 1],"
        " data[i + 2]); return [width, height, btoa(text)]; }"
    )
    width, height, data = text
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 3).astype(int)


def expected(place, level, middle_yx, size_yx):
    """(H, W, 3) pixels of a level of a pyramid around a place of the finest level."""
    with Slide(place) as slide:
        scale = slide.levels[level].downsample
        top, left = (round(at / scale - side / 2) for at, side in zip(middle_yx, size_yx, strict=True))
        return np.moveaxis(slide.read(level, (top, left, *size_yx)), 0, -1).astype(int)


def test_it_loads_without_complaints_and_asks_nobody_else(opened, serving, screenshots):
    for scheme in ("light", "dark"):
        each = opened(scheme=scheme)
        page = each.open()
        page.wait_for_selector("#layers .number:text-is('1')")
        page.locator("#cases img").nth(2).evaluate("(image) => image.decode()")
        page.screenshot(path=screenshots / f"view-{scheme}.png")
        # The thumbnail of a damaged slide is refused, which browsers note.
        complaints = [said for said in each.complaints if "422" not in said]
        assert complaints == []
        hosts = {urlsplit(url)[:2] for url in each.asked}
        assert hosts == {urlsplit(serving.url)[:2]}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_zoom_shows_the_pixels_of_the_pyramid(opened, cohort, level):
    each = opened()
    page = each.open(f"#slide=second&x=1200&y=800&zoom={0.5**level}")
    size = page.evaluate("() => [viewer.drawer.canvas.height, viewer.drawer.canvas.width]")
    drawn = shown(page)
    right = expected(cohort / "second.ome.zarr", level, (800, 1200), size)
    inner = np.abs(drawn - right)[20:-20, 20:-20] if level < 2 else np.abs(drawn - right)[180:-180, 350:-350]
    assert inner.mean() < EXACT
    moved = expected(cohort / "second.ome.zarr", level, (800 + 8 * 2**level, 1200), size)
    assert inner.mean() < 0.7 * np.abs(drawn - moved)[180:-180, 350:-350].mean()


def test_a_click_on_a_slide_opens_it(opened, screenshots):
    page = opened().open()
    assert page.locator("#name").inner_text() == "first"
    assert page.locator("#verdict").inner_text() == "label tumour · ✓ predicted tumour 90%"
    page.get_by_role("link", name="second").click()
    page.wait_for_function("() => document.querySelector('#facts').innerText.includes('2,400')")
    assert page.locator("#name").inner_text() == "second"
    assert page.locator("#verdict .wrong").inner_text() == "✗ predicted tumour 90%"
    assert page.locator("#cases a[aria-current]").get_attribute("href") == "#slide=second"
    page.wait_for_function("() => location.hash.startsWith('#slide=second&x=1200&y=800&zoom=')")
    page.get_by_role("link", name="damaged").click()
    page.wait_for_selector("#error:not([hidden])")
    assert "damaged.tif" in page.locator("#error").inner_text()
    page.screenshot(path=screenshots / "view-damaged.png")
    page.get_by_role("link", name="first").click()
    page.wait_for_selector("#attention:not([hidden])")
    assert page.locator("#error").is_hidden()


def test_the_filter_lists_some(opened):
    page = opened().open()
    page.locator("#filter").fill("tumour wrong")
    page.wait_for_function("() => document.querySelector('#cases a').innerText.startsWith('second')")  # a frame later
    assert page.locator("#cases a:visible").all_inner_texts()[0].startswith("second")
    assert page.locator("#count").inner_text() == "1 of 4"


def test_attention_lies_over_the_slide_and_can_be_taken_away(opened, cohort, screenshots):
    each = opened()
    page = each.open("#slide=first&x=976&y=784&zoom=0.5")
    size = page.evaluate("() => [viewer.drawer.canvas.height, viewer.drawer.canvas.width]")
    bare = expected(cohort / "first.ome.zarr", 1, (784, 976), size)
    page.wait_for_function("() => viewer.world.getItemCount() == 2")
    each.wait()
    with_attention = np.abs(shown(page) - bare).mean(-1)
    middle = with_attention[size[0] // 2 - 40 : size[0] // 2 + 40, size[1] // 2 - 40 : size[1] // 2 + 40]
    assert middle.mean() > 30  # the peak lies at x 976, y 784
    page.screenshot(path=screenshots / "view-attention.png")
    page.keyboard.press("a")
    page.wait_for_function("() => viewer.world.getItemAt(1).getOpacity() == 0")
    each.wait()
    assert np.abs(shown(page) - bare)[100:-100, 300:-300].mean() < EXACT
    page.keyboard.press("a")
    page.locator("#threshold").fill("1")
    page.locator("#colours").select_option("viridis")
    page.wait_for_function("() => document.querySelector('#legend').src.endsWith('viridis')")
    assert float(page.locator("#legend-low").inner_text()) > 0.9 * float(page.locator("#legend-high").inner_text())


def test_a_click_on_an_outline_says_what_it_is(opened):
    page = opened().open("#slide=first&x=948&y=748&zoom=1")
    page.wait_for_selector("#layers .number:text-is('3')")
    box = page.locator("#slide").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#notice:not([hidden])")
    assert page.locator("#notice").inner_text() == "sampled patch: drawn 1 times · weight 0.2 · attention 3 · draws 1"
    boxes = page.locator("#layers input")
    page.keyboard.press("o")
    assert [box.is_checked() for box in boxes.all()] == [False] * 4
    page.keyboard.press("o")
    assert [box.is_checked() for box in boxes.all()] == [True] * 4
    page.keyboard.press("t")
    assert [box.is_checked() for box in boxes.all()] == [True, True, True, False]


def test_keys_lead_through_the_slides(opened):
    page = opened().open()
    for key, name in (("n", "second"), ("n", "fluorescence"), ("p", "second")):
        page.keyboard.press(key)
        page.wait_for_function("(name) => document.querySelector('#name').innerText == name", arg=name)
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("l")
    assert page.locator("#list").is_hidden()
    assert page.locator("#list-button").get_attribute("aria-expanded") == "false"


def test_the_way_to_another_slide_is_not_lost_when_the_address_is_written_meanwhile(opened):
    page = opened().open()
    page.evaluate(
        "() => { location.hash = 'slide=second'; history.replaceState(null, '', '#slide=first&x=1&y=1&zoom=1'); }"
    )
    page.wait_for_function("() => document.querySelector('#name').innerText == 'second'", timeout=10_000)


def test_channels_are_chosen_and_stretched(opened, cohort, screenshots):
    each = opened()
    page = each.open("#slide=fluorescence&x=450&y=450&zoom=1")
    assert page.locator("#rows li").count() == 3
    page.get_by_role("button", name="Hide CD3").click()
    page.get_by_role("button", name="Hide CD8").click()
    page.locator("#add").select_option("PanCK")
    page.get_by_role("button", name="Hide DAPI").click()
    page.get_by_label("Darkest value of PanCK").fill("0")
    page.wait_for_function(
        "() => viewer.world._items.some((item) => item.source.getTileUrl(0, 0, 0).includes('channels=3'))"
    )
    page.wait_for_function("() => viewer.world.getItemCount() == 1")
    each.wait()
    page.screenshot(path=screenshots / "view-channels.png")
    channels = page.evaluate("() => viewer.world.getItemAt(0).source.getTileUrl(0, 0, 0)")
    number, colour, low, high = re.search(r"channels=([^&]+)", channels)[1].split("%7E" if "%7E" in channels else "~")
    size = page.evaluate("() => [viewer.drawer.canvas.height, viewer.drawer.canvas.width]")
    values = expected(cohort / "fluorescence.ome.zarr", 0, (450, 450), size)[..., 3]
    light = ((values - float(low)) / (float(high) - float(low))).clip(0, 1)[..., None]
    right = light * np.array(list(bytes.fromhex(colour)))
    inner = np.abs(shown(page) - right)[50:-50, 50:-50]
    assert number == "3"
    assert float(high) > 40_000  # as bright as that channel is
    assert inner.mean() < 2 * EXACT


def test_the_scale_bar_is_right(opened):
    page = opened().open("#slide=first&x=1200&y=800&zoom=1")
    assert page.locator("#scale span").inner_text() == "50 µm"
    assert page.locator("#scale div").evaluate("(bar) => bar.getBoundingClientRect().width") == pytest.approx(
        100, abs=1
    )
    assert page.locator("#place").inner_text() == "20\N{MULTIPLICATION SIGN}"


def test_what_is_scrolled_past_is_given_up(opened, serving):
    """Answers are held back until the view has gone on."""
    each = opened()
    page = each.open("#slide=first&x=300&y=300&zoom=1")
    page.wait_for_timeout(300)
    held, aborted = [], []

    def hold(route):
        held.append(route)

    page.route("**/tiles/0/*", hold)
    page.on("requestfailed", lambda request: aborted.append(request.url))
    page.evaluate("() => viewer.viewport.panTo(new OpenSeadragon.Point(0.45, 0.3), true)")
    page.wait_for_function("() => viewer.imageLoader.jobsInProgress > 0")
    page.evaluate("() => viewer.viewport.panTo(new OpenSeadragon.Point(0.9, 0.6), true)")
    page.wait_for_function("() => viewer.imageLoader.jobsInProgress > 0")
    page.wait_for_timeout(500)
    assert len(aborted) > 0
    page.unroute("**/tiles/0/*")
    for route in held:
        with suppress(Error):  # of those given up
            route.continue_()
    page.evaluate("() => viewer.viewport.panTo(new OpenSeadragon.Point(0.45, 0.3), true)")
    each.wait()  # what was given up is fetched once it is seen again
    assert page.locator("#error").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(opened, scheme):
    """No serious fault of accessibility, as axe-core finds them."""
    page = opened(scheme=scheme).open()
    page.wait_for_selector("#layers .number:text-is('1')")
    for prepare in (lambda: None, lambda: page.keyboard.press("?")):
        prepare()
        found = Axe().run(page).response["violations"]
        assert [
            (each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")
        ] == []


def test_a_cell_of_a_notebook_shows_it(opened, cohort, screenshots, tmp_path):
    weights = np.zeros((16, 24))
    weights[8, 12] = 1
    seen = view(cohort / "first.ome.zarr", attention=weights, height=500)
    (tmp_path / "cell.html").write_text(f"<!doctype html><body style='width:900px'>{seen._repr_html_()}")

    class Files(SimpleHTTPRequestHandler):
        def __init__(self, *given):
            super().__init__(*given, directory=str(tmp_path))

        def log_message(self, *given):
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            page = opened(url=f"http://127.0.0.1:{server.server_address[1]}/").page
            page.goto(f"http://127.0.0.1:{server.server_address[1]}/cell.html")
            frame = page.frame_locator("iframe")
            frame.locator("#facts dd").first.wait_for(state="attached")
            inside = page.frames[1]
            inside.wait_for_function("() => viewer.world.getItemCount() == 2")
            inside.wait_for_function("() => viewer.world._items.every((item) => item.getFullyLoaded())")
            page.screenshot(path=screenshots / "view-notebook.png")
        finally:
            server.shutdown()
            seen.close()
