"""The two published data sets of the paper's experiments, as entries of a manifest; both are downloaded by hand.

Colon cancer (section 4.3; Sirinukunwattana et al. 2016, ``CRCHistoPhenotypes_2016_04_28.zip``): 100 images, and
MATLAB files of the cells in them. An image is positive where it has an epithelial cell (Ilse et al. 2018). There is
no published split, and which images share a patient is not published: splits are drawn for each run, by its seed.

Speed limits (section 4.4; Larsson & Felsberg 2011, ``Set1Part0.zip`` and ``Set2Part0.zip``, and an
``annotations.txt`` of each): Set1 trains and Set2 tests. The paper does not say which images it keeps of those
annotated; the rule here is that of the authors' published code (github.com/idiap/attention-sampling,
``scripts/speed_limits.py``):

- ``MISC_SIGNS`` are left out of account. An image with no other sign is of class "none".
- An image with a sign of 50, 70 or 80 that is ``VISIBLE`` is of the class of the largest such sign, whatever else it
  shows. Images with other signs alone, or whose limits are all of another visibility (blurred, occluded, at a side
  road), are not used.

As there, only what decides a class is insisted on: a sign of another kind may have any box, or none.

By it the published files give 747 training and 684 test images, as the paper and others who applied it report
(google-research, ``ptopk_patch_selection``); that was not tried here, where they could not be downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import Entry
from pipeline.errors import DataError

EPITHELIAL, NO_EPITHELIAL = "epithelial", "none"
LIMITS = {"50_SIGN": "50", "70_SIGN": "70", "80_SIGN": "80"}  # name in the annotations, class
NO_LIMIT = "none"
SETS = {"Set1": "train", "Set2": "test"}
ANNOTATIONS = "annotations.txt"

_MAT_BYTES = 2**20  # most that a file of points may have; it may be compressed, up to a thousandfold
# What begins a field; the authors' code too drops what some have behind it.
_NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")

Box = tuple[float, float, float, float]


class Sign(NamedTuple):
    """One annotated traffic sign; box is y, x, height and width in pixels."""

    visibility: str  # VISIBLE, BLURRED, SIDE_ROAD, OCCLUDED, ...
    box: Box
    name: str  # such as 50_SIGN

    @property
    def area(self) -> float:
        """Pixels of the box."""
        return self.box[2] * self.box[3]


def colon_cancer(folder: Path) -> list[Entry]:
    """Read the labels of the colon cancer set, "epithelial" or "none", one image an entry.

    Parameters
    ----------
    folder
        The published ``Classification`` folder, with ``imgN/imgN.bmp`` and ``imgN/imgN_epithelial.mat``.

    Returns
    -------
    Entries in the order of N, without splits.

    Raises
    ------
    DataError
        No image is there, one of an image's files is missing, or a file of points is not one.
    """
    points = colon_cancer_points(folder)
    return [
        Entry(
            slide_id=name,
            path=str((folder / name / f"{name}.bmp").absolute()),
            label=EPITHELIAL if len(found) else NO_EPITHELIAL,
        )
        for name, found in points.items()
    ]


def colon_cancer_points(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Read where the epithelial cells of each image lie.

    Returns
    -------
    (cells, 2) centres, y and x from 0 in pixels, by name of the image.

    Raises
    ------
    DataError
        As `colon_cancer`.
    """
    found = [path for path in folder.glob("img*") if re.fullmatch(r"img\d+", path.name)]
    if not found:
        raise DataError(
            f"{folder}: no folders img1, img2, ...; give the folder Classification of CRCHistoPhenotypes_2016_04_28"
        )
    points = {}
    for path in sorted(found, key=lambda path: int(path.name[3:])):
        image, mat = path / f"{path.name}.bmp", path / f"{path.name}_epithelial.mat"
        for file in (image, mat):
            if not file.is_file():
                raise DataError(f"{file}: is not there; unpack the published archive again")
        points[path.name] = _read_points(mat)
    return points


def _read_points(path: Path) -> NDArray[np.float64]:
    """Points of a MATLAB file: its array `detection` has a row of x and y, from 1, for each cell; NaN is no cell."""
    from scipy.io import loadmat

    if path.stat().st_size > _MAT_BYTES:
        raise DataError(
            f"{path}: more than {_MAT_BYTES} bytes, too many for a list of cells; unpack the archive again"
        )
    try:
        values = loadmat(path, appendmat=False, variable_names=["detection"])["detection"]
    except KeyError:
        raise DataError(f"{path}: holds no array named detection; it is not one of the published files") from None
    except Exception as error:  # whatever damage makes of scipy's parser
        raise DataError(f"{path}: not a MATLAB file that can be read ({error}); unpack the archive again") from error
    if values.size == 0:
        return np.empty((0, 2))
    # A sparse matrix is no ndarray.
    numbers = isinstance(values, np.ndarray) and values.dtype.kind in "iuf"
    if not numbers or values.ndim != 2 or values.shape[1] != 2:
        raise DataError(f"{path}: detection is no array of x and y; it is not one of the published files")
    points: NDArray[np.float64] = values[:, ::-1].astype(np.float64) - 1
    return points[np.isfinite(points).all(1)]


