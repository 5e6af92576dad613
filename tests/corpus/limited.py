"""Opens and reads images under a memory limit, one request a line; run as a process of its own by ``test_corpus``.

A request is `{"path": ...}`, answered by what became of the file, or `{"fuzz": seed, "first": n, "count": k}`,
answered by the outcomes of its mutations n to n + k (with `"in_place": true` as slides, where they lie), or
`{"metadata": pyramid, "first": n, "step": k}`, answered by those of every k-th mutation of a pyramid's metadata from
n on. Every answer is one line of JSON.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import random
import resource
import sys
import time
from collections import Counter
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
import tifffile

import storage.images.tiff
from storage import Slide, StorageError, open_image, validate
from storage.format.ome_zarr import seal

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS_SPACE = 1536 * 2**20  # above what the imports took
MOST_GROWTH, MOST_SECONDS = (
    2**30,
    30.0,
)  # bytes and processor seconds that one mutated file may make this process take
GROWTH = 128 * 2**20  # bytes that mutated metadata of a small pyramid may make this process take
SAFE_BYTES = 128 * 2**20  # larger images are only read in part
IN_PLACE = 128  # pixels, side of what is read of a slide where it lies


def memory(field: str) -> int:
    """A line of the process's status in bytes: VmRSS now, VmHWM its peak, VmSize with what is only reserved."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Meter:
    """Growth of the resident set's peak, in bytes, and processor seconds since it was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.before, self.start = memory("VmRSS"), time.process_time()

    def read(self) -> dict[str, float]:
        return {"growth": memory("VmHWM") - self.before, "seconds": time.process_time() - self.start}


def reference(path: Path) -> np.ndarray:
    """(C, H, W) pixels as the reference decoders give them."""
    data = path.read_bytes()
    if data.startswith((b"II", b"MM")):
        pixels = tifffile.imread(path)
        with tifffile.TiffFile(path) as tif:
            axes = tif.series[0].axes
            colours = tif.pages.first.colormap
            orientation = tif.pages.first.tags.valueof(274, 1)
        if colours is not None:
            return (colours >> 8)[:, pixels]
        if pixels.dtype == bool:
            pixels = pixels * np.uint8(255)
        if axes == "YXS" and orientation == 6:  # the only one here
            pixels = np.rot90(pixels, -1)
    else:
        pixels = imagecodecs.imread(path)
        axes = "YXS"[: pixels.ndim]
    if pixels.ndim == 2:
        return pixels[None]
    return pixels.transpose(2, 0, 1) if axes == "YXS" else pixels


def look(path: Path) -> dict[str, Any]:
    """Open a file and read its pixels."""
    meter = Meter()
    answer: dict[str, Any] = {"outcome": "refused", "message": ""}
    try:
        with open_image(path) as image:
            answer |= {"outcome": "damaged", "first_look": meter.read()}
            side = 10**9 if image.nbytes <= SAFE_BYTES else 64
            pixels = image.read(0, 0, min(side, image.shape[1]), min(side, image.shape[2]))
            answer |= {"outcome": "read", "nbytes": image.nbytes}
    except StorageError as error:
        answer["message"] = str(error)
    except BaseException as error:  # noqa: BLE001  what must never happen is told, not raised
        return answer | {"outcome": f"{type(error).__name__}: {error}"}
    answer.setdefault("first_look", meter.read())
    answer |= {"whole": meter.read()}
    if answer["outcome"] == "read" and side == 10**9:
        try:
            expected = reference(path)
        except ValueError:
            if path.suffix != ".bmp":  # of which the reference refuses headers for numbers that decide nothing
                raise
            return answer
        answer["equal"] = bool(np.array_equal(pixels, expected, equal_nan=pixels.dtype.kind == "f"))
    return answer


def look_in_place(path: Path) -> dict[str, Any]:
    """Open a slide where it lies, and read a box of each level and one that leaves it."""
    answer: dict[str, Any] = {"outcome": "refused", "message": ""}
    try:
        with Slide(path) as slide:
            answer["outcome"] = "damaged"
            for number, level in enumerate(slide.levels):
                if level.made_of is None or max(level.shape_yx) < 4 * IN_PLACE:
                    slide.read_many(
                        number, [(3, 5, IN_PLACE, IN_PLACE), (level.shape_yx[0] - 9, -9, IN_PLACE, IN_PLACE)]
                    )
            assert slide.identity
            answer["outcome"] = "read"
    except StorageError as error:
        answer["message"] = str(error)
    except BaseException as error:  # noqa: BLE001  what must never happen is told, not raised
        answer["outcome"] = f"{type(error).__name__}: {error}"
    return answer


def structure(data: bytes) -> list[range]:
    """Where a file says what is in it: the entries of a TIFF's directories and their values, else the first bytes."""
    places = [range(4, min(600, len(data)))]
    if data.startswith((b"II", b"MM")):
        with tifffile.TiffFile(io.BytesIO(data)) as tif:
            pages = [page for each in tif.pages for page in (each, *(each.pages or []))]
            for tag in (tag for page in pages for tag in page.tags):
                places.append(range(tag.offset, tag.offset + (20 if tif.is_bigtiff else 12)))
                places.append(range(tag.valueoffset, tag.valueoffset + tag.valuebytecount))
    return [place for place in places if len(place)]


