"""Images to OME-Zarr pyramids: ``convert`` for image files, ``write_pyramid`` for arrays in memory.

Both are resumable and atomic (see ``storage.conversion.partial``) and write exactly the same layout (see
``storage.format.ome_zarr``): all channels in chunks of 128 x 128, sharded, levels of half the size by 2x2 means.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.conversion.build import ArraySource, Bands, Job, PixelSource, build
from storage.conversion.executors import Executor, check_executor, open_executor
from storage.conversion.existing import already_there
from storage.conversion.plan import ConvertOptions, plan
from storage.conversion.receipts import Receipt, by_place
from storage.conversion.target import partial_of
from storage.errors import ConversionError, CorruptImageError, StorageError
from storage.format import georeference as geo
from storage.format.nodata import to_json
from storage.format.ome_zarr import FORMAT, LevelInfo, PyramidInfo, metadata_files, with_shards
from storage.format.own_array import DTYPES
from storage.place.files import fingerprint
from storage.place.location import split_page
from storage.place.urls import is_remote
from storage.threads import processors

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from storage.format.georeference import Georeference
    from storage.images.image import Image


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
    up_to_date: bool = False  # the target was already this pyramid and nothing was done


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    executor: Executor = "threads",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Turn an image into an OME-Zarr 0.5 pyramid.

    An interrupted conversion leaves ``TARGET.partial``; called again, it goes on from there and ends with the same
    bytes. Nothing is left of a source that turns out to be damaged.

    Parameters
    ----------
    source
        A TIFF, BigTIFF, OME-TIFF or SVS file, whose finest level is taken, or a PNG, JPEG or BMP file, by path or by
        http, https, s3 or gs URL.
    target
        Folder or s3, gs or az URL to make, usually named ``*.ome.zarr``. It appears when it is whole and verified.
    options
        Codec, layout and a pixel size that overrules the source's.
    executor
        "threads", "processes", the address of a ``distributed`` scheduler, or a function: see
        ``storage.conversion.executors.open_executor``. All of them write the same bytes.
    workers
        Number of threads or processes; by default one for each processor, and one more thread.
    progress
        Called in this thread with (bytes done, bytes in all), decoded and over all levels.
    overwrite
        Replace a target made from another source or with other options.

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
        The source is missing, refused, damaged or cannot be fetched.
    ConversionError
        The target exists, is being written by another process, or cannot be written.
    """
    from storage.images.opening import open_image

    options = options or ConvertOptions()
    if (page := split_page(source)[1]) is not None:  # it is what an option would be
        options = replace(options, pages=page)
    check_executor(executor)
    place = os.fspath(target)
    provenance: dict[str, Any] = {"source": fingerprint(source), "options": options.plain, "format": FORMAT}
    with open_image(source, allow_sparse=options.allow_sparse, pages=options.pages) as image:
        if image.nodata is not None:  # it decides pixels, and those made before it was heeded are others
            provenance["nodata"] = to_json(image.nodata)
        if image.alpha is not None:  # so does that
            provenance["alpha"] = image.alpha
        if image.georeference is not None:  # pyramids made before it was kept lack it
            provenance["georeference"] = geo.to_json(image.georeference)
        mpp_yx = (options.mpp, options.mpp) if options.mpp else image.mpp_yx
        unit = "micrometer" if mpp_yx else None
        planned = plan(image, options, place, scale_yx=mpp_yx or (1.0, 1.0), unit=unit)
        info = replace(
            planned,
            channels=image.channels,
            nodata=image.nodata,
            bits=image.bits,
            alpha=image.alpha,
            georeference=image.georeference,
            window=(0.0, 2.0**image.bits - 1) if image.bits else planned.window,
            provenance=provenance,
        )
        return write(
            image,
            info,
            place,
            strip_rows=_strip_rows(image, info.levels[0]),
            executor=executor,
            # There is one thread more than processors, because one always waits for the disk.
            workers=workers or processors() + (executor == "threads"),
            progress=progress,
            overwrite=overwrite,
            file=source,
        )


