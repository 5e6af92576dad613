"""Images to OME-Zarr pyramids: ``convert`` for TIFF files, ``write_pyramid`` for arrays in memory.

Both are resumable and atomic (see ``storage.target``) and write exactly the same layout (see ``storage.ome_zarr``):
all channels in chunks of 128 x 128, sharded, levels of half the size by 2x2 means.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.build import ArraySource, Bands, Build, PixelSource
from storage.errors import ConversionError, MissingImageError, StorageError
from storage.ome_zarr import DTYPES, FORMAT, LevelInfo, PyramidInfo, metadata_files, parse_pyramid, with_shards
from storage.shard import BloscCodec, ShardLayout
from storage.target import Receipt, open_partial, verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from storage.tiff import TiffImage

CLEVELS = {"lz4": 5, "zstd": 1}
MAX_SHARD_BYTES = 64 * 2**20  # decoded; the shard side is halved until it holds
SAMPLED_BYTES = 64 * 1024  # at each end of a source, for its fingerprint


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What decides the bytes of a pyramid, besides the source."""

    codec: str = "lz4"  # "lz4" reads fastest; "zstd" is smaller
    chunk: int = 256  # pixels, side of what is decoded at once; 128 reads small patches from local disks faster
    shard: int = 2048  # pixels, side of a file; a multiple of chunk
    min_level_size: int = 64  # pixels; levels go on until the longer side is no more than this
    mpp: float | None = None  # micrometres per pixel of level 0; None takes the source's

    def __post_init__(self) -> None:
        if self.codec not in CLEVELS:
            raise ValueError(f"codec must be one of {', '.join(CLEVELS)}, not {self.codec!r}")
        if self.chunk < 1 or self.shard < self.chunk or self.shard % self.chunk or self.shard % 2:
            raise ValueError(f"shard must be even and a multiple of chunk, not {self.shard} and {self.chunk}")
        if self.min_level_size < 1:
            raise ValueError("min_level_size must be at least 1")
        if self.mpp is not None and not 0 < self.mpp < float("inf"):
            raise ValueError("mpp must be positive")


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did."""

    target: str
    shape: tuple[int, int, int]  # (C, H, W) of level 0
    dtype: str
    mpp: float | None  # micrometres per pixel of level 0
    levels: int
    raw_bytes: int  # of all levels, decoded
    stored_bytes: int  # of all shards
    shards: int
    shards_reused: int  # finished by an earlier run
    seconds: float
    up_to_date: bool = False  # the target was already this pyramid: nothing was done


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Turn a TIFF into an OME-Zarr 0.5 pyramid.

    Interrupted, it leaves ``TARGET.partial``; called again, it goes on from there and ends with the same bytes.

    Parameters
    ----------
    source
        A TIFF, BigTIFF, OME-TIFF or SVS file; of a pyramidal file the finest level.
    target
        Folder to make, usually named ``*.ome.zarr``. It appears in one step, when it is whole and verified.
    options
        Codec, layout and a pixel size overruling the source's.
    workers
        Threads; the processors of this process if None.
    progress
        Called with (bytes done, bytes in all), decoded and over all levels, from one thread at a time.
    overwrite
        Replace a target made from another source or with other options.

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError
        The source is missing, refused, or damaged.
    ConversionError
        The target exists, is being written by another process, or cannot be written.
    """
    from storage.tiff import TiffImage

    options = options or ConvertOptions()
    target = _as_target(target)
    with TiffImage(source) as image:
        mpp_yx = (options.mpp, options.mpp) if options.mpp else image.mpp_yx
        info = _plan(image, options, target, scale_yx=mpp_yx or (1.0, 1.0), unit="micrometer" if mpp_yx else None)
        info = replace(
            info,
            channels=image.channels,
            provenance={"source": _fingerprint(image.path), "options": asdict(options), "format": FORMAT},
        )
        return _write(
            image,
            info,
            target,
            strip_rows=_strip_rows(image, info.levels[0]),
            workers=workers or len(os.sched_getaffinity(0)),
            progress=progress,
            overwrite=overwrite,
        )