def traffic_signs(folder: Path) -> list[Entry]:
    """Read the labels of the speed limits set, "none", "50", "70" or "80", one image an entry.

    Parameters
    ----------
    folder
        Holds ``Set1`` and ``Set2``, each with its images and ``annotations.txt``.

    Returns
    -------
    Entries of the images that are used, those of Set1 in split train and of Set2 in test.

    Raises
    ------
    DataError
        Annotations are missing or malformed, or name an image twice or one that is not there.
    """
    entries = []
    for name, split in SETS.items():
        path = folder / name / ANNOTATIONS
        for number, file, signs in _read_annotations(path):
            label = _class_of(signs)
            if label is None:
                continue
            image = path.parent / file
            if not image.is_file():
                raise DataError(f"{path}: line {number}: {file} is not there; unpack {name}Part0.zip into {name}")
            entries.append(
                Entry(slide_id=_slide_id(name, file), path=str(image.absolute()), label=label, split=split)
            )
        if not any(entry.split == split for entry in entries):
            raise DataError(f"{path}: no image that is used; take the published file")
    return entries


def traffic_sign_boxes(folder: Path) -> dict[str, list[Box]]:
    """Read where the signs of 50, 70 and 80 lie, in pixels, by the slide ids of `traffic_signs`.

    Raises
    ------
    DataError
        Annotations are missing or malformed.
    """
    return {
        _slide_id(name, file): [sign.box for sign in signs if sign.name in LIMITS]
        for name in SETS
        for _, file, signs in _read_annotations(folder / name / ANNOTATIONS)
    }


def _slide_id(name: str, file: str) -> str:
    return f"{name}-{Path(file).stem}"


def _class_of(signs: list[Sign]) -> str | None:
    """Class of an image by the rule above; none where it is not used."""
    if not signs:
        return NO_LIMIT
    visible = [sign for sign in signs if sign.name in LIMITS and sign.visibility == "VISIBLE"]
    return LIMITS[max(visible, key=lambda sign: sign.area).name] if visible else None


def _read_annotations(path: Path) -> Iterator[tuple[int, str, list[Sign]]]:
    """Give line number, image file and signs, MISC_SIGNS left out, of each line of an ``annotations.txt``."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; give the folder of Set1 and Set2") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text: {error}; download it again") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            file, signs = _read_line(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number}: {error}; download it again") from error
        first = seen.setdefault(file, number)
        if first == number:
            yield number, file, signs
        elif lines[first - 1].strip() != line.strip():
            raise DataError(f"{path}: line {number}: {file} was in line {first} already; download it again")


def _read_line(line: str) -> tuple[str, list[Sign]]:
    """Read ``file:VISIBILITY, xmax, ymax, xmin, ymin, TYPE, NAME;...``; ValueError says what is wrong."""
    file, colon, rest = line.strip().partition(":")
    if not colon:
        raise ValueError("no colon behind the image's name")
    if not file or Path(file).name != file:
        raise ValueError(f"{file!r} is no name of a file beside it")
    texts = [text.strip() for text in rest.split(";")]
    return file, [_read_sign(text) for text in texts if text and not text.startswith("MISC_SIGNS")]


def _read_sign(text: str) -> Sign:
    fields = [field.strip() for field in text.split(",")]
    if len(fields) == 1:  # a word, as MISC_SIGNS is, for a sign of which no more is known
        return Sign(text, (np.nan,) * 4, "")
    if len(fields) < 7:
        raise ValueError(f"{text!r} has {len(fields)} fields, not VISIBILITY, xmax, ymax, xmin, ymin, TYPE, NAME")
    numbers = [_NUMBER.match(field) for field in fields[1:5]]
    x_max, y_max, x_min, y_min = (float(number[0]) if number else np.nan for number in numbers)
    if fields[6] in LIMITS and not (x_max >= x_min and y_max >= y_min):
        raise ValueError(f"{text!r} has no box of xmax, ymax, xmin, ymin")
    return Sign(fields[0], (y_min, x_min, y_max - y_min, x_max - x_min), fields[6])