def mutate(data: bytes, number: int, structure: list[range]) -> bytes:
    """Change a few bytes: half of the times of the structure, else anywhere."""
    chance = random.Random(number)
    out = bytearray(data)
    places = structure if chance.random() < 0.5 else [range(4, len(out))]
    for _ in range(chance.randint(1, 4)):
        out[chance.choice(chance.choice(places))] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
    if chance.random() < 0.1:
        del out[chance.randrange(8, len(out)) :]
    return bytes(out)


def fuzz(seed: Path, first: int, count: int, *, in_place: bool = False) -> dict[str, Any]:
    """Look at mutations of a seed; the last one stays in a file, should this process die of it."""
    data, path = seed.read_bytes(), seed.with_name(f"mutated-{seed.name}")
    places = structure(data)
    outcomes: Counter[str] = Counter()
    wrong = []
    for number in range(first, first + count):
        path.write_bytes(mutate(data, number, places))
        meter = Meter()
        answer = look_in_place(path) if in_place else look(path)
        outcomes[answer["outcome"]] += 1
        named = answer["outcome"] == "read" or path.name in answer["message"]
        used = meter.read()
        if (
            not named
            or answer.get("equal") is False
            or used["growth"] > MOST_GROWTH
            or used["seconds"] > MOST_SECONDS
        ):
            wrong.append((number, answer, used))
    return {"outcomes": outcomes, "wrong": wrong}


HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**64, 2**70, 10**400, 0.5, -0.0, 5e-324, 1e308, math.inf, -math.inf, math.nan,
    "", "0", "../0", "x\0y", "\ud800", "NaN", "pickle", [], [0], [1] * 99, {}, {"name": "pickle", "id": "pickle"},
    "DEEP",
]  # fmt: skip
DEEP = ["[" * 2000 + "]" * 2000, "[" * 900 + "]" * 900, '{"a":' * 2000 + "1" + "}" * 2000]


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a JSON document."""
    yield path
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in members:
        yield from nodes(inner, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document with one value exchanged, its checksum made anew where it has one."""
    if not path:
        return value
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with suppress(Exception):  # it has no checksum, or no place for one any more
        seal(document)
    return document


def metadata_mutations(pyramid: Path) -> Iterator[tuple[Path, bytes, str]]:
    """Every value of a pyramid's metadata exchanged for every hostile one: the file, its bytes, and what was done."""
    for name in ("zarr.json", ".zattrs", "0/zarr.json", "0/.zarray"):
        file = pyramid / name
        if not file.exists():
            continue
        document = json.loads(file.read_bytes())
        for path in nodes(document):
            for number, value in enumerate(HOSTILE):
                data = json.dumps(changed(document, path, value))
                deep = DEEP[len(path) % len(DEEP)]
                yield file, data.replace('"DEEP"', deep).encode(), f"{name} {path} is {number}: {value!r:.60}"


def look_at_pyramid(path: Path) -> str:
    """Open a pyramid, read a box of each level, and validate it."""
    outcome = "refused"
    try:
        validate(path, full=True)
        with Slide(path) as slide:
            outcome = "damaged"
            for level in range(len(slide.levels)):
                slide.read(level, (0, 0, 8, 8))
            outcome = "read"
    except StorageError as error:
        return outcome if str(path) in str(error) else f"unnamed {error}"
    except BaseException as error:  # noqa: BLE001  what must never happen is told, not raised
        return f"{type(error).__name__}: {error}"
    return outcome


def fuzz_metadata(pyramid: Path, first: int, step: int) -> dict[str, Any]:
    """Look at every ``step``-th mutation of a pyramid."""
    outcomes: Counter[str] = Counter()
    wrong = []
    for file, data, what in islice(metadata_mutations(pyramid), first, None, step):
        sound = file.read_bytes()
        file.write_bytes(data)
        meter = Meter()
        outcome = look_at_pyramid(pyramid)
        outcomes[outcome] += 1
        if outcome not in ("refused", "damaged", "read") or meter.read()["growth"] > GROWTH:
            wrong.append((what, outcome, meter.read()))
        file.write_bytes(sound)
    return {"outcomes": outcomes, "wrong": wrong[:20]}


def main() -> None:
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    assert storage.images.tiff  # imported before the limit is set
    limit = memory("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        request = json.loads(line)
        if "path" in request:
            answer = look(Path(request["path"]))
        elif "metadata" in request:
            answer = fuzz_metadata(Path(request["metadata"]), request["first"], request["step"])
        else:
            answer = fuzz(Path(request.pop("fuzz")), **request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