def write_pyramid(
    target: str | os.PathLike[str],
    array: NDArray[Any],
    *,
    name: str | None = None,
    mpp: float | None = None,
    downsample: float = 1.0,
    channels: tuple[str, ...] | None = None,
    georeference: Georeference | None = None,
    options: ConvertOptions | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Write an array in memory, such as an attention map, as a pyramid that is aligned with its slide.

    Parameters
    ----------
    target
        Folder or URL to make, as in ``convert``.
    array
        (C, H, W) uint8, int8, uint16, int16, uint32, int32, float32 or float64.
    name
        Name of the image; the target's by default.
    mpp
        Micrometres per pixel of the *slide's* level 0; None where unknown, so that its pixel is the unit.
    downsample
        Level-0 pixels of the slide per pixel of ``array`` along each axis.
    channels
        Channel names.
    georeference
        Where on the Earth ``array`` lies.
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
    if not 0 < downsample < float("inf") or (mpp is not None and not 0 < mpp < float("inf")):
        raise ValueError("downsample and mpp must be positive")
    place = os.fspath(target)
    source = ArraySource(array.astype(array.dtype.newbyteorder("="), copy=False))
    pixel = mpp or 1.0
    first = pixel * (downsample - 1) / 2  # the first pixel's centre, where the array begins with its slide
    info = plan(
        source,
        options or ConvertOptions(),
        place,
        scale_yx=(pixel * downsample, pixel * downsample),
        unit="micrometer" if mpp else None,
        first_yx=(first, first),
    )
    info = replace(
        info,
        name=name or info.name,
        channels=channels or info.channels,
        georeference=georeference,
        window=_value_range(array) if array.dtype.kind == "f" else info.window,
    )
    return write(source, info, place, overwrite=overwrite)


def write(
    source: PixelSource,
    info: PyramidInfo,
    target: str,
    *,
    overwrite: bool,
    executor: Executor = "threads",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    strip_rows: int | None = None,
    file: str | os.PathLike[str] | None = None,
) -> ConvertReport:
    """Build, verify and publish a pyramid, unless it already exists.

    With ``strip_rows`` the source is decoded in bands first, because one of its strips spans several shards. The
    ``file`` behind the source, if there is one, must not change meanwhile.
    """
    started = time.perf_counter()
    if (present := already_there(target, info, overwrite=overwrite)) is not None:
        partial_of(target).sweep(target)
        return _report(present, target, started, reused=None)
    with partial_of(target).open(target) as output:
        if (present := already_there(target, info, overwrite=overwrite)) is not None:
            output.discard()  # another process finished it before this one had the lock
            return _report(present, target, started, reused=None)
        done = by_place(output.resume(_job(info)))
        reused = len(done)
        count = _counter(info, progress, list(done.values()))

        def on_made(receipts: list[Receipt]) -> None:
            output.record(receipts)
            count(receipts)

        if strip_rows and is_remote(target) and executor not in ("threads", "processes"):
            raise ConversionError(
                f"{target}: the source's long strips are decoded to scratch files, which workers elsewhere would not "
                "see; use threads or processes, or write to a folder that all share"
            )
        shard = info.levels[0].layout.shard
        bands = Bands(source, output.scratch, shard, strip_rows) if strip_rows else None
        job = Job(source, info.levels, output.output, bands, target, info.nodata, info.alpha)
        try:
            with open_executor(executor, workers, job) as run:
                receipts = build(job, done, run, on_made)
        except CorruptImageError:  # the source stays damaged, so nothing is worth keeping
            with contextlib.suppress(OSError, StorageError):  # a worker elsewhere may still be writing
                output.discard()
            raise
        if file is not None and fingerprint(file) != info.provenance["source"]:
            raise ConversionError(f"{os.fspath(file)}: was changed while it was converted; convert it again")
        output.verify(receipts, info.levels[0].layout.index_bytes)
        info = _with_receipts(info, receipts)
        output.commit(metadata_files(info), overwrite=overwrite)
    return _report(info, target, started, reused=reused)


def _counter(
    info: PyramidInfo, progress: Callable[[int, int], None] | None, reused: list[Receipt]
) -> Callable[[list[Receipt]], None]:
    """Return a function that counts the decoded bytes of finished shards and reports them to ``progress``.

    The first report is of what was there before, even if nothing, so that speed is measured from there.
    """

    def nbytes(receipt: Receipt) -> int:
        return info.levels[receipt.level].shard_bytes(receipt.y, receipt.x)

    progress = progress or (lambda *_: None)
    total = sum(level.nbytes for level in info.levels)
    done = sum(map(nbytes, reused))
    progress(done, total)

    def count(receipts: list[Receipt]) -> None:
        nonlocal done
        for receipt in receipts:
            done += nbytes(receipt)
            progress(done, total)

    return count


def _job(info: PyramidInfo) -> dict[str, Any]:
    """Describe the job of the journalled shards; arrays in memory have no fingerprint and match nothing."""
    return info.provenance or {"array": f"{os.getpid()}-{time.time_ns()}"}


def _strip_rows(image: Image, level: LevelInfo) -> int | None:
    """Rows of a strip or tile that spans several shards and must be decoded whole; None if there is none."""
    if image.direct or level.shard_grid == (1, 1) or max(image.segment_yx) <= level.layout.shard:
        return None
    return image.segment_yx[0]


def _with_receipts(info: PyramidInfo, receipts: list[Receipt]) -> PyramidInfo:
    levels = []
    for number, level in enumerate(info.levels):
        own = [receipt for receipt in receipts if receipt.level == number]
        table = ([r.length for r in own], [r.crc32 for r in own], [r.index_crc32c for r in own])
        levels.append(with_shards(level, *table))
    return replace(info, levels=tuple(levels))


def _report(info: PyramidInfo, target: str, started: float, *, reused: int | None) -> ConvertReport:
    """Summarise a pyramid; ``reused`` is None if it already existed."""
    tables = [level.table for level in info.levels]
    shards = sum(table.length.size for table in tables)
    first = info.levels[0]
    return ConvertReport(
        target=target,
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


def _value_range(array: NDArray[Any]) -> tuple[float, float]:
    finite = array[np.isfinite(array)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
