"""The viewer's server: what it answers, to whom, and what it does not."""

from __future__ import annotations

import hashlib
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image
from starlette.testclient import TestClient

from pipeline.data.discovery import find_slides
from pipeline.data.manifest import Entry, write_manifest
from pipeline.errors import DataError, UsageError
from pipeline.files import file_name
from pipeline.notebook import view
from pipeline.results.drawn import Patch, to_geojson
from pipeline.results.map_files import MAP, OBJECTS, PIXEL_OBJECTS, REGIONS, pyramid
from pipeline.results.table import write_table
from pipeline.view.cohort import cases_of, of_run
from pipeline.view.guard import guarded
from pipeline.view.server import Viewer, application
from pipeline.view.serving import Serving
from pipeline.view.tiles import draw_tile
from pipeline.view.work import Answer, ByteCache, Work
from storage import Slide, write_pyramid

TOKEN = "abc"


def client_of(cases, **settings):
    answers = guarded(application(Viewer(cases, Work(**settings), {})), TOKEN)
    return TestClient(answers, base_url=f"http://127.0.0.1/{TOKEN}/")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Manifest, predictions, heatmaps and annotations: two slides, a damaged and a missing one."""
    folder = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:700, 0:900]
    pixels = np.repeat((150 + y / 14 + x / 20 + rng.normal(0, 1, y.shape))[None], 3, 0).astype(np.uint8)
    pixels[1, 200:500, 300:700] //= 2  # stained
    write_pyramid(folder / "good.ome.zarr", pixels, mpp=0.5)
    write_pyramid(folder / "four.ome.zarr", rng.integers(0, 999, (4, 300, 500)).astype(np.uint16))
    (folder / "damaged.tif").write_bytes(b"II*\0" + bytes(100))
    names = {"good": "good.ome.zarr", "a/b": "four.ome.zarr", "damaged": "damaged.tif", "gone": "gone.tif"}
    entries = [
        Entry(slide_id=name, path=str(folder / path), label=label)
        for (name, path), label in zip(names.items(), ("yes", "no", "no", ""), strict=True)
    ]
    write_manifest(folder / "labels.csv", entries)
    rows = [
        {
            "slide_id": name,
            "label": "",
            "prediction": "yes",
            "prob_yes": 0.75,
            "prob_no": 0.25,
            "status": "ok",
            "error": "",
        }
        for name in ("good", "a/b")
    ]
    failed = {"prediction": None, "prob_yes": None, "prob_no": None, "status": "failed", "error": "it is damaged"}
    (folder / "run" / "test").mkdir(parents=True)
    write_table(folder / "run" / "test", [*rows, rows[0] | {"slide_id": "damaged"} | failed])
    own = folder / "run" / "maps" / "good"
    heat = np.full((1, 70, 90), 0.5, np.float32)
    heat[:, 20:50, 30:70] = 4
    write_pyramid(own / MAP, heat, mpp=0.5, downsample=10)
    added = np.full((1, 70, 90), np.nan, np.float32)
    added[:, 20:50, 30:50], added[:, 20:50, 50:70] = 0.5, -0.25
    write_pyramid(own / pyramid("contribution"), added, mpp=0.5, downsample=10)
    (own / OBJECTS).write_text(
        json.dumps(to_geojson([Patch(300, 200, 64, 0.5, 0.25, 2), Patch(690, 890, 64, 0, 0, 1)]))
    )
    (own / REGIONS).write_text(json.dumps(to_geojson([Patch(200, 100, 256, 0.5, 0.25, 2)])))
    (folder / "annotations").mkdir()
    ring = [[10, 20], [110, 20], [110, 220], [10, 20]]
    drawn = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"name": "<b>mine</b>", "classification": {"name": "Tumour", "color": [200, 0, 10]}},
    }
    point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [5, 5]}, "properties": {}}
    (folder / "annotations" / "good.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": [drawn, point]})
    )
    return folder


@pytest.fixture(scope="module")
def cases(cohort):
    predictions, heatmaps = of_run(cohort / "run")
    return cases_of(
        find_slides([str(cohort / "labels.csv")]),
        predictions=predictions,
        heatmaps=heatmaps,
        annotations=cohort / "annotations",
        tissue=True,
    )


@pytest.fixture(scope="module")
def client(cases):
    with client_of(cases) as client:
        yield client


def picture(answer):
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content)))


class TestAnswers:
    def test_the_list_has_labels_and_predictions(self, client):
        assert client.get("slides").json() == [
            {"id": "good", "label": "yes", "prediction": "yes", "probability": 0.75, "error": ""},
            {"id": "a/b", "label": "no", "prediction": "yes", "probability": 0.75, "error": ""},
            {"id": "damaged", "label": "no", "prediction": "", "probability": None, "error": "it is damaged"},
            {"id": "gone", "label": "", "prediction": "", "probability": None, "error": ""},
        ]

    def test_a_slide_tells_what_it_is(self, client):
        good, four = (client.get(f"slides/{number}").json() for number in (0, 1))
        assert (good["height"], good["width"], good["halvings"], good["pixel_um"]) == (700, 900, 2, 0.5)
        assert good["probabilities"] == {"yes": 0.75, "no": 0.25}
        assert good["outlines"] == ["patches", "regions", "annotations", "tissue"]
        assert good["maps"] == ["attention", "contribution"]
        assert good["colours"]
        assert good["remark"] == ""
        assert (four["type"], four["channels"], four["range"]) == ("uint16", ["0", "1", "2", "3"], [0, 65535])
        assert (four["outlines"], four["maps"], four["pixel_um"]) == ([], [], None)
        assert [each["number"] for each in four["look"]] == [0, 1, 2]
        assert four["ranges"] == [pytest.approx([5, 997], abs=4)] * 4

    def test_a_tile_shows_the_slide(self, client, cohort):
        with Slide(cohort / "good.ome.zarr") as slide:
            expected = np.moveaxis(slide.read(1, (0, 256, 256, 194)), 0, -1).astype(int)
        drawn = picture(client.get("slides/0/tiles/1/0_1"))
        assert drawn.shape == (256, 194, 3)
        assert np.abs(drawn - expected).mean() < 2  # JPEG of noise

    def test_a_look_changes_a_tile(self, client, cohort):
        with Slide(cohort / "four.ome.zarr") as slide:
            third = slide.read(0, (0, 0, 256, 256))[3].astype(float)
        drawn = picture(client.get("slides/1/tiles/0/0_0?channels=3~00ff00~0~500&gamma=1"))
        assert np.abs(drawn[..., 1] - (third / 500 * 255).clip(0, 255)).mean() < 8  # JPEG of noise
        assert drawn[..., 0].mean() < 12

    def test_a_thumbnail_is_small(self, client):
        drawn = picture(client.get("slides/0/thumbnail"))
        assert drawn.shape == (175, 225, 3)
        assert client.get("slides/0/thumbnail").headers["cache-control"] == "no-store"

    def test_contribution_is_red_where_it_adds_and_blue_where_it_takes(self, client):
        about = client.get("slides/0/maps/contribution").json()
        assert about["colour_maps"] == ["coolwarm"]
        assert (about["low"], about["high"]) == pytest.approx((0.01, 0.5))
        drawn = picture(client.get("slides/0/maps/contribution/0/0_0")).astype(int)
        (red, _, blue, opacity), (other_red, _, other_blue, less) = drawn[30, 40], drawn[30, 60]
        assert red > blue + 50
        assert other_blue > other_red + 50
        assert opacity == 255 > less > 0
        assert drawn[5, 5, 3] == 0  # nothing was computed there
        refused = client.get("slides/0/maps/contribution/0/0_0?colours=inferno")
        assert "not how attention can be shown" in refused.json()["error"]

    def test_attention_lies_over_the_slide(self, client):
        about = client.get("slides/0/maps/attention").json()
        assert (about["height"], about["width"], about["pitch"]) == (70, 90, 10)
        assert (about["low"], about["high"]) == (1, 4)
        drawn = picture(client.get("slides/0/maps/attention/0/0_0"))
        shown = drawn[..., 3] > 0
        assert shown[20:50, 30:70].all()
        assert shown.sum() == 30 * 40
        higher = picture(client.get("slides/0/maps/attention/0/0_0?colours=viridis&low=3.9&high=4"))
        assert (higher[25, 35] != drawn[25, 35]).any() or (higher[25, 35, 3] == drawn[25, 35, 3])
        assert not picture(client.get("slides/0/maps/attention/0/0_0?low=5&high=6"))[..., 3].any()

    def test_outlines(self, client):
        patches = client.get("slides/0/outlines/patches").json()
        assert patches["left_out"] == 0
        assert patches["objects"][0] == {
            "name": "sampled patch: drawn 2 times",
            "colour": "#e63c1e",
            "rings": [[200, 300, 264, 300, 264, 364, 200, 364, 200, 300]],
            "measurements": {"weight": 0.5, "attention": 0.25, "draws": 2},
        }
        assert len(client.get("slides/0/outlines/regions").json()["objects"]) == 1
        mine = client.get("slides/0/outlines/annotations").json()
        assert mine["left_out"] == 1
        assert (mine["objects"][0]["name"], mine["objects"][0]["colour"]) == ("Tumour: <b>mine</b>", "#c8000a")

    def test_tissue_is_found(self, client):
        [found] = client.get("slides/0/outlines/tissue").json()["objects"]
        ring = np.array(found["rings"][0]).reshape(-1, 2)
        assert np.abs([*ring.min(0), *ring.max(0)] - np.array([300, 200, 700, 500])).max() < 60

    def test_a_colour_map(self, client):
        assert picture(client.get("colours/inferno")).shape == (1, 256, 4)
        assert client.get("colours/nothing").status_code == 404

    def test_the_page_and_what_it_loads(self, client):
        page = client.get("").text
        for name in re.findall(r'(?:src|href)="(static/[^"]+)"', page):
            assert client.get(name).status_code == 200
        for script in Path(__file__).parents[2].glob("pipeline/view/static/*.js"):
            for name in re.findall(r'from "\./([^"]+)"', script.read_text()):
                assert client.get(f"static/{name}").headers["content-type"].startswith("text/javascript")

    def test_what_is_of_others_is_listed_as_it_is(self):
        root = Path(__file__).parents[2]
        row = re.compile(r"^\| `([^`]+)` \|.*sha256 `(\w{64})`.*`([^`]+LICENSE[^`]*)`", re.MULTILINE)
        listed = row.findall((root / "THIRD_PARTY.md").read_text())
        assert [place for place, *_ in listed] == ["pipeline/view/static/openseadragon.min.js"]
        for place, digest, licence in listed:
            assert hashlib.sha256((root / place).read_bytes()).hexdigest() == digest
            assert "Redistribution" in (root / licence).read_text()

    def test_a_slide_of_a_bucket(self, s3, cohort):
        for path in sorted((cohort / "good.ome.zarr").rglob("*")):
            if path.is_file():
                s3.put(f"good.ome.zarr/{path.relative_to(cohort / 'good.ome.zarr')}", path.read_bytes())
        [entry] = find_slides([s3.url])
        with (
            client_of(cases_of([entry])) as remote,
            client_of(cases_of(find_slides([str(cohort / "good.ome.zarr")]))) as here,
        ):
            for path in ("slides/0/tiles/1/0_1", "slides/0/thumbnail"):
                assert np.array_equal(picture(remote.get(path)), picture(here.get(path)))


class TestFailures:
    @pytest.mark.parametrize(
        ("number", "words"), [(2, "damaged.tif"), (3, "gone.tif: does not exist; check the path")]
    )
    @pytest.mark.parametrize("what", ["", "/thumbnail", "/tiles/0/0_0"])
    def test_a_bad_slide_says_why_and_others_go_on(self, client, number, words, what):
        answer = client.get(f"slides/{number}{what}")
        assert answer.status_code == 422
        assert words in answer.json()["error"]
        assert client.get("slides/0/tiles/2/0_0").status_code == 200

    @pytest.mark.parametrize(
        ("path", "words"),
        [
            ("slides/0/tiles/0/3_0", "no tile 0/3_0"),
            ("slides/0/tiles/3/0_0", "no tile 3/0_0"),
            ("slides/0/tiles/99999999999/0_0", "no tile"),
            ("slides/0/tiles/0/0_0?channels=9~ff0000~0~1", "not how this slide can be shown"),
            ("slides/0/maps/attention/0/0_0?low=-1", "not how attention can be shown"),
            ("slides/1/maps/attention", "has no attention map"),
            ("slides/1/outlines/patches", "has no patches"),
            ("slides/1/outlines/tissue", "has no tissue"),
            ("slides/0/outlines/nothing", "has no nothing"),
        ],
    )
    def test_what_is_not_there(self, client, path, words):
        answer = client.get(path)
        assert answer.status_code == 422
        assert words in answer.json()["error"]

    @pytest.mark.parametrize(
        "path", ["slides/4", "slides/-1", "slides/0/tiles/0/a_0", "slides/0/", "nothing", "static/"]
    )
    def test_unknown_addresses(self, client, path):
        answer = client.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]

    def test_layers_of_another_slide(self, cohort, tmp_path):
        own = tmp_path / "maps" / "good"
        write_pyramid(own / MAP, np.ones((1, 70, 99), np.float32), mpp=0.5, downsample=10)
        (own / OBJECTS).write_text(json.dumps(to_geojson([Patch(300, 950, 64, 0.5, 0.25, 2)])))
        (own / REGIONS).write_text("no JSON")
        cases = cases_of(find_slides([str(cohort / "good.ome.zarr")]), heatmaps=[tmp_path / "maps"])
        with client_of(cases) as client:
            assert "lies over 700 x 990 pixels" in client.get("slides/0/maps/attention").json()["error"]
            assert "off the slide" in client.get("slides/0/outlines/patches").json()["error"]
            assert "is not JSON" in client.get("slides/0/outlines/regions").json()["error"]

    def test_a_fault_of_ours_is_an_answer_too(self, cases, monkeypatch):
        monkeypatch.setattr("pipeline.view.server.paint.encode", lambda _: 1 / 0)
        with client_of(cases) as client:
            answer = client.get("slides/0/thumbnail")
        assert answer.status_code == 422
        assert "internal error: ZeroDivisionError" in answer.json()["error"]


class TestWhoMayAsk:
    def test_without_the_token_nobody(self, client):
        for path in ("/", "/slides", "/abd/slides", f"/{TOKEN}", f"/{TOKEN}x/slides", "/é/slides", "/static/main.js"):
            answer = client.get(f"http://127.0.0.1{path}", follow_redirects=False)
            assert answer.status_code == 403

    @pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "127.0.0.2"])
    def test_by_another_name_nobody(self, client, host):
        assert client.get("slides", headers={"Host": host}).status_code == 400
        assert client.get("slides", headers={"Host": "localhost:1234"}).status_code == 200

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
    def test_nothing_can_be_changed(self, client, method):
        assert client.request(method, "slides").status_code == 405
        assert client.request("HEAD", "slides").status_code == 200

    @pytest.mark.parametrize(
        "path",
        [
            "static/../server.py",
            "static/..%2fserver.py",
            "static/%2e%2e/server.py",
            "static//etc/passwd",
            "slides/0/outlines/..%2f..%2flabels.csv",
            "slides/..%2f..",
        ],
    )
    def test_no_file_outside_the_page(self, client, path):
        assert client.get(path).status_code in (404, 422)

    def test_the_page_loads_from_here_alone(self, client):
        for path in ("", "slides", "slides/0/thumbnail", "nothing", "static/main.js"):
            headers = client.get(path).headers
            policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            assert policy["script-src"] == policy["connect-src"] == policy["img-src"] == "'self'"
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["x-content-type-options"] == "nosniff"

    def test_pictures_do_not_stay_in_a_browser(self, client):
        for path in ("slides/0", "slides/0/tiles/0/0_0", "slides/0/maps/attention/0/0_0", "slides/2"):
            assert client.get(path).headers["cache-control"] == "no-store"


@pytest.mark.data
class TestPrivacy:
    def all_answers(self, client):
        about = client.get("slides/0").json()
        yield json.dumps(client.get("slides").json()) + json.dumps(about)
        for halvings in range(about["halvings"] + 1):
            yield client.get(f"slides/0/tiles/{halvings}/0_0").content.decode("latin-1")

    def test_label_and_overview_photographs_are_not_shown(self, data):
        place = data / "CMU-1-Small-Region.svs"
        with openslide.OpenSlide(place) as slide, client_of(cases_of(find_slides([str(place)]))) as client:
            assert {"label", "macro"} <= set(slide.associated_images)
            about = client.get("slides/0").json()
            assert (about["width"], about["height"]) == slide.dimensions
            assert not {"label", "macro"} & set(re.findall(r"\w+", json.dumps(about["outlines"])))
            whole = picture(client.get("slides/0/thumbnail")).astype(int)
            ours = np.asarray(slide.get_thumbnail(whole.shape[1::-1]).resize(whole.shape[1::-1]))
            assert np.abs(whole - ours).mean() < 12  # it is the slide that is shown

    def test_fields_about_a_patient_are_not_told(self, data, tmp_path):
        secrets = {0x0010: (b"PN", "SECRET^NAME "), 0x0020: (b"LO", "SECRET-ID-42"), 0x0040: (b"CS", "SECRETSEX ")}
        fields = b"".join(
            struct.pack("<HH2sH", 0x0010, element, kind, len(text)) + text.encode()
            for element, (kind, text) in secrets.items()
        )
        place = tmp_path / "series"
        place.mkdir()
        for file in (data / "wsi-flavours" / "dicom-cmu-1-small-region").iterdir():
            content = file.read_bytes()
            at = content.index(
                struct.pack("<HH", 0x0020, 0x000D) + b"UI"
            )  # the first field after the patient's group
            (place / file.name).write_bytes(content[:at] + fields + content[at:])
        with openslide.OpenSlide(min(place.iterdir())) as slide:
            assert slide.properties["dicom.PatientName"] == "SECRET^NAME"  # whoever reads the file by OpenSlide knows
        with client_of(cases_of(find_slides([str(place)]))) as client:
            assert client.get("slides/0").status_code == 200
            assert not [answer for answer in self.all_answers(client) if "SECRET" in answer]


class TestWork:
    def test_what_was_made_is_kept(self, cases, monkeypatch):
        made = []
        draw = Viewer._draw
        monkeypatch.setattr(Viewer, "_draw", lambda *values: made.append(None) or draw(*values))
        with client_of(cases) as client:
            first, second = (client.get("slides/0/tiles/1/0_0").content for _ in range(2))
            client.get("slides/0/tiles/1/0_0?gamma=2")
        assert first == second
        assert len(made) == 2

    def test_what_is_kept_has_a_size(self):
        cache = ByteCache(1000)
        for number in range(100):
            cache.put(f"{number:03}", Answer(bytes(97)))
        cache.put("large", Answer(bytes(2000)))
        assert len(cache) == 10
        assert cache.get("090")
        cache.put("new", Answer(bytes(97)))
        assert cache.get("090")
        assert cache.get("091") is None
        assert cache.get("large") is None

    def test_a_client_that_goes_ends_its_work(self, cases, monkeypatch):
        begun, ended = threading.Event(), threading.Event()

        def endless(_slide, _tile, _paint, check):
            begun.set()
            try:
                while True:
                    check()
                    time.sleep(0.01)
            finally:
                ended.set()

        monkeypatch.setattr("pipeline.view.server.tiles.draw_tile", endless)
        with Serving(cases) as serving:
            host, path = re.fullmatch(r"http://(127\.0\.0\.1:\d+)(/.*)", serving.url).groups()
            with socket.create_connection(("127.0.0.1", int(host.split(":")[1]))) as connection:
                connection.sendall(f"GET {path}slides/0/tiles/0/0_0 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                assert begun.wait(60)
                assert not ended.is_set()
            assert ended.wait(60)
            assert json.load(urllib.request.urlopen(f"{serving.url}slides"))[0]["id"] == "good"

    @pytest.mark.parametrize(("cost", "at_once"), [(1e12, 1), (1, 6)])
    def test_one_slide_leaves_room_for_others(self, cases, monkeypatch, cost, at_once):
        """One has no coarse levels, or lies on a server that does not answer, and another is shown meanwhile."""
        going, begun = threading.Event(), []
        monkeypatch.setattr(
            "pipeline.view.server.tiles.cost", lambda slide, _: cost if "four" in slide.location else 1
        )

        def slow(slide, tile, how, check):
            begun.append(slide.location)
            while "four" in slide.location and not going.wait(0.01):
                check()
            return draw_tile(slide, tile, how, check)

        monkeypatch.setattr("pipeline.view.server.tiles.draw_tile", slow)
        with Serving(cases) as serving, ThreadPoolExecutor(40) as clients:

            def status(path):
                return urllib.request.urlopen(serving.url + path).status

            paths = [f"slides/1/tiles/0/{row}_{column}" for row in range(2) for column in range(2)] * 10
            answers = [clients.submit(status, path) for path in paths]
            while len(begun) < at_once:
                time.sleep(0.01)
            assert status("slides/0/tiles/0/0_0") == 200
            assert len(begun) == at_once + 1
            going.set()
            assert [answer.result() for answer in answers] == [200] * 40

    def test_no_thumbnail_of_what_takes_long(self, cases, monkeypatch):
        monkeypatch.setattr("pipeline.view.server.LONG", 1000)
        with client_of(cases) as client:
            assert "stores no level coarser than 1:16" in client.get("slides/0").json()["remark"]
            assert "stores no level" in client.get("slides/0/thumbnail").json()["error"]


class TestCohort:
    def test_slides_of_any_kind_in_a_folder(self, cohort, tmp_path):
        (tmp_path / "a").mkdir()
        for name in ("x.png", "a/x.png", "y.jpg", "notes.txt"):
            (tmp_path / name).touch()
        (tmp_path / "p.ome.zarr").symlink_to(cohort / "good.ome.zarr")
        (tmp_path / "series").mkdir()
        (tmp_path / "series" / "1.dcm").touch()
        found = find_slides([str(tmp_path)])
        assert {entry.slide_id for entry in found} == {"x.png", "a/x.png", "y", "p", "series"}
        assert len(find_slides([str(tmp_path), str(tmp_path / "y.jpg")])) == 5

    def test_names_differ_whatever_is_given(self, tmp_path):
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "x.png").touch()
        found = find_slides([str(tmp_path / "a"), str(tmp_path / "b")])
        assert [entry.slide_id for entry in found] == [entry.path for entry in found]

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"predictions": ["{cohort}/run/maps"]}, "no predictions.parquet here"),
            ({"predictions": ["{other}"]}, "no prediction of good"),
            ({"heatmaps": ["{cohort}/run/test"]}, "no heatmap of good and 3 others here"),
            (
                {"annotations": "{cohort}/run"},
                r"no outlines of good and 3 others here; name them as in good\.geojson",
            ),
        ],
    )
    def test_folders_of_something_else(self, cohort, tmp_path, settings, words):
        row = {"slide_id": "other", "prediction": "yes", "prob_yes": 1.0, "status": "ok", "error": ""}
        write_table(tmp_path, [row])

        def at(place):
            return Path(place.format(cohort=cohort, other=tmp_path))

        placed = {name: [at(one) for one in of] if isinstance(of, list) else at(of) for name, of in settings.items()}
        with pytest.raises(UsageError, match=words):
            cases_of(find_slides([str(cohort / "labels.csv")]), **placed)

    def test_a_run_without_anything(self, tmp_path):
        with pytest.raises(UsageError, match="no predictions and no heatmaps in it"):
            of_run(tmp_path)

    def test_patches_in_pixels_come_before_those_in_degrees(self, cohort, tmp_path):
        own = tmp_path / file_name("good")
        write_pyramid(own / MAP, np.ones((1, 70, 90), np.float32), mpp=0.5, downsample=10)
        for name in (OBJECTS, PIXEL_OBJECTS):
            (own / name).touch()
        [case] = cases_of(find_slides([str(cohort / "good.ome.zarr")]), heatmaps=[tmp_path])
        assert case.outlines["patches"].endswith(PIXEL_OBJECTS)

    def test_where_cases_were_predicted_slides_have_the_answer_of_theirs(self, tmp_path):
        write_table(tmp_path, [{"slide_id": "p1", "prediction": "yes", "prob_yes": 1.0, "status": "ok", "error": ""}])
        (tmp_path / "predict.json").write_text('{"settings": {"unit": "case"}}')
        entries = [
            Entry(slide_id=name, path=name, case_id=case) for name, case in (("a", "p1"), ("b", "p1"), ("p1", "p2"))
        ]
        found = cases_of(entries, predictions=[tmp_path])
        assert [case.prediction for case in found] == ["yes", "yes", ""]

    def test_a_mask_of_the_manifest_is_outlined(self, cohort, tmp_path):
        mask = np.zeros((70, 90), np.uint8)
        mask[10:30, 20:60] = 255
        Image.fromarray(mask).save(tmp_path / "mask.png")
        entry = Entry(slide_id="good", path=str(cohort / "good.ome.zarr"), mask=str(tmp_path / "mask.png"))
        with client_of(cases_of([entry])) as client:
            [found] = client.get("slides/0/outlines/tissue").json()["objects"]
        ring = np.array(found["rings"][0]).reshape(-1, 2)
        assert np.allclose([ring.min(0), ring.max(0)], [[200, 100], [600, 300]], atol=6)


# A shell that began the tests in the background has had SIGINT ignored, which children inherit.
LISTENING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from pipeline.cli.app import main
main()
"""


