"""Photographs of label and glass, and what a file says of its patient, reach nothing that is written or shown.

Two kinds of slides have what must not be seen: SVS with a label and a macro photograph of one colour that is nowhere
else, and names in the description; and a DICOM file with the fields of a patient. A model is trained, and all that
the commands write, and all that the viewer answers, is searched.
"""

from __future__ import annotations

import base64
import io
import json
import re
import struct
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image, UnidentifiedImageError
from starlette.testclient import TestClient

from pipeline.config import parse_config
from pipeline.data.manifest import Entry
from pipeline.results.card import export_model
from pipeline.results.evaluate import evaluate
from pipeline.results.heatmap import heatmaps
from pipeline.results.predict import predict
from pipeline.results.report import report
from pipeline.results.settings import prediction_settings
from pipeline.training.train import train
from pipeline.view.cohort import cases_of
from pipeline.view.guard import guarded
from pipeline.view.server import Viewer, application
from pipeline.view.work import Work
from storage import Slide, convert

from .conftest import SMALL

pytestmark = pytest.mark.data
SECRETS = ("DOE^JANE", "MRN-4711", "19700102", "DR-WHO")
MAGENTA = (255, 0, 255)  # of label and macro
LONG = (
    b"OB",
    b"OD",
    b"OF",
    b"OL",
    b"OW",
    b"SQ",
    b"UC",
    b"UN",
    b"UR",
    b"UT",
)  # value representations of 32-bit lengths
UNDEFINED, SEQUENCE_END = 0xFFFFFFFF, b"\xfe\xff\xdd\xe0\0\0\0\0"


