"""``validate``: whether a pyramid is what the converter wrote, and if not, what is wrong and where.

Quick reads every file and checks it against the pyramid's own table of shards (length and CRC-32). Full decodes every
chunk besides, averages each level and compares it with the next coarser one, and level 0 with its source where that
is given. Memory is a few shards per thread whatever the image's size: the shards of a level are read by the shard of
the next level that they are averaged into.

Pyramids of other writers have no such table: their metadata is checked, in full also that every chunk decodes, and
the result says what could not be checked.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from storage import typed
from storage.errors import CorruptImageError, NotAPyramidError, StorageError, TransferError
from storage.format.ome_zarr import LevelInfo, PyramidInfo, parse_pyramid
from storage.format.shard import CHECKSUM_BYTES, decode_chunk, decode_index, decode_shard
from storage.images.halving import downsample
from storage.images.raster import open_image
from storage.place.stores import Store, connect, first_line, open_store
from storage.read.slide import Slide
from storage.threads import processors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from storage.conversion.build import PixelSource

Place = tuple[int, int]  # row, column
Kind = Literal["unfinished", "metadata", "shard", "chunk", "pixels", "stray", "unchecked"]
UNFINISHED = "its conversion was interrupted or is running; convert again to go on with it, or delete it"
WARNINGS = ("stray", "unchecked")
ROUNDING = 1e-9  # relative, of a level's pixel size and position
FOREIGN_SIDE = 1024  # pixels; boxes of other writers' pyramids are read in whole shards of about this side


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a pyramid.

    ``what`` is "unfinished" (its conversion was interrupted), "metadata", "shard" (missing, cut, damaged, exchanged,
    or there where none belongs), "chunk" (it does not decode), "pixels" (not the mean of the finer level, or not the
    source's), "stray" (a file that does not belong here) or "unchecked" (it could not be looked at).
    """

    level: int | None  # 0 is the finest; None: the pyramid as a whole
    place: Place | None  # row and column of the chunk where ``what`` is "chunk", else of the shard
    what: Kind
    message: str

    @property
    def warning(self) -> bool:
        """Whether the pyramid is good all the same, as far as could be seen."""
        return self.what in WARNINGS


