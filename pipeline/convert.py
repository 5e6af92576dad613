"""``convert``: from image files to pyramids, and a manifest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import DataError, UsageError
from pipeline.files import file_name, make_folder
from pipeline.manifest import Entry, read_manifest, slide_name, write_manifest
from pipeline.progress import progress
from storage import ConvertOptions, ConvertReport, StorageError, convert

MANIFEST = "manifest.csv"
_IMAGES = (".tif", ".tiff", ".svs")


@dataclass(frozen=True)
class Conversion:
    """What became of one slide: a report or an error."""

    entry: Entry
    report: ConvertReport | None
    error: str = ""


def find_images(sources: Sequence[str]) -> list[Entry]:
    """Entries of files, of folders of TIFFs (with their subfolders), or of one manifest.

    Raises
    ------
    UsageError
        Nothing is there, a manifest is wrong, or two files would be one slide.
    """
    if len(sources) == 1 and Path(sources[0]).suffix in (".csv", ".parquet"):
        return read_manifest(Path(sources[0]))
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGES and not p.name.startswith("."))
        else:
            files.append(path)
    if not files:
        raise UsageError(f"{', '.join(sources)}: no image here ({', '.join(_IMAGES)})")
    entries = [Entry(slide_id=slide_name(path.name), path=str(path.absolute())) for path in files]
    names: dict[str, str] = {}
    for entry in entries:
        other = names.setdefault(entry.slide_id, entry.path)
        if other != entry.path:
            raise UsageError(
                f"{entry.path} and {other} would both be slide {entry.slide_id}; name them apart in a manifest"
            )
    return entries


def convert_all(
    entries: Sequence[Entry],
    folder: Path,
    *,
    options: ConvertOptions,
    workers: int | None = None,
    overwrite: bool = False,
    fail_fast: bool = False,
) -> list[Conversion]:
    """Convert slides into ``folder/SLIDE.ome.zarr`` and write ``folder/manifest.csv`` of those that are there.

    Slides that were converted before are kept, one that was interrupted goes on; one that fails is reported and
    the others go on.

    Parameters
    ----------
    entries
        Slides; an mpp of theirs overrules that of `options`.
    folder
        Made where it is missing.
    options
        Codec and layout.
    workers
        Threads; by default one a processor.
    overwrite
        Replace pyramids of another source or other options.
    fail_fast
        Stop at the first failure.

    Raises
    ------
    UsageError
        `folder` cannot be written to.
    DataError
        With `fail_fast`, a slide failed.
    """
    make_folder(folder)
    conversions: list[Conversion] = []
    with progress("convert") as update:
        for number, entry in enumerate(entries):
            words = f"{entry.slide_id} ({number + 1}/{len(entries)})"

            def on_bytes(done: int, total: int, number: int = number, words: str = words) -> None:
                update(number + done / max(total, 1), len(entries), words)

            target = folder / f"{file_name(entry.slide_id)}.ome.zarr"
            chosen = replace(options, mpp=entry.mpp) if entry.mpp else options
            try:
                report = convert(
                    entry.path, target, options=chosen, workers=workers, progress=on_bytes, overwrite=overwrite
                )
                conversions.append(Conversion(replace(entry, path=str(target.absolute())), report))
            except StorageError as error:
                if fail_fast:
                    raise DataError(f"slide {entry.slide_id}: {error}") from error
                conversions.append(Conversion(entry, None, str(error)))
            update(number + 1, len(entries), words)
    done = [conversion.entry for conversion in conversions if conversion.report]
    if done:
        # The pixel size is in the pyramid now.
        write_manifest(folder / MANIFEST, [replace(entry, mpp=None) for entry in done])
    return conversions