def write_pyramid(
    target: str | os.PathLike[str],
    array: NDArray[Any],
    *,
    name: str | None = None,
    mpp: float | None = None,
    downsample: float = 1.0,
    origin_l0_yx: tuple[float, float] = (0.0, 0.0),
    channels: tuple[str, ...] | None = None,
    window: tuple[float, float] | None = None,
    options: ConvertOptions | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Write an array in memory, such as an attention map, as a pyramid that lies right over its slide.

    Parameters
    ----------
    target
        Folder to make, as in ``convert``.
    array
        (C, H, W) uint8, uint16 or float32.
    name
        Name of the image; the target's by default.
    mpp
        Micrometres per pixel of the *slide's* level 0; None where unknown (then the unit is its pixel).
    downsample
        Level-0 pixels of the slide per pixel of ``array`` along each axis.
    origin_l0_yx
        Upper left corner of the array's first pixel, in level-0 pixels of the slide.
    channels
        Channel names.
    window
        Values shown darkest and brightest; the array's range for floats by default.
    options
        Codec and layout; its ``mpp`` is not used.
    overwrite
        Replace an existing target.

    Raises
    ------
    ConversionError
        The target exists or cannot be written.
    """
    if array.ndim != 3 or 0 in array.shape or array.dtype.name not in DTYPES:
        raise ValueError(f"expected (C, H, W) of {', '.join(DTYPES)}, not {array.shape} {array.dtype}")
    if not 0 < downsample < float("inf"):
        raise ValueError("downsample must be positive")
    target = _as_target(target)
    source = ArraySource(array)
    pixel = mpp or 1.0
    info = _plan(
        source,
        options or ConvertOptions(),
        target,
        scale_yx=(pixel * downsample, pixel * downsample),
        unit="micrometer" if mpp else None,
        first_yx=tuple(pixel * (corner + (downsample - 1) / 2) for corner in origin_l0_yx),
    )
    info = replace(
        info,
        name=name or info.name,
        channels=channels or info.channels,
        window=window or (_value_range(array) if array.dtype.kind == "f" else info.window),
    )
    return _write(source, info, target, overwrite=overwrite)


def _as_target(target: str | os.PathLike[str]) -> Path:
    text = os.fspath(target)
    if "://" in text:
        raise ConversionError(f"{text}: pyramids are written to local folders; copy the finished one there")
    return Path(text)


def _plan(
    source: PixelSource,
    options: ConvertOptions,
    target: Path,
    *,
    scale_yx: tuple[float, float],
    unit: str | None,
    first_yx: tuple[float, ...] = (0.0, 0.0),
) -> PyramidInfo:
    """Describe the pyramid of a source: its levels, halved until small, at least two."""
    channels, height, width = source.shape
    layout = _layout(source, options)
    levels: list[LevelInfo] = []
    while len(levels) < 2 or max(levels[-1].shape[1:]) > options.min_level_size:
        factor = 2 ** len(levels)
        levels.append(
            LevelInfo(
                path=str(len(levels)),
                shape=(channels, -(-height // factor), -(-width // factor)),
                layout=layout,
                scale_yx=(scale_yx[0] * factor, scale_yx[1] * factor),
                translation_yx=(
                    first_yx[0] + scale_yx[0] * (factor - 1) / 2,
                    first_yx[1] + scale_yx[1] * (factor - 1) / 2,
                ),
            )
        )
    limits = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0), "float32": (0.0, 1.0)}
    names = tuple(str(i) for i in range(channels))
    name = target.name.removesuffix(".zarr").removesuffix(".ome")
    return PyramidInfo(name, unit, names, limits[source.dtype.name], tuple(levels))


def _layout(source: PixelSource, options: ConvertOptions) -> ShardLayout:
    channels, dtype = source.shape[0], source.dtype
    shard = options.shard
    while shard > options.chunk and channels * shard * shard * dtype.itemsize > MAX_SHARD_BYTES:
        half = shard // 2 // options.chunk * options.chunk
        shard = half if half and half % 2 == 0 else options.chunk
    shuffle = "noshuffle" if dtype.itemsize == 1 else "shuffle"
    codec = BloscCodec(options.codec, CLEVELS[options.codec], shuffle, dtype.itemsize)
    return ShardLayout(channels, options.chunk, shard, dtype, codec)


def _write(
    source: PixelSource,
    info: PyramidInfo,
    target: Path,
    *,
    overwrite: bool,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    strip_rows: int | None = None,
) -> ConvertReport:
    """Build, verify and name a pyramid, or find that it is there.

    With ``strip_rows`` the source is decoded in bands first, because one of its strips spans several shards.
    """
    started = time.perf_counter()
    if (present := _already_there(target, info, overwrite=overwrite)) is not None:
        return _report(present, target, started, reused=None)
    with open_partial(target) as partial:
        if (present := _already_there(target, info, overwrite=overwrite)) is not None:
            partial.discard()  # another process finished it while this one waited for the lock
            return _report(present, target, started, reused=None)
        done = {(r.level, r.y, r.x): r for r in partial.resume(_job(info))}
        reused = len(done)
        shard = info.levels[0].layout.shard
        bands = Bands(source, partial.scratch, shard, strip_rows) if strip_rows else None
        build = Build(source, info.levels, partial, bands, progress, done)
        receipts = build.run(workers)
        verify(partial, receipts, {i: level.layout.index_bytes for i, level in enumerate(info.levels)})
        info = _with_receipts(info, receipts)
        for key, data in metadata_files(info).items():
            partial.write(key, [data])
        partial.commit(overwrite=overwrite)
    return _report(info, target, started, reused=reused)


def _already_there(target: Path, info: PyramidInfo, *, overwrite: bool) -> PyramidInfo | None:
    """Return the target's description if it is the pyramid asked for; None if it is to be made."""
    if not os.path.lexists(target):
        return None
    try:
        present = parse_pyramid(lambda key: (target / key).read_bytes(), str(target))
    except (StorageError, OSError):
        present = None  # foreign or damaged: only replaced if asked
    if present is not None and info.provenance and present.provenance == info.provenance:
        return present
    if overwrite:
        return None
    what = "holds a pyramid of another source or other options" if present else "exists and is not a sound pyramid"
    raise ConversionError(f"{target}: {what}; remove it or ask to overwrite it")


def _job(info: PyramidInfo) -> dict[str, Any]:
    """Tell what the journalled shards belong to; arrays in memory, which have no fingerprint, match nothing."""
    return info.provenance or {"array": f"{os.getpid()}-{time.time_ns()}"}


def _strip_rows(image: TiffImage, level: LevelInfo) -> int | None:
    """Rows of a strip or tile that spans several shards and must be decoded whole; None if none does."""
    if image.direct or level.shard_grid == (1, 1) or max(image.segment_yx) <= level.layout.shard:
        return None
    return image.segment_yx[0]


def _with_receipts(info: PyramidInfo, receipts: list[Receipt]) -> PyramidInfo:
    levels = []
    for number, level in enumerate(info.levels):
        own = [receipt for receipt in receipts if receipt.level == number]
        levels.append(with_shards(level, [r.length for r in own], [r.crc32c for r in own]))
    return replace(info, levels=tuple(levels))


def _report(info: PyramidInfo, target: Path, started: float, *, reused: int | None) -> ConvertReport:
    """Summarise a pyramid; ``reused`` None means that it was there."""
    tables = [level.shards for level in info.levels if level.shards is not None]
    shards = sum(table.length.size for table in tables)
    first = info.levels[0]
    return ConvertReport(
        target=str(target),
        shape=first.shape,
        dtype=first.layout.dtype.name,
        mpp=first.scale_yx[0] if info.unit == "micrometer" else None,
        levels=len(info.levels),
        raw_bytes=sum(level.nbytes for level in info.levels),
        stored_bytes=sum(int(table.length.sum()) for table in tables),
        shards=shards,
        shards_reused=shards if reused is None else reused,
        seconds=time.perf_counter() - started,
        up_to_date=reused is None,
    )


def _fingerprint(path: Path) -> dict[str, Any]:
    """Identify a file without reading all of it: length, time, and a hash of both its ends."""
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            digest = hashlib.sha256(file.read(SAMPLED_BYTES))
            file.seek(max(0, stat.st_size - SAMPLED_BYTES))
            digest.update(file.read(SAMPLED_BYTES))
    except FileNotFoundError:
        raise MissingImageError(f"{path}: does not exist; check the path") from None
    return {"name": path.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ends_sha256": digest.hexdigest()}


def _value_range(array: NDArray[Any]) -> tuple[float, float]:
    finite = array[np.isfinite(array)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
