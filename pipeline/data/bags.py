"""Files of features as others write and read them: TRIDENT's h5, and CLAM's h5 with its pt beside.

Both hold ``features`` (N, D) float32 and ``coords`` (N, 2), x and y of the first pixel of each patch in level-0
pixels of the slide. TRIDENT's has attributes of ``coords`` that tell size and magnification of the patches. What is
written here also tells the slide's pixels and the encoder (`SOURCE`), so that no file is taken for another's.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from nested_ats.files import open_regular
from pipeline.errors import DataError, UsageError
from pipeline.files import file_name, make_folder, write_atomic

Layout = Literal["trident", "clam"]

SOURCE = "nested_ats_source"  # attribute of `features`: what decides them, as a digest
ENCODER = "nested_ats_encoder"  # attribute of `features`: which encoder made them, and of which patches
_MOST = 2**34  # bytes of features that a file may say it holds; a large slide has 10^5 tiles of some kilobytes


@dataclass(frozen=True)
class Bag:
    """The features of a slide's patches.

    Attributes
    ----------
    features
        (N, D) float32.
    coords_xy
        (N, 2) int64: x and y of the first pixel of each patch in level-0 pixels of the slide.
    about
        What the file says of its patches: ``patch_size_level0`` and others.
    """

    features: NDArray[np.float32]
    coords_xy: NDArray[np.int64]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def made_by(self) -> str:
        """What tells the encoder: the name of TRIDENT's folder, or what is written here; empty where nothing does."""
        return str(self.about.get(ENCODER) or PurePath(str(self.about.get("savetodir", ""))).name)


def require_h5py() -> Any:
    """Import h5py.

    Raises
    ------
    UsageError
        It is not installed.
    """
    try:
        return import_module("h5py")
    except ImportError:
        raise UsageError("h5py is not installed: run pip install 'nested-ats[h5]'") from None


def bag_path(folder: Path, layout: Layout, slide_id: str) -> Path:
    """Return the place of a slide's h5 file below a folder."""
    name = f"{file_name(slide_id)}.h5"
    return folder / name if layout == "trident" else folder / "h5_files" / name


def write_bag(folder: Path, layout: Layout, slide_id: str, bag: Bag, source: str) -> None:
    """Write the file of a slide, and CLAM's pt, each whole or not at all.

    Raises
    ------
    UsageError
        It cannot be written.
    """
    h5py, buffer = require_h5py(), io.BytesIO()
    with h5py.File(buffer, "w") as file:
        features = file.create_dataset("features", data=bag.features)
        features.attrs.update({"name": slide_id, SOURCE: source})
        coords = file.create_dataset("coords", data=bag.coords_xy)
        coords.attrs.update({"name": slide_id, **bag.about})
    path = bag_path(folder, layout, slide_id)
    if layout == "clam":
        pt = io.BytesIO()
        torch.save(torch.from_numpy(bag.features), pt)
        write_atomic(make_folder(folder / "pt_files") / f"{path.stem}.pt", pt.getvalue())
    write_atomic(make_folder(path.parent) / path.name, buffer.getvalue())  # last: it says that all is there


def holds(folder: Path, layout: Layout, slide_id: str, source: str) -> bool:
    """Tell whether the file of a slide is there, with these features.

    Raises
    ------
    DataError
        There is a file, which cannot be read, or has features of another encoder, of other patches or of another
        slide of this name.
    """
    path = bag_path(folder, layout, slide_id)
    if not os.path.lexists(path):
        return False
    h5py = require_h5py()
    try:
        with h5py.File(path, "r") as file:
            found = file["features"].attrs.get(SOURCE)
    except (OSError, KeyError) as error:
        raise DataError(
            f"{path}: not a whole file of features ({error}); remove it, or give another --out"
        ) from error
    if found != source:
        whose = "was not written here" if found is None else "has features of another encoder, slide or grid"
        raise DataError(f"{path}: {whose}; give another --out, or --overwrite")
    return True


def read_bag(folder: Path, names: Sequence[str]) -> Bag:
    """Read the file of a slide, in either layout, by the first of its names that has one.

    Raises
    ------
    DataError
        There is no file, or it cannot be read or does not hold as many features as places.
    """
    places = [bag_path(folder, layout, name) for name in names for layout in get_args(Layout)]
    path = next(filter(os.path.lexists, places), None)
    if path is None:
        raise DataError(f"{places[0]}: does not exist, nor {places[-1]}; name the files as the slides")
    return read_bag_file(path)


def read_bag_file(path: Path) -> Bag:
    """Read a file of features, in either layout.

    Raises
    ------
    DataError
        It is missing, cannot be read, or does not hold as many features as places.
    """
    h5py = require_h5py()
    try:
        with open_regular(path) as data, h5py.File(data, "r") as file:
            declared = int(file["features"].size) * 4
            if declared > _MOST:
                raise DataError(f"{path}: says that it holds {declared / 1e9:.0f} GB of features; extract it again")
            features, coords = (np.asarray(file[name]) for name in ("features", "coords"))
            about = {
                name: _plain(value) for part in ("coords", "features") for name, value in file[part].attrs.items()
            }
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; extract it, or mend the manifest") from None
    except (OSError, KeyError, AttributeError) as error:  # AttributeError: a group of that name
        raise DataError(f"{path}: not a whole file of features and coords ({error}); extract it again") from error
    if features.ndim == 3 and len(features) == 1:
        features = features[0]  # as some versions write them
    sound = features.ndim == coords.ndim == 2 and len(features) == len(coords) > 0 and coords.shape[1] == 2
    if not sound or features.dtype.kind != "f" or coords.dtype.kind not in "iu":
        raise DataError(
            f"{path}: features {features.shape} of {features.dtype} and coords {coords.shape} of {coords.dtype}, "
            "where (N, D) numbers and (N, 2) whole ones are wanted; extract it again"
        )
    features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise DataError(f"{path}: features that are not finite; extract it again")
    return Bag(features, coords.astype(np.int64), {**about, "path": str(path)})


def _plain(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
