"""Every bad input of `tests/corpus`, and sound ones with bytes changed, in a process of little memory and time."""

import json
import os
import selectors
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from zarr.codecs import Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

from storage import ConvertOptions, Slide, StorageError, convert, open_image, write_pyramid

from .test_foreign import write_foreign

CORPUS = Path(__file__).parent.parent / "corpus"
SECONDS = 60.0  # for one request, on a busy machine
MAX_GROWTH = 256 * 2**20  # bytes above the imports, at the first look
ACCEPTED = {
    "refused": {"refused"},
    "damaged": {"refused", "damaged"},
    "read": {"read"},
    "any": {"refused", "damaged", "read"},
}


class Limited:
    """A process that looks at files; started anew when one has killed it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, **request):
        """Return the answer, or what became of the process."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, CORPUS / "limited.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        print(json.dumps(request), file=self.process.stdin, flush=True)
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(SECONDS) else ""
        if line:
            return json.loads(line)
        self.close()
        return {"outcome": "the process died or hung", "wrong": [request]}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def limited():
    process = Limited()
    yield process
    process.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    subprocess.run([sys.executable, CORPUS / "make_corpus.py", folder], check=True, capture_output=True)
    return folder


def test_every_bad_input_ends_in_an_error_of_ours_or_in_the_right_pixels(limited, corpus):
    expected = json.loads((corpus / "corpus.json").read_text())
    assert len(expected) > 150
    wrong = []
    for name, outcome in expected.items():
        answer = limited.ask(path=str(corpus / name))
        sound = answer["outcome"] in ACCEPTED[outcome] and answer.get("equal", True)
        named = answer["outcome"] == "read" or name in answer.get("message", "")
        cheap = answer.get("first_look", {"growth": 0})["growth"] < MAX_GROWTH
        if not (sound and named and cheap):
            wrong.append((name, outcome, answer))
    assert wrong == []


def test_refusals_take_no_time(limited, corpus):
    """Processor seconds of the first look, which another process on the machine does not lengthen."""
    expected = json.loads((corpus / "corpus.json").read_text())
    refused = [name for name, outcome in expected.items() if outcome == "refused"]
    seconds = {name: limited.ask(path=str(corpus / name))["first_look"]["seconds"] for name in refused}
    assert {name: value for name, value in seconds.items() if value >= 1.0} == {}


def test_bad_inputs_leave_no_pyramid(corpus, tmp_path):
    expected = json.loads((corpus / "corpus.json").read_text())
    for name in [name for name, outcome in expected.items() if outcome in ("refused", "damaged")]:
        with pytest.raises(StorageError, match=name):
            convert(corpus / name, tmp_path / "p.zarr")
        assert not (tmp_path / "p.zarr").exists()


def test_sound_inputs_become_sound_pyramids(corpus, tmp_path):
    """Their pixels as ``open_image`` gives them, which the first test holds against the reference decoders."""
    expected = json.loads((corpus / "corpus.json").read_text())
    sound = [name for name, outcome in expected.items() if outcome == "read"]
    assert len(sound) > 15
    for number, name in enumerate(sound):
        report = convert(corpus / name, tmp_path / f"{number}.zarr")
        with open_image(corpus / name) as image, Slide(tmp_path / f"{number}.zarr") as slide:
            box = (0, 0, *image.shape[1:])
            np.testing.assert_array_equal(slide.read(0, box), image.read(*box), err_msg=name)
            assert (report.shape, report.dtype) == (image.shape, image.dtype.name)


SEEDS = [
    "deflate.tif", "big.tif", "lzw.tif", "jpeg.tif", "jpeg2000.tif", "webp.tif", "webp-lossy.tif", "zstd.tif",
    "jpegxl.tif", "png.tif", "lerc.tif", "packbits.tif", "lzma.tif", "image.ome.tif", "image.png", "image.jpg",
    "image.bmp", "progressive.jpg",
]  # fmt: skip


def assert_only_errors_of_ours(limited, seed, count, at_once=50, **how):
    counts = {"read": 0, "refused": 0, "damaged": 0}
    for first in range(0, count, at_once):
        answer = limited.ask(fuzz=str(seed), first=first, count=at_once, **how)
        assert answer["wrong"] == []
        for outcome, number in answer["outcomes"].items():
            counts[outcome] += number
    assert sum(counts.values()) == count
    assert counts["refused"] + counts["damaged"] > count // 10