def validate(
    location: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    full: bool = False,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> list[Problem]:
    """Find everything that is wrong with a pyramid.

    Parameters
    ----------
    location
        A pyramid's folder or URL.
    source
        Path or URL of the image it was made from, to compare level 0 with; implies ``full``.
    full
        Decode and compare all levels, instead of only checking the stored bytes against the table of shards.
    progress
        Called with (bytes done, bytes in all), counted as decoded pixels, from one thread at a time.
    workers
        Threads; the processors of this process if None.

    Returns
    -------
    list of Problem
        By level and place; empty for a sound pyramid.

    Raises
    ------
    MissingImageError, NotAPyramidError, TransferError
        The pyramid cannot be looked at.
    StorageError
        The source cannot be opened.
    """
    text = os.fspath(location).rstrip("/")
    check = _Check(progress, workers or processors())
    if _is_unfinished(text):
        check.add(None, None, "unfinished", UNFINISHED)
        return check.problems
    with closing(open_store(text)) as store:
        slide = _open_slide(check, text)
        if slide is not None:
            with slide:
                root = _load(store, "zarr.json")
                if "nested_ats" in _member(root, "attributes"):
                    _check_own(check, store, root, source, full=full or source is not None)
                else:
                    _check_foreign(check, slide, source, full=full or source is not None)
    return sorted(check.problems, key=_order)


class _Check:
    """Problems found and bytes done, by several threads."""

    def __init__(self, progress: Callable[[int, int], None] | None, workers: int) -> None:
        self.problems: list[Problem] = []
        self.workers = workers
        self._progress = progress
        self._done = self._total = 0
        self._lock = threading.Lock()

    def add(self, level: int | None, place: Place | None, what: Kind, message: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(level, place, what, message))

    def run(self, tasks: Sequence[Callable[[], object]], total: int) -> None:
        """Run tasks in threads; after an error or an interrupt no others are started."""
        self._total = total
        self.advance(0)  # speed is measured from here
        with ThreadPoolExecutor(self.workers, thread_name_prefix="storage-validate") as pool:
            try:
                for future in as_completed([pool.submit(task) for task in tasks]):
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def advance(self, nbytes: int) -> None:
        """Count decoded bytes as done."""
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def _order(problem: Problem) -> tuple[int, Place, str]:
    level = -1 if problem.level is None else problem.level
    return (level, problem.place or (-1, -1), problem.message)


def _is_unfinished(location: str) -> bool:
    if "://" in location:
        return location.endswith(".partial") and _has_objects(location)
    if location.endswith(".partial"):
        return Path(location).is_dir()
    return not Path(location).exists() and Path(f"{location}.partial").is_dir()


def _open_slide(check: _Check, location: str) -> Slide | None:
    """Open a pyramid, or note why it cannot be opened."""
    try:
        return Slide(location)
    except CorruptImageError as error:
        check.add(None, None, "metadata", str(error).removeprefix(f"{location}: "))
    except NotAPyramidError:
        if "://" not in location or not _has_objects(f"{location}.partial"):
            raise
        check.add(None, None, "unfinished", UNFINISHED)  # the root's metadata is written last
    return None


def _has_objects(url: str) -> bool:
    try:
        return any(True for _ in _list_files(url))
    except TransferError:
        return False


def _load(store: Store, key: str) -> dict[str, Any]:
    """Return the JSON object below a key; an empty one if there is none."""
    try:
        return typed.parse_object(store.get(key))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CorruptImageError(f"{store.name}: {key} is damaged ({error})") from error


def _member(value: Any, key: str) -> dict[str, Any]:
    """Return the JSON object below a key of another; an empty one if there is none."""
    member = value.get(key) if isinstance(value, dict) else None
    return member if isinstance(member, dict) else {}


def _check_own(
    check: _Check, store: Store, root: dict[str, Any], source: str | os.PathLike[str] | None, *, full: bool
) -> None:
    """Check a pyramid of this package, which lists its shards."""
    info = parse_pyramid(store.get, store.name)
    _check_copies(check, store, info, _member(_member(root, "consolidated_metadata"), "metadata"))
    _check_places(check, info.levels)
    _check_strays(check, store, info)
    first = info.levels[0]
    sparse = bool(_member(info.provenance, "options").get("allow_sparse"))
    with _open_source(check, source, first.shape, first.layout.dtype, allow_sparse=sparse) as image:
        shards = _Shards(check, store, info.levels, image, full=full)
        check.run(shards.tasks(), sum(level.nbytes for level in info.levels))


def _check_copies(check: _Check, store: Store, info: PyramidInfo, copies: dict[str, Any]) -> None:
    """Each level's own metadata must equal its copy in the root's, or readers would disagree."""
    for number, level in enumerate(info.levels):
        key = f"{level.path}/zarr.json"
        try:
            same = _load(store, key) == copies.get(level.path)
        except (CorruptImageError, RecursionError):
            same = False
        if not same:
            message = f"{key} is missing or differs from its copy in the root's zarr.json"
            check.add(number, None, "metadata", message)


def _check_places(check: _Check, levels: tuple[LevelInfo, ...]) -> None:
    """Each level's pixels must have the size and place that halving gives, or patches would come from elsewhere."""
    scale, first = np.array(levels[0].scale_yx), np.array(levels[0].translation_yx)
    for number, level in enumerate(levels):
        size, place = scale * 2**number, first + scale * (2**number - 1) / 2
        sound = np.abs(level.scale_yx - size) <= size * ROUNDING
        sound &= np.abs(level.translation_yx - place) <= (size + np.abs(place)) * ROUNDING
        if not sound.all():
            message = (
                f"its scale {level.scale_yx} and translation {level.translation_yx} should be "
                f"{tuple(size.tolist())} and {tuple(place.tolist())} by level 0's"
            )
            check.add(number, None, "metadata", message)


def _check_strays(check: _Check, store: Store, info: PyramidInfo) -> None:
    """Name the files that no reader of this pyramid would look at."""
    known = {"zarr.json", *(f"{level.path}/zarr.json" for level in info.levels)}
    known |= {level.shard_key(*place) for level in info.levels for place in np.ndindex(level.shard_grid)}
    try:
        strays = sorted(key for key in _list_files(store.name) if key not in known)
    except TransferError as error:
        check.add(None, None, "unchecked", f"its files cannot be listed, so that strays are not noticed ({error})")
        return
    for key in strays:
        check.add(None, None, "stray", f"{key} does not belong here")
    if "://" not in store.name and Path(f"{store.name}.partial").exists():
        message = f"{store.name}.partial lies beside it: its replacement was interrupted or is running"
        check.add(None, None, "stray", message)


def _list_files(root: str) -> Iterator[str]:
    """Keys of all files below a folder or URL; raises ``TransferError`` for web servers, which do not list."""
    if "://" in root:
        from obstore.store import HTTPStore

        store = connect(root)
        if isinstance(store, HTTPStore):
            raise TransferError("web servers do not tell")
        try:
            for batch in store.list():
                yield from (entry["path"] for entry in batch)
        except Exception as error:  # obstore has one for each reason
            raise TransferError(first_line(error)) from error
    else:
        for folder, _, names in os.walk(root):
            yield from (Path(folder, name).relative_to(root).as_posix() for name in names)


@contextmanager
def _open_source(
    check: _Check,
    source: str | os.PathLike[str] | None,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    allow_sparse: bool = False,
) -> Iterator[PixelSource | None]:
    """Open the source, if there is one; where level 0 cannot equal it, that is noted and none is given."""
    if source is None:
        yield None
        return
    with open_image(source, allow_sparse=allow_sparse) as image:
        same = (image.shape, image.dtype) == (shape, dtype)
        if not same:
            text = f"(C, H, W) = {shape} of {dtype}; the source is {image.shape} of {image.dtype}"
            check.add(0, None, "pixels", text)
        yield image if same else None


class _Shards:
    """The shards of a pyramid with a table of them."""

    def __init__(
        self, check: _Check, store: Store, levels: tuple[LevelInfo, ...], source: PixelSource | None, *, full: bool
    ) -> None:
        self._check = check
        self._store = store
        self._levels = levels
        self._source = source
        self._full = full

    def tasks(self) -> list[Callable[[], object]]:
        """All that is to be done, each task in the memory of a few shards."""
        tasks: list[Callable[[], object]] = []
        for number, level in enumerate(self._levels):
            coarser = self._levels[number + 1] if number + 1 < len(self._levels) else None
            halved = coarser is not None and self._is_half(number, coarser)
            if self._full and halved and coarser is not None:
                tasks += [partial(self._compare, number, place) for place in np.ndindex(coarser.shard_grid)]
            else:
                tasks += [partial(self._examine, number, place) for place in np.ndindex(level.shard_grid)]
        return tasks

    def _is_half(self, number: int, coarser: LevelInfo) -> bool:
        finer = self._levels[number]
        channels, height, width = finer.shape
        half = coarser.shape == (channels, -(-height // 2), -(-width // 2)) and coarser.layout == finer.layout
        if not half:
            message = f"{coarser.shape} is not half of level {number}, {finer.shape}"
            self._check.add(number + 1, None, "metadata", message)
        return half

    def _compare(self, number: int, parent: Place) -> None:
        """Examine the shards that a shard of the next level is averaged from, and compare it with their means."""
        finer, coarser = self._levels[number], self._levels[number + 1]
        half = finer.layout.shard // 2
        means, _ = self._load(number + 1, parent)
        rows, columns = finer.shard_grid
        for y in range(2 * parent[0], min(2 * parent[0] + 2, rows)):
            for x in range(2 * parent[1], min(2 * parent[1] + 2, columns)):
                pixels = self._examine(number, (y, x))
                if pixels is None or means is None:
                    continue  # what is damaged is named where it is examined
                expected = downsample(pixels)
                top, left = half * (y - 2 * parent[0]), half * (x - 2 * parent[1])
                found = means[:, top : top + expected.shape[1], left : left + expected.shape[2]]
                wrong = _differences(found, expected, (y * half, x * half), coarser.layout.chunk)
                if wrong:
                    message = f"{wrong} the means of shard {(y, x)} of level {number}"
                    self._check.add(number + 1, parent, "pixels", message)

    def _examine(self, number: int, place: Place) -> NDArray[Any] | None:
        """Note what is wrong with a shard, and return its pixels if they are sound and asked for."""
        level = self._levels[number]
        pixels, problems = self._load(number, place)
        self._check.problems.extend(problems)
        if number == 0 and pixels is not None and self._source is not None:
            origin = (place[0] * level.layout.shard, place[1] * level.layout.shard)
            _compare_source(self._check, self._source, pixels, origin, place, level.layout.chunk)
        height, width = level.shard_shape(*place)
        self._check.advance(level.shape[0] * height * width * level.layout.dtype.itemsize)
        return pixels

    def _load(self, number: int, place: Place) -> tuple[NDArray[Any] | None, list[Problem]]:
        """Return the (C, h, w) pixels of a shard, if they are asked for, or what is wrong with it."""
        level = self._levels[number]
        wrong = partial(Problem, number, place, "shard")
        try:
            data, sound = self._fetch(level, place)
        except CorruptImageError as error:
            return None, [wrong(str(error))]
        if sound and not self._full:
            return None, []
        if not data:
            return np.zeros((level.shape[0], *level.shard_shape(*place)), level.layout.dtype), []
        pixels, problems = _decode(number, level, place, data)
        if sound:
            return pixels, problems
        key = level.shard_key(*place)
        if problems:
            return None, [wrong(f"{key} is damaged: its checksum does not match"), *problems]
        return None, [wrong(f"{key} is not the shard that was written here, though its chunks are sound")]

    def _fetch(self, level: LevelInfo, place: Place) -> tuple[bytes, bool]:
        """Bytes of a shard, none where it is absent as it should be, and whether their checksum holds."""
        table, key = level.table, level.shard_key(*place)
        length = int(table.length[place])
        try:
            data = self._store.get(key, level.layout.max_shard_bytes)
        except FileNotFoundError:
            if length:
                raise CorruptImageError(f"{key} is missing") from None
            return b"", True
        except TransferError:
            raise
        except StorageError as error:  # a disk or its permissions
            raise CorruptImageError(str(error).removeprefix(f"{self._store.name}/")) from error
        if length == 0:
            raise CorruptImageError(f"{key} should not be there, as all its pixels are zero")
        if len(data) != length:
            raise CorruptImageError(f"{key} holds {len(data)} bytes, not {length}")
        index_checksum = int.from_bytes(data[-CHECKSUM_BYTES:], "little")
        same = (zlib.crc32(data), index_checksum) == (table.crc32[place], table.index_crc32c[place])
        return data, same


def _decode(number: int, level: LevelInfo, place: Place, data: bytes) -> tuple[NDArray[Any] | None, list[Problem]]:
    """Pixels of a shard, or which of its chunks do not decode."""
    try:
        return decode_shard(data, level.layout, level.shard_shape(*place)), []
    except CorruptImageError:
        return None, list(_damaged_chunks(number, level, place, data))


def _damaged_chunks(number: int, level: LevelInfo, place: Place, data: bytes) -> Iterator[Problem]:
    layout, key = level.layout, level.shard_key(*place)
    try:
        index = decode_index(data[-layout.index_bytes :], layout, len(data)).tolist()
    except CorruptImageError as error:
        yield Problem(number, place, "shard", f"{key}: {error}")
        return
    for inner, (offset, length) in enumerate(index):
        if offset < 0:
            continue
        try:
            decode_chunk(data[offset : offset + length], layout)
        except CorruptImageError as error:
            row, column = divmod(inner, layout.grid)
            chunk = (place[0] * layout.grid + row, place[1] * layout.grid + column)
            yield Problem(number, chunk, "chunk", f"in {key}: {error}")


def _check_foreign(check: _Check, slide: Slide, source: str | os.PathLike[str] | None, *, full: bool) -> None:
    """Check a pyramid of another writer as far as ``Slide`` reads it."""
    message = "of another writer, without a table of shards: missing or exchanged ones are not noticed"
    check.add(None, None, "unchecked", message + ("" if full else "; no chunk was decoded"))
    if not full:
        return
    shapes = [(len(slide.channels), *level.shape_yx) for level in slide.levels]
    with _open_source(check, source, shapes[0], slide.dtype) as image:
        tasks = []
        for number, level in enumerate(slide.levels):
            side = level.shard * -(-FOREIGN_SIDE // level.shard)
            height, width = level.shape_yx
            places = [(y, x) for y in range(0, height, side) for x in range(0, width, side)]
            tasks += [partial(_examine_box, check, slide, number, place, side, image) for place in places]
        check.run(tasks, sum(int(np.prod(shape)) * slide.dtype.itemsize for shape in shapes))


def _examine_box(
    check: _Check, slide: Slide, number: int, origin: Place, side: int, source: PixelSource | None
) -> None:
    """Read a box of whole shards; if it does not decode, chunk by chunk, to name each that does not."""
    level = slide.levels[number]
    (y, x), (height, width) = origin, level.shape_yx
    h, w = min(side, height - y), min(side, width - x)
    try:
        pixels = slide.read(number, (y, x, h, w))
    except TransferError:
        raise
    except StorageError:
        chunks = [(top, left) for top in range(y, y + h, level.chunk) for left in range(x, x + w, level.chunk)]
        for top, left in chunks:
            try:
                slide.read(number, (top, left, min(level.chunk, y + h - top), min(level.chunk, x + w - left)))
            except StorageError as error:
                place = (top // level.chunk, left // level.chunk)
                check.add(number, place, "chunk", str(error).removeprefix(f"{slide.location}: "))
    else:
        if number == 0 and source is not None:
            shard = (y // level.shard, x // level.shard)
            _compare_source(check, source, pixels, origin, shard, level.chunk)
    check.advance(len(slide.channels) * h * w * slide.dtype.itemsize)


def _compare_source(
    check: _Check, source: PixelSource, pixels: NDArray[Any], origin: Place, shard: Place, chunk: int
) -> None:
    """Compare (C, h, w) pixels of level 0 with the same box of the source."""
    try:
        expected = source.read(*origin, *pixels.shape[1:])
    except StorageError as error:
        check.add(0, shard, "unchecked", f"the source cannot be read there ({error})")
        return
    if wrong := _differences(pixels, expected, origin, chunk):
        check.add(0, shard, "pixels", f"{wrong} the source's")


def _differences(pixels: NDArray[Any], expected: NDArray[Any], origin: Place, chunk: int) -> str:
    """Say how many pixels differ and where the first does; nothing if none does. NaN equals NaN."""
    different = pixels != expected
    if pixels.dtype.kind == "f":
        different &= ~(np.isnan(pixels) & np.isnan(expected))
    places = np.argwhere(different.any(axis=0))
    if not len(places):
        return ""
    y, x = (places[0] + origin).tolist()
    where = f"the first at y={y}, x={x} in chunk {(y // chunk, x // chunk)}"
    return f"{len(places)} of {different[0].size} pixels, {where}, are not"
