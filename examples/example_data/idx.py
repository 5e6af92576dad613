"""IDX, the file format of MNIST: big-endian dimensions, then the values; plain or gzip-compressed.

The header comes from a stranger, so it is checked before anything is allocated, and a compressed file is never
unpacked beyond the size that its header declares.
"""

from __future__ import annotations

import gzip
import math
import zlib
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

from pipeline.errors import DataError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

UINT8 = 0x08
MAX_BYTES = 2**31


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, such as MNIST's digits (N, 28, 28) or labels (N,).

    Raises
    ------
    UsageError
        The file cannot be opened.
    DataError
        It is not an IDX file of bytes, is truncated or damaged, or goes on after its last value.
    """
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            return _parse(path, cast("BinaryIO", gzip.GzipFile(fileobj=file)) if compressed else file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give the path of an IDX file") from error


def _parse(path: Path, file: BinaryIO) -> NDArray[np.uint8]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[3] == 0:
        raise DataError(f"{path}: not an IDX file; expected one such as t10k-images-idx3-ubyte.gz")
    if magic[2] != UINT8:
        raise DataError(f"{path}: IDX values of type 0x{magic[2]:02x}; only unsigned bytes (0x08) are read")
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError(f"{path}: truncated IDX header; fetch the file again")
    shape = tuple(np.frombuffer(header, ">u4").tolist())
    size = math.prod(shape)
    if size > MAX_BYTES:
        raise DataError(f"{path}: the header declares {size} bytes, more than the {MAX_BYTES} that are read")
    values = file.read(size)
    if len(values) < size or file.read(1):
        raise DataError(
            f"{path}: the header declares {size} values and the file holds another number; fetch it again"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)