def write_svs(path: Path, seed: int) -> None:
    """A slide like Aperio's: tissue, a thumbnail, a label and a macro, with names in the descriptions."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(200, 250, (512, 640, 3), dtype=np.uint8)
    pixels[150:300, 200:400] = rng.integers(90, 140, (150, 200, 3), dtype=np.uint8)
    secrets = "|".join(f"Field{number} = {secret}" for number, secret in enumerate(SECRETS))
    told = f"Aperio Image Library v12\n640x512 (256x256) |AppMag = 20|MPP = 0.5|{secrets}"
    photograph = np.full((120, 200, 3), MAGENTA, np.uint8)
    with tifffile.TiffWriter(path) as tif:
        tif.write(pixels, tile=(256, 256), photometric="rgb", description=told, metadata=None)
        tif.write(pixels[::4, ::4], photometric="rgb", description="Aperio\nthumbnail", metadata=None)
        for name, kind in (("label", 1), ("macro", 9)):
            told = f"Aperio Image Library\n{name} 200x120 {SECRETS[0]}"
            tif.write(photograph, photometric="rgb", description=told, metadata=None, subfiletype=kind)


def identify(source: Path, target: Path) -> None:
    """Copy a DICOM file with the name, number and birthday of a patient and the name of a physician in it."""
    data = source.read_bytes()
    place = 132  # behind the preamble and the magic; explicit lengths, little endian, as these files are
    assert data[128:132] == b"DICM"
    while struct.unpack_from("<H", data, place)[0] < 0x10:
        kind = data[place + 4 : place + 6]
        form, at = ("<I", place + 8) if kind in LONG else ("<H", place + 6)
        [length] = struct.unpack_from(form, data, at)
        place = at + struct.calcsize(form)
        place = data.index(SEQUENCE_END, place) + len(SEQUENCE_END) if length == UNDEFINED else place + length

    def element(group: int, number: int, kind: bytes, value: str) -> bytes:
        text = value.encode() + b" " * (len(value) % 2)
        return struct.pack("<HH2sH", group, number, kind, len(text)) + text

    name, number, birthday, _ = SECRETS
    patient = element(0x10, 0x10, b"PN", name) + element(0x10, 0x20, b"LO", number)
    target.write_bytes(data[:place] + patient + element(0x10, 0x30, b"DA", birthday) + data[place:])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private")
    entries = []
    for number in range(4):
        write_svs(folder / f"s{number}.svs", number)
        split = "train" if number < 2 else "test"
        label = ("bar", "box")[number % 2]
        entries.append(Entry(slide_id=f"s{number}", path=str(folder / f"s{number}.svs"), label=label, split=split))
    return folder, entries


@pytest.fixture(scope="module")
def dicom(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dicom")
    for each in (data / "wsi-flavours" / "dicom-cmu-1-small-region").glob("*.dcm"):
        identify(each, folder / each.name)
    return Entry(slide_id="d", path=str(folder / "level-0-frames-0-30.dcm"), label="box", split="test")


@pytest.fixture(scope="module")
def written(cohort, dicom, tmp_path_factory):
    """Run, predictions, heatmaps, report, exported model with its card, and a pyramid."""
    _, entries = cohort
    out = tmp_path_factory.mktemp("written")
    config = parse_config({**SMALL, "train": {"epochs": 1, "batch_size": 2}}, "")
    train(entries, config, out / "run")
    tested = [*entries[2:], dicom]
    rows = predict(tested, out / "run", out / "predictions")
    assert [row["status"] for row in rows] == ["ok"] * 3
    evaluate(out / "predictions")
    drawn = heatmaps(tested, prediction_settings(out / "run"), out / "heatmaps")
    assert not any(one.error for one in drawn)
    report(out / "run", out / "predictions", out / "page.html", heatmaps=out / "heatmaps")
    export_model(out / "run", out / "exported", [out / "predictions"])
    for entry in tested[1:]:
        convert(entry.path, out / f"{entry.slide_id}.ome.zarr")
    return out


@pytest.fixture(scope="module")
def answers(cohort, dicom, written):
    """Everything that the viewer's page asks for."""
    cases = cases_of([*cohort[1][2:], dicom], predictions=[written / "predictions"], heatmaps=[written / "heatmaps"])
    found = []
    with TestClient(
        guarded(application(Viewer(cases, Work(), {})), "abc"), base_url="http://127.0.0.1/abc/"
    ) as client:
        for number in range(len(cases)):
            about = client.get(f"slides/{number}").json()
            asked = ["", "/thumbnail", "/maps/attention", *(f"/outlines/{name}" for name in about["outlines"])]
            for halvings in range(about["halvings"] + 1):
                side = about["tile"] * 2**halvings
                rows, columns = (-(-about[name] // side) for name in ("height", "width"))
                asked += [f"/tiles/{halvings}/{row}_{column}" for row in range(rows) for column in range(columns)]
            for path in asked:
                answer = client.get(f"slides/{number}{path}")
                assert answer.status_code == 200, answer.text
                found.append((path, answer.content))
        found.append(("list", client.get("slides").content))
    return found


def test_the_slides_do_have_it(cohort, dicom):
    """Otherwise nothing would be tested."""
    with openslide.OpenSlide(cohort[1][0].path) as slide:
        assert {"label", "macro"} <= set(slide.associated_images)
        assert slide.associated_images["label"].getpixel((9, 9))[:3] == MAGENTA
        assert all(secret in json.dumps(dict(slide.properties)) for secret in SECRETS)
    with openslide.OpenSlide(dicom.path) as slide:
        assert SECRETS[0] in json.dumps(dict(slide.properties))


def search(name: str, content: bytes) -> None:
    """Fail where a text has a secret in it, or a picture the colour of the photographs."""
    for secret in SECRETS:
        for encoding in ("utf-8", "utf-16-le"):
            assert secret.encode(encoding) not in content, (name, secret)
    for part in re.findall(rb"base64,([A-Za-z0-9+/=]{100,})", content):
        look_at(name, base64.b64decode(part))
    look_at(name, content)


def look_at(name: str, content: bytes) -> None:
    try:
        with Image.open(io.BytesIO(content)) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
    except UnidentifiedImageError:
        return
    assert not magenta(pixels).any(), name


def magenta(pixels: np.ndarray) -> np.ndarray:
    """Where pixels (..., 3) are of the colour of the photographs, as a JPEG may have changed it."""
    return np.abs(pixels - np.array(MAGENTA)).max(-1) < 60


def test_what_is_written_has_none_of_it(written):
    files = [path for path in written.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    wanted = {
        "run.json",
        "predictions.csv",
        "look.json",
        "thumbnail.jpg",
        "overlay.png",
        "patches.geojson",
        "page.html",
    }
    assert wanted | {"README.md", "s3.html", "d.html"} <= names
    for path in files:
        search(str(path.relative_to(written)), path.read_bytes())


def test_what_the_viewer_answers_has_none_of_it(answers):
    assert len(answers) > 20
    for name, content in answers:
        search(name, content)


def test_no_level_and_no_pyramid_is_a_photograph(cohort, dicom, written):
    for place in (cohort[1][3].path, dicom.path, *map(str, written.glob("*.ome.zarr"))):
        with Slide(place) as slide:
            for number, level in enumerate(slide.levels):
                pixels = slide.read(number, (0, 0, *level.shape_yx)).transpose(1, 2, 0).astype(int)
                assert not magenta(pixels).any(), (place, number)


def test_the_search_finds_what_is_there(cohort):
    """A search that finds nothing anywhere would pass too."""
    path = Path(cohort[1][0].path)
    with pytest.raises(AssertionError, match="DOE"):
        search("svs", path.read_bytes())
    with openslide.OpenSlide(path) as slide:
        buffer = io.BytesIO()
        slide.associated_images["label"].convert("RGB").save(buffer, "JPEG")
    with pytest.raises(AssertionError, match="page"):
        search("page", b'<img src="data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()) + b'">')