class TestCommand:
    def test_prints_its_address_and_ends_by_ctrl_c(self, cohort):
        command = [sys.executable, "-c", LISTENING, "view", str(cohort / "labels.csv"), "--no-browser"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout
            url = process.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{43}/", url)
            assert len(json.load(urllib.request.urlopen(f"{url}slides"))) == 4
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 0
        assert said.splitlines()[-1] == "ended"
        assert "Traceback" not in said

    def test_a_port_that_is_taken(self, cases):
        with Serving(cases) as serving:
            port = int(serving.url.split(":")[2].split("/")[0])
            with pytest.raises(UsageError, match=f"--port {port}: cannot be used"):
                Serving(cases, port=port)

    def test_a_browser_is_opened_by_a_file_of_the_users_own(self, monkeypatch):
        from pipeline.view.browser import open_browser

        opened = []
        monkeypatch.setenv("DISPLAY", ":0")
        monkeypatch.setattr("webbrowser.open", opened.append)
        open_browser("http://127.0.0.1:1/secret/")
        [address] = opened
        place = Path(address.removeprefix("file://"))
        assert place.stat().st_mode & 0o077 == 0
        assert "secret" not in address
        assert "url=http://127.0.0.1:1/secret/" in place.read_text()
        place.unlink()


class TestNotebook:
    def test_a_cell_shows_the_page(self, cohort):
        with Slide(cohort / "good.ome.zarr") as slide:
            shown = view(
                slide, attention=cohort / "run" / "maps" / "good", annotations=cohort / "annotations" / "good.geojson"
            )
        assert f'src="{shown.url}"' in shown._repr_html_()
        answer = urllib.request.urlopen(shown.url)
        assert "frame-ancestors http://127.0.0.1:* http://localhost:*" in answer.headers["Content-Security-Policy"]
        about = json.load(urllib.request.urlopen(f"{shown.url}slides/0"))
        assert about["maps"] == ["attention", "contribution"]
        assert about["outlines"] == ["patches", "regions", "annotations"]
        shown.close()
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(shown.url)

    def test_an_array_is_attention(self, cohort):
        weights = np.ones((7, 9))
        weights[2, 3] = 11
        shown = view(cohort / "good.ome.zarr", attention=weights)
        try:
            about = json.load(urllib.request.urlopen(f"{shown.url}slides/0/maps/attention"))
            assert about["pitch"] == 100
            assert about["high"] == pytest.approx(11 / weights.mean())
            drawn = np.asarray(Image.open(urllib.request.urlopen(f"{shown.url}slides/0/maps/attention/0/0_0")))
            assert np.argwhere(drawn[..., 3]).tolist() == [[2, 3]]
        finally:
            shown.close()

    @pytest.mark.parametrize("attention", [np.zeros((3, 4)), np.ones(3), -np.ones((3, 4)), np.full((3, 4), np.nan)])
    def test_what_is_no_attention(self, cohort, attention):
        with pytest.raises(DataError, match="give an array"):
            view(cohort / "good.ome.zarr", attention=attention)

    def test_a_place_that_is_not_there(self, cohort):
        with pytest.raises(UsageError, match="does not exist"):
            view(cohort / "good.ome.zarr", attention=cohort / "nowhere")
