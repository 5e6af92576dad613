"""``doctor``: look at this machine and one slide, and say what to do about what is found.

Nothing is changed, downloaded or sent; one small file is written to the cache folder and removed again.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from packaging.requirements import Requirement

import cluster
from nested_ats.networks.presets import PRESETS
from nested_ats_start import HOME, OWN
from pipeline.data.selection import why_slow
from pipeline.data.slides import open_slide
from pipeline.files import cache_folder
from pipeline.net import Net
from pipeline.presets import encoders_here
from storage import processors
from storage.place.credentials import credentials_source

Status = Literal["ok", "note", "problem"]

# What each extra is for; those that only developers need are not looked at.
EXTRAS = {
    "cluster": "several workers or machines",
    "dask": "conversions on a Dask cluster",
    "timm": "encoders of timm, such as uni and virchow2",
    "transformers": "encoders of transformers, such as phikon-v2",
    "lora": "model.trainable: lora",
    "slides": "MRXS, DICOM and others by OpenSlide",
    "geo": "scenes on the Earth",
    "survival": "Brier scores of survival",
    "tables": "labels in workbooks of Excel",
    "view": "slides in a browser",
    "h5": "features in the files of TRIDENT and CLAM",
}
_LITTLE_DISK, _LITTLE_MEMORY = 10e9, 4e9  # bytes below which a note is due
_FEW_FILES = 4096  # descriptors: the most slides that are kept open take so many
_BOXES, _SIDE = 32, 256  # what is read of a slide, and its side in pixels
_SLOW_BOX_S = 0.1
_TIMEOUT_S = 120.0  # for a task of a cluster


@dataclass(frozen=True)
class Finding:
    """What one look has found.

    Attributes
    ----------
    check
        What was looked at.
    status
        ``ok``; ``note``, where something is missing that not everyone needs; or ``problem``.
    found
        What is there.
    advice
        What to do about it; empty where there is nothing to do.
    """

    check: str
    status: Status
    found: str
    advice: str = ""


def examine(slide: str | None = None, *, address: str = "none") -> Iterator[Finding]:
    """Look at everything, one after the other.

    Parameters
    ----------
    slide
        A slide to read from and to time, by path or URL.
    address
        The address of a Ray cluster that is to run one small task; ``none`` asks for none.
    """
    looks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", _versions),
        ("packages", _shadows),
        ("processor", _processor),
        ("GPU", _gpu),
        ("disk", _disks),
        ("object stores", _object_stores),
        ("encoders", _encoders),
    ]
    looks += [("Ray", partial(_ray, address))] if address != "none" else []
    looks += [("slide", partial(_slide, slide))] if slide else []
    for name, look in looks:
        with Net() as net:
            yield from look()
        if net.error:
            yield Finding(name, "problem", net.error)


def _versions() -> Iterator[Finding]:
    python = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    try:
        needed = [Requirement(text) for text in requires("nested-ats") or []]
    except PackageNotFoundError:
        yield Finding("nested-ats", "note", f"not installed, run from {HOME}; {python}", "pip install it")
        return
    yield Finding("nested-ats", "ok", f"{version('nested-ats')} at {HOME}, {python}, torch {torch.__version__}")
    wrong = [*filter(None, map(_misfit, (each for each in needed if not each.marker)))]
    if wrong:
        yield Finding("versions", "problem", "; ".join(wrong), "pip install --upgrade nested-ats")
    for extra, purpose in EXTRAS.items():
        own = [each for each in needed if each.marker and each.marker.evaluate({"extra": extra})]
        missing = [*filter(None, map(_misfit, own))]
        what = f"{extra}, for {purpose}"
        if missing:
            yield Finding("extra", "note", f"{what}: {'; '.join(missing)}", f"pip install 'nested-ats[{extra}]'")
        elif own:
            yield Finding("extra", "ok", f"{what}: {', '.join(f'{one.name} {version(one.name)}' for one in own)}")


def _misfit(wanted: Requirement) -> str:
    """Say what is wrong with a package that is needed; empty where nothing is."""
    try:
        there = version(wanted.name)
    except PackageNotFoundError:
        return f"{wanted.name} is not installed"
    fits = wanted.specifier.contains(there, prereleases=True)
    return "" if fits else f"{wanted.name} {there} is not {wanted.specifier}"


def _shadows() -> Iterator[Finding]:
    """Modules of the user's that scripts would import in place of our packages."""
    for folder in dict.fromkeys(os.path.abspath(each) for each in (os.getcwd(), *sys.path)):
        places = [os.path.join(folder, name + end) for name in OWN for end in (".py", os.sep + "__init__.py")]
        found = [place for place in places if folder != HOME and os.path.exists(place)]
        if found and os.path.exists(os.path.join(folder, "nested_ats_start.py")):
            yield Finding(
                "packages",
                "note",
                f"{folder}: holds our source too, which scripts there import in place of what is installed",
                "after a change of the source install it again, or once by pip install -e",
            )
        elif found:
            yield Finding(
                "packages",
                "problem",
                f"{', '.join(found)}: would be imported in place of our package of that name",
                "rename it, or start scripts there by python -P; the command nested-ats takes its own",
            )


