"""What is wrong with a pyramid of this package, whose table of shards tells what each must be.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import zlib
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage import typed
from storage.conversion.build import children
from storage.conversion.labels import GROUP, NAMES
from storage.errors import CorruptImageError, MissingImageError, NotAPyramidError, StorageError, TransferError
from storage.format.levels import coarsened, half_size
from storage.format.ngff import load_json
from storage.format.ome_zarr import LevelInfo, PyramidInfo, is_own, pyramid_info
from storage.format.shard import CHECKSUM_BYTES, decode_chunk, decode_index, decode_shard
from storage.images.halving import downsample
from storage.place.stores import open_store
from storage.place.urls import is_remote
from storage.validation.pixels import compare_source, differences, open_source
from storage.validation.problems import Check, Problem

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from storage.conversion.build import PixelSource
    from storage.place.stores import Store
    from storage.validation.problems import Place

ROUNDING = 1e-9  # relative, of a level's pixel size and position


def check_sharded(check: Check, store: Store, root: dict[str, Any], source: str | os.PathLike[str] | None) -> None:
    """Check a pyramid of this package, which lists its shards."""
    info = pyramid_info(root, store.get, store.name)
    _check_copies(check, store, info, (root.get("consolidated_metadata") or {}).get("metadata") or {})
    _check_places(check, info.levels)
    labels = _labels(store)
    _check_strays(check, store, info, labels)
    for name in filter(labels.__contains__, NAMES):
        _check_label(check, store, name)
    first = info.levels[0]
    options = info.provenance.get("options")
    options = options if isinstance(options, dict) else {}
    sparse, pages = bool(options.get("allow_sparse")), options.get("pages")
    pages = pages if pages == "channels" or (type(pages) is int and pages >= 0) else None
    with open_source(check, source, first.shape, first.layout.dtype, allow_sparse=sparse, pages=pages) as image:
        check.run(
            _Shards(check, store, info.levels, image, info.nodata, info.alpha).tasks(),
            sum(level.nbytes for level in info.levels),
        )


def _check_copies(check: Check, store: Store, info: PyramidInfo, copies: dict[str, Any]) -> None:
    """Each level's own metadata must equal its copy in the root's, or readers would disagree."""
    for number, level in enumerate(info.levels):
        key = f"{level.path}/zarr.json"
        try:
            same = load_json(store.get, key, store.name) == copies.get(level.path)
        except (CorruptImageError, NotAPyramidError, RecursionError):
            same = False
        if not same:
            message = f"{key} is missing or differs from its copy in the root's zarr.json"
            check.add(number, None, "metadata", message)


def _check_places(check: Check, levels: tuple[LevelInfo, ...]) -> None:
    """Each level's pixels must have the size and place that halving gives, or patches would come from elsewhere."""
    for number, level in enumerate(levels):
        size, place = map(np.array, coarsened(2**number, levels[0].scale_yx, levels[0].translation_yx))
        sound = np.abs(level.scale_yx - size) <= size * ROUNDING
        sound &= np.abs(level.translation_yx - place) <= (size + np.abs(place)) * ROUNDING
        if not sound.all():
            message = (
                f"its scale {level.scale_yx} and translation {level.translation_yx} should be "
                f"{tuple(size.tolist())} and {tuple(place.tolist())} by level 0's"
            )
            check.add(number, None, "metadata", message)


def _labels(store: Store) -> list[str]:
    """Names of the label images that a pyramid lists, which others may have put into it."""
    try:
        attributes = typed.mapping(load_json(store.get, GROUP, store.name).get("attributes"), "attributes")
        listed = typed.items(typed.mapping(attributes.get("ome"), "ome").get("labels"), "labels")
    except (ValueError, StorageError):
        return []
    return [name for name in listed if isinstance(name, str)]


def _check_label(check: Check, store: Store, name: str) -> None:
    """A label of this package is a pyramid."""
    where = f"labels/{name}"
    own = Check(None, check.workers, full=check.full)
    try:
        with closing(open_store(f"{store.name}/{where}")) as inner:
            root = load_json(inner.get, "zarr.json", where)
            if is_own(root):
                check_sharded(own, inner, root, None)
    except (CorruptImageError, NotAPyramidError, MissingImageError) as error:
        own.add(None, None, "metadata", str(error))
    for problem in own.problems:
        check.add(None, None, problem.what, f"{where}: {problem.message}; remove it, and make it again")


