"""``convert``: turn image files into pyramids, and write a manifest of them."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cluster
from pipeline.data.manifest import Entry, read_manifest, write_manifest
from pipeline.data.naming import check_alone, paths_by_id
from pipeline.errors import UsageError
from pipeline.files import file_name, make_folder
from pipeline.net import Net
from pipeline.progress import SlideProgress, progress
from storage import (
    ConversionError,
    ConvertOptions,
    ConvertReport,
    convert,
    open_image,
    processors,
)
from storage.place.urls import is_remote

if TYPE_CHECKING:
    from storage.conversion.executors import CustomExecutor, Executor

MANIFEST = "manifest.csv"
_PYRAMID = ".ome.zarr"
_TASK_TIMEOUT_S = 3600.0  # a part of a slide may take so long on a Ray worker, which may hang with its file system


@dataclass(frozen=True)
class Conversion:
    """What became of one slide: a report or an error."""

    entry: Entry
    report: ConvertReport | None
    error: str = ""


@dataclass(frozen=True)
class Plan:
    """What would be done with one slide: its shape (C, H, W) and target, or why it cannot be converted."""

    entry: Entry
    target: str
    shape: tuple[int, int, int] | None
    error: str = ""

    @property
    def text(self) -> str:
        """The target and the size of the slide, in one line."""
        channels, height, width = self.shape or (0, 0, 0)
        return f"{self.target}: {height} x {width} pixels, {channels} channels"


def plan_all(entries: Sequence[Entry], out: str | Path, *, options: ConvertOptions) -> list[Plan]:
    """Look at every image without decoding or writing anything.

    Raises
    ------
    UsageError
        `out` is neither a folder nor a whole URL.
    """
    plans = []
    paths = paths_by_id(entries)
    for entry in entries:
        target = _target(out, entry)
        with Net() as net:
            check_alone(entry, paths)
            with open_image(entry.path, allow_sparse=options.allow_sparse, pages=options.pages) as image:
                plans.append(Plan(entry, target, image.shape))
        if net.error:
            plans.append(Plan(entry, target, None, net.error))
    return plans


def convert_all(
    entries: Sequence[Entry],
    out: str | Path,
    *,
    options: ConvertOptions,
    manifest: Path | None = None,
    executor: str = "threads",
    address: str = "none",
    workers: int | None = None,
    overwrite: bool = False,
    fail_fast: bool = False,
) -> list[Conversion]:
    """Convert slides into ``out/SLIDE.ome.zarr`` and write a manifest of all that are there.

    A manifest that an earlier call wrote is added to: labels that were filled in by hand stay, and so do slides that
    another process converts at the same time. Slides that were converted before are kept, and an interrupted one goes
    on. A slide that fails is reported and the others go on; slides that share an id fail.

    Parameters
    ----------
    entries
        The slides; an mpp of theirs overrules that of `options`.
    out
        A folder, which is made where it is missing, or a URL.
    options
        The codec and the layout.
    manifest
        The CSV file to write or add to; by default `manifest_path` of `out`.
    executor
        What runs the tasks of a conversion, see `storage.convert`.
    address
        ``none``, or the address of the Ray cluster to use instead of `executor`, see `cluster.session`.
    workers
        The number of threads, processes or Ray workers, by default one for each processor.
    overwrite
        Whether to replace pyramids of another source or other options.
    fail_fast
        Whether to stop at the first failure.

    Raises
    ------
    UsageError
        `out` is no whole URL or cannot be written to, or `manifest` is one of something else, which would be lost.
    DataError
        A slide failed, and `fail_fast` is set.
    cluster.ClusterError
        There is no such cluster.
    """
    root = _root(out)
    if not is_remote(root):
        make_folder(Path(root))
    manifest = manifest or manifest_path(out)
    make_folder(manifest.parent)
    known_slides(out, manifest)
    conversions: list[Conversion] = []
    paths = paths_by_id(entries)
    spread: Executor = executor
    if address != "none":
        spread = ray_executor(address, workers or processors())
    try:
        with cluster.session(address), progress("convert") as update:
            shown = SlideProgress(update, len(entries))
            for entry in entries:
                shown.begin(entry.slide_id)
                target = _target(out, entry)
                with Net(entry.slide_id, fail_fast=fail_fast) as net:
                    check_alone(entry, paths)
                    report = convert(
                        entry.path,
                        target,
                        options=replace(options, mpp=entry.mpp) if entry.mpp else options,
                        executor=spread,
                        workers=workers,
                        progress=shown.on_bytes,
                        overwrite=overwrite,
                    )
                    conversions.append(Conversion(replace(entry, path=target), report))
                if net.error:
                    conversions.append(Conversion(entry, None, net.error))
                shown.end()
    finally:  # the manifest has all that is there, also after an interrupt
        _add_to_manifest(manifest, out, [conversion.entry for conversion in conversions if conversion.report])
    return conversions


def summary(conversions: Sequence[Conversion]) -> str:
    """Say in one line how many slides and bytes were converted."""
    reports = [conversion.report for conversion in conversions if conversion.report]
    new = [report for report in reports if not report.up_to_date]
    raw, stored = sum(report.raw_bytes for report in new), sum(report.stored_bytes for report in new)
    sizes = f"{raw / 1e6:.0f} MB raw, {stored / 1e6:.0f} MB stored"
    return f"{len(new)} converted ({sizes}), {len(reports) - len(new)} up to date"


def ray_executor(address: str, workers: int) -> CustomExecutor:
    """Give the function through which `storage.convert` runs its tasks on Ray workers.

    Parameters
    ----------
    address
        The address of the cluster, see `cluster.session`.
    workers
        The largest number of workers, of one CPU each.
    """

    def run(make_worker: Callable[[], Callable[[Any], Any]], items: Sequence[Any]) -> Iterator[Any]:
        tasks = cluster.run_tasks(make_worker, items, address=address, workers=workers, timeout_s=_TASK_TIMEOUT_S)
        with closing(tasks) as outcomes:
            for outcome in outcomes:
                if outcome.error is not None:
                    raise ConversionError(f"a Ray worker failed ({outcome.error}); run again to go on from here")
                yield outcome.result

    return run


def manifest_path(out: str | Path) -> Path:
    """Tell where the manifest of a folder of pyramids is: in it, or for a URL in the working directory."""
    return Path(MANIFEST) if is_remote(out) else Path(out) / MANIFEST


def _root(out: str | Path) -> str:
    """Return the absolute path or URL that pyramids go below; half a URL, which would be a folder, is refused."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(?!//[^/])(/|$)", text := str(out)):
        raise UsageError(f"--out {text}: not a whole URL; give scheme://bucket[/folder], as in s3://bucket/pyramids")
    return text.rstrip("/") if is_remote(text) else os.path.abspath(text)