def test_the_seeds_are_those_of_the_corpus(corpus):
    assert {path.name for path in (corpus / "seeds").iterdir() if "mutated" not in path.name} == set(SEEDS)


@pytest.mark.parametrize("name", SEEDS)
def test_changed_bytes_raise_only_errors_of_ours(limited, corpus, name):
    assert_only_errors_of_ours(limited, corpus / "seeds" / name, 150)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_more_changed_bytes_raise_only_errors_of_ours(limited, corpus, name):
    assert_only_errors_of_ours(limited, corpus / "seeds" / name, 1000)


def write_slides(folder):
    """Small slides of several levels as scanners and GDAL write them, by name."""
    pixels = np.random.default_rng(0).integers(0, 255, (520, 640, 3), dtype=np.uint8)
    pixels[:260, :320] //= 8
    jpeg = {"tile": (128, 128), "compression": "jpeg", "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(folder / "slide.svs") as tif:
        tif.write(pixels, description="Aperio Image Library v1|AppMag = 20|MPP = 0.5", **jpeg)
        tif.write(pixels[::8, ::8], photometric="rgb", metadata=None)
        tif.write(pixels[::4, ::4], description="Aperio Image Library v1", **jpeg)
    with tifffile.TiffWriter(folder / "cog.tif", bigtiff=True) as tif:
        grey = {"tile": (128, 128), "compression": "deflate", "predictor": True, "metadata": None}
        for step in (1, 2, 4):
            tif.write(pixels[::step, ::step, 0].astype(np.uint16) * 200, subfiletype=int(step > 1), **grey)
    with tifffile.TiffWriter(folder / "jpeg2000.svs") as tif:
        tif.write(pixels[:160, :160], tile=(128, 128), compression="jpeg2000", photometric="rgb", metadata=None)
    with tifffile.TiffWriter(folder / "subifds.ome.tif") as tif:
        tif.write(pixels, subifds=1, tile=(128, 128), compression="lzw", photometric="rgb")
        tif.write(pixels[::2, ::2], subfiletype=1, tile=(128, 128), compression="lzw", photometric="rgb")


IN_PLACE = {"slide.svs": 900, "cog.tif": 700, "jpeg2000.svs": 100, "subifds.ome.tif": 300}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PLACE)
def test_changed_slides_are_read_in_place_or_refused_by_errors_of_ours(limited, tmp_path, name):
    write_slides(tmp_path)
    assert_only_errors_of_ours(limited, tmp_path / name, IN_PLACE[name], at_once=10, in_place=True)


@pytest.mark.slow
@pytest.mark.data
def test_changed_ndpi_are_read_in_place_or_refused_by_errors_of_ours(limited, tmp_path, data):
    shutil.copy(data / "wsi-flavours" / "hamamatsu-test3-dapi.ndpi", tmp_path / "slide.ndpi")
    for first in range(0, 120, 10):
        answer = limited.ask(fuzz=str(tmp_path / "slide.ndpi"), first=first, count=10, in_place=True)
        assert answer["wrong"] == []
        assert answer["outcomes"].keys() <= {"read", "refused", "damaged"}


STEP = 11  # of the mutations of metadata, of which there are 14,000; all take a minute and a half


@pytest.fixture(scope="module", params=["own", "0.4", "0.5"])
def pyramid(request, tmp_path_factory):
    """A small pyramid of ours, or of another writer, sharded and with several codecs in zarr v3."""
    path = tmp_path_factory.mktemp("metadata") / "p.zarr"
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 50), dtype=np.uint8)
    if request.param == "own":
        write_pyramid(path, pixels, options=ConvertOptions(chunk=16, shard=32, min_level_size=32), mpp=0.5)
    elif request.param == "0.4":
        write_foreign(path, pixels, axes="cyx", version="0.4")
    else:
        settings = {
            "chunks": (3, 8, 8),
            "shards": (3, 16, 16),
            "filters": [TransposeCodec(order=(2, 0, 1))],
            "compressors": [GzipCodec(), ZstdCodec(), Crc32cCodec()],
        }
        write_foreign(path, pixels, axes="cyx", **settings)
    return path


def test_changed_metadata_raises_only_errors_of_ours(limited, pyramid):
    """Every value of it exchanged for nonsense of every kind; reading and validating, in bounded memory."""
    answer = limited.ask(metadata=str(pyramid), first=0, step=STEP)
    assert answer["wrong"] == []
    assert answer["outcomes"]["refused"] > 50
    assert answer["outcomes"]["read"] > 20