def _processor() -> Iterator[Finding]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = f"{processors()} processors for this process, {memory / 1e9:.1f} GB of memory"
    little = "take a smaller train.batch_size and fewer workers" if memory < _LITTLE_MEMORY else ""
    yield Finding("processor", "note" if little else "ok", found, little)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < _FEW_FILES:
        yield Finding(
            "open files",
            "note",
            f"a process may hold {files} files open; many slides at once may need more",
            f"ulimit -n {_FEW_FILES}, before the command",
        )


def _gpu() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            yield Finding("GPU", "ok", f"{about.name}, {about.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}")
        return
    if not shutil.which("nvidia-smi"):
        yield Finding("GPU", "note", "none: models are computed by the processor")
    elif torch.version.cuda is None:
        advice = "install torch for CUDA, as https://pytorch.org/get-started/locally says"
        yield Finding("GPU", "problem", f"there is a driver, but torch {torch.__version__} is without CUDA", advice)
    else:
        advice = "compare its CUDA version with that which nvidia-smi shows, and see CUDA_VISIBLE_DEVICES"
        found = f"torch for CUDA {torch.version.cuda} sees none, though there is a driver"
        yield Finding("GPU", "problem", found, advice)


def _disks() -> Iterator[Finding]:
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=cache) as file:  # raises where nothing can be written
        file.write(bytes(4096))
    temporary = Path(tempfile.gettempdir())
    places = {"this folder": Path.cwd(), f"{cache}, for features and masks": cache, "temporary files": temporary}
    advice = "free some, or choose others (--out, data.features.folder, TMPDIR): features take gigabytes"
    for name, place in places.items():
        free = shutil.disk_usage(place).free
        little = free < _LITTLE_DISK
        yield Finding(
            "disk", "note" if little else "ok", f"{free / 1e9:.1f} GB free in {name}", advice if little else ""
        )


def _object_stores() -> Iterator[Finding]:
    source = credentials_source()
    if source:
        yield Finding("object stores", "ok", f"credentials for S3: {source}; nested-ats doctor s3://... tries them")
        return
    advice = "for s3:// set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for open buckets AWS_SKIP_SIGNATURE=true"
    yield Finding("object stores", "note", "no credentials for S3", advice)


def _encoders() -> Iterator[Finding]:
    here = encoders_here()
    if here:
        yield Finding("encoders", "ok", f"weights on this machine: {', '.join(here)}")
    missing = [name for name, preset in PRESETS.items() if preset.library and name not in here]
    if missing:
        advice = f"nested-ats info {missing[0]} names the page of its licence; then hf download, as it says there"
        yield Finding("encoders", "note", f"no weights here of {', '.join(missing)}", advice)


def _ray(address: str) -> Iterator[Finding]:
    began = time.monotonic()
    [outcome] = cluster.run_tasks(_Look, ["task"], address=address, timeout_s=_TIMEOUT_S)
    seconds = time.monotonic() - began
    if outcome.error:
        yield Finding("Ray", "problem", outcome.error, "look at the cluster's logs")
        return
    found = f"Ray {version('ray')} at {address} ran a task with {outcome.result} after {seconds:.0f} s"
    same = outcome.result == _Look()("")
    yield Finding("Ray", "ok" if same else "problem", found, "" if same else "install what is here on its nodes")


class _Look:
    """Says what a worker has: its versions of Python, torch and our packages."""

    def __call__(self, _task: str) -> str:
        try:
            own = version("nested-ats")
        except PackageNotFoundError:
            own = "not installed"
        return f"Python {platform.python_version()}, torch {torch.__version__}, nested-ats {own}"


def _slide(location: str) -> Iterator[Finding]:
    began = time.monotonic()
    with open_slide(location) as slide:
        opened = time.monotonic()
        room = [max(1, side - _SIDE) for side in slide.shape_yx]
        corners = np.random.default_rng(0).integers(0, room, (_BOXES, 2))
        slide.read_many(0, np.concatenate([corners, np.full((_BOXES, 2), _SIDE)], 1))
        each = (time.monotonic() - opened) / _BOXES
        height, width = slide.shape_yx
        yield Finding(
            "slide",
            "ok",
            f"{location}: {height} x {width} pixels, {len(slide.levels)} levels, opened in {opened - began:.2f} s; "
            f"each of {_BOXES} random boxes of {_SIDE} pixels took {each * 1e3:.1f} ms and "
            f"{slide.statistics.bytes_read / _BOXES / 1e3:.0f} kB",
        )
        if slide.mpp is None:
            advice = "give the manifest a column mpp, or set data.assume_mpp, where the model has a scale (model.mpp)"
            yield Finding("slide", "note", "it does not tell how many micrometres a pixel measures", advice)
        slow = next(filter(None, map(why_slow, slide.levels)), "")
        if slow or each > _SLOW_BOX_S:
            found = f"slow to read: {slow or 'each box takes long, over this network or disk'}"
            yield Finding("slide", "note", found, "nested-ats convert makes a pyramid of it, once, at a place nearby")