def _target(out: str | Path, entry: Entry) -> str:
    return f"{_root(out)}/{file_name(entry.slide_id)}{_PYRAMID}"


def known_slides(out: str | Path, manifest: Path | None = None) -> dict[str, Entry]:
    """Read from the manifest that is there which slides were converted to a folder or URL before, by id.

    Raises
    ------
    UsageError
        The manifest cannot be read, or is one of something else, which would be lost.
    """
    manifest = manifest or manifest_path(out)
    if not manifest.exists():
        return {}
    try:
        entries = read_manifest(manifest)
    except UsageError as error:
        raise UsageError(f"{error}; mend it or move it away: convert writes its own manifest there") from error
    if not all(e.path.endswith(_PYRAMID) and e.path.rpartition("/")[0] == _root(out) for e in entries):
        raise UsageError(
            f"{manifest}: would be replaced, and it is not a manifest of pyramids in {out}; "
            "give another --out or --manifest"
        )
    return {entry.slide_id: entry for entry in entries}


def _add_to_manifest(manifest: Path, out: str | Path, done: Sequence[Entry]) -> None:
    """Add what was converted to what is in the manifest by now."""
    if done:
        with _locked(manifest.parent):
            write_manifest(manifest, _merge(known_slides(out, manifest), done))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time read a manifest in this folder and replace it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems cannot lock folders: there, only chance protects
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _merge(known: dict[str, Entry], done: Sequence[Entry]) -> list[Entry]:
    """Merge what was converted into what was there; labels that were written into the manifest since then are kept.

    Rows of folders that are gone are dropped; URLs are not looked up.
    """
    rows = {name: entry for name, entry in known.items() if is_remote(entry.path) or Path(entry.path).exists()}
    for entry in done:
        old = rows.get(entry.slide_id, entry)
        rows[entry.slide_id] = replace(
            entry,
            label=entry.label or old.label,
            case_id=entry.case_id or old.case_id,
            split=entry.split or old.split,
            fold=entry.fold or old.fold,
            mpp=None,  # it is in the pyramid now
            extra={**old.extra, **entry.extra},
        )
    return list(rows.values())
