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
_PYRAMID = ".ome.zarr"


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
    files: list[str] = []
    for source in sources:
        path = Path(source)
        files += sorted(str(p) for p in path.rglob("*") if _is_image(p)) if path.is_dir() else [source]
    if not files:
        raise UsageError(f"{', '.join(sources)}: no image here ({', '.join(_IMAGES)})")
    return name_slides(files)


def name_slides(places: Sequence[str]) -> list[Entry]:
    """Entries of paths or URLs, named after their files; a place given twice is one slide.

    Raises
    ------
    UsageError
        Two of them would be one slide.
    """
    slides: dict[str, Entry] = {}
    for place in places:
        path = place if "://" in place else str(Path(place).absolute())
        entry = Entry(slide_id=slide_name(path), path=path)
        other = slides.setdefault(entry.slide_id, entry).path
        if other != path:
            raise UsageError(
                f"{path} and {other} would both be slide {entry.slide_id}; name them apart in a manifest"
            )
    return list(slides.values())


def convert_all(
    entries: Sequence[Entry],
    folder: Path,
    *,
    options: ConvertOptions,
    workers: int | None = None,
    overwrite: bool = False,
    fail_fast: bool = False,
) -> list[Conversion]:
    """Convert slides into ``folder/SLIDE.ome.zarr`` and write ``folder/manifest.csv`` of all that are there.

    The manifest that an earlier call wrote is added to: labels that were filled in by hand stay. Slides that were
    converted before are kept, one that was interrupted goes on; one that fails is reported and the others go on.

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
        `folder` cannot be written to, or holds a manifest of something else, which would be lost.
    DataError
        With `fail_fast`, a slide failed.
    """
    make_folder(folder)
    known = _known(folder)
    conversions: list[Conversion] = []
    with progress("convert") as update:
        for number, entry in enumerate(entries):
            words = f"{entry.slide_id} ({number + 1}/{len(entries)})"

            def on_bytes(done: int, total: int, number: int = number, words: str = words) -> None:
                update(number + done / max(total, 1), len(entries), words)

            target = folder / f"{file_name(entry.slide_id)}{_PYRAMID}"
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
        write_manifest(folder / MANIFEST, _merge(known, done))
    return conversions


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGES and not path.name.startswith(".") and not path.is_dir()


def _known(folder: Path) -> dict[str, Entry]:
    """Rows of the manifest that is there; refuse one of something else, which would be lost."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        entries = read_manifest(path)
    except UsageError as error:
        raise UsageError(f"{error}; mend it or move it away: convert writes its own manifest there") from error
    paths = [Path(entry.path) for entry in entries]
    if not all(p.parent == folder.absolute() and p.name.endswith(_PYRAMID) for p in paths):
        raise UsageError(f"{path}: would be replaced, and it is not a manifest of pyramids here; give another --out")
    return {entry.slide_id: entry for entry in entries}


def _merge(known: dict[str, Entry], done: Sequence[Entry]) -> list[Entry]:
    """Rows of what was converted now or before; labels that were written into the manifest since are kept."""
    rows = {name: entry for name, entry in known.items() if Path(entry.path).exists()}
    for entry in done:
        old = rows.get(entry.slide_id, entry)
        rows[entry.slide_id] = replace(
            entry,
            label=entry.label or old.label,
            case_id=entry.case_id or old.case_id,
            split=entry.split or old.split,
            fold=entry.fold or old.fold,
            mpp=None,  # it is in the pyramid now
        )
    return list(rows.values())