def _check_strays(check: Check, store: Store, info: PyramidInfo, labels: list[str]) -> None:
    """Name the files that no reader of this pyramid would look at."""
    folders = tuple(f"labels/{name}/" for name in labels)
    known = {"zarr.json", GROUP, *(f"{level.path}/zarr.json" for level in info.levels)}
    known |= {level.shard_key(*place) for level in info.levels for place in np.ndindex(level.shard_grid)}
    try:
        strays = sorted(key for key in store.entries() if key not in known and not key.startswith(folders))
    except TransferError as error:
        check.add(None, None, "unchecked", f"its files cannot be listed, so that strays are not noticed ({error})")
        return
    for key in strays:
        check.add(None, None, "stray", f"{key} does not belong here")
    if not is_remote(store.name) and Path(f"{store.name}.partial").exists():
        message = f"{store.name}.partial lies beside it: its replacement was interrupted or is running"
        check.add(None, None, "stray", message)


@dataclass(frozen=True)
class _Shards:
    """The shards of a pyramid with a table of them."""

    check: Check
    store: Store
    levels: tuple[LevelInfo, ...]
    source: PixelSource | None
    nodata: float | None
    alpha: int | None

    def tasks(self) -> list[Callable[[], object]]:
        """All that is to be done, each task in the memory of a few shards."""
        tasks: list[Callable[[], object]] = []
        for number, (level, coarser) in enumerate(zip_longest(self.levels, self.levels[1:])):
            if coarser and self._is_half(number, coarser) and self.check.full:
                tasks += [partial(self._compare, number, place) for place in np.ndindex(coarser.shard_grid)]
            else:
                tasks += [partial(self._examine, number, place) for place in np.ndindex(level.shard_grid)]
        return tasks

    def _is_half(self, number: int, coarser: LevelInfo) -> bool:
        finer = self.levels[number]
        channels, height, width = finer.shape
        half = coarser.shape == (channels, *half_size(height, width)) and coarser.layout == finer.layout
        if not half:
            message = f"{coarser.shape} is not half of level {number}, {finer.shape}"
            self.check.add(number + 1, None, "metadata", message)
        return half

    def _compare(self, number: int, parent: Place) -> None:
        """Examine the shards that a shard of the next level is averaged from, and compare it with their means."""
        finer, coarser = self.levels[number], self.levels[number + 1]
        half = finer.layout.shard // 2
        means, _ = self._load(number + 1, parent)
        for _, y, x in children(self.levels, (number + 1, *parent)):
            pixels = self._examine(number, (y, x))
            if pixels is None or means is None:
                continue  # what is damaged is named where it is examined
            expected = downsample(pixels, nodata=self.nodata, alpha=self.alpha)
            top, left = half * (y - 2 * parent[0]), half * (x - 2 * parent[1])
            found = means[:, top : top + expected.shape[1], left : left + expected.shape[2]]
            if wrong := differences(found, expected, (y * half, x * half), coarser.layout.chunk):
                message = f"{wrong} the means of shard {(y, x)} of level {number}"
                self.check.add(number + 1, parent, "pixels", message)

    def _examine(self, number: int, place: Place) -> NDArray[Any] | None:
        """Note what is wrong with a shard, and return its pixels if they are sound and asked for."""
        level = self.levels[number]
        pixels, problems = self._load(number, place)
        self.check.problems.extend(problems)
        if number == 0 and pixels is not None:
            origin = (place[0] * level.layout.shard, place[1] * level.layout.shard)
            compare_source(self.check, self.source, pixels, origin, place, level.layout.chunk)
        self.check.advance(level.shard_bytes(*place))
        return pixels

    def _load(self, number: int, place: Place) -> tuple[NDArray[Any] | None, list[Problem]]:
        """Return the (C, h, w) pixels of a shard, if they are asked for, or what is wrong with it."""
        level = self.levels[number]
        wrong = partial(Problem, number, place, "shard")
        try:
            data, sound = self._fetch(level, place)
        except CorruptImageError as error:
            return None, [wrong(str(error))]
        if sound and not self.check.full:
            return None, []
        if not data:
            return np.zeros((level.shape[0], *level.shard_shape(*place)), level.layout.dtype), []
        try:
            pixels, problems = decode_shard(data, level.layout, level.shard_shape(*place)), []
        except CorruptImageError:
            pixels, problems = None, list(_damaged_chunks(number, level, place, data))
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
            data = self.store.get(key, level.layout.max_shard_bytes)
        except FileNotFoundError:
            if length:
                raise CorruptImageError(f"{key} is missing") from None
            return b"", True
        except TransferError:
            raise
        except StorageError as error:  # a disk or its permissions
            raise CorruptImageError(str(error).removeprefix(f"{self.store.name}/")) from error
        if length == 0:
            raise CorruptImageError(f"{key} should not be there, as all its pixels are zero")
        if len(data) != length:
            raise CorruptImageError(f"{key} holds {len(data)} bytes, not {length}")
        index_checksum = int.from_bytes(data[-CHECKSUM_BYTES:], "little")
        same = (zlib.crc32(data), index_checksum) == (table.crc32[place], table.index_crc32c[place])
        return data, same


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
