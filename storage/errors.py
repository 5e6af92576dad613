"""The errors that leave this package, in one small tree.

Every message names the file, the cause and, where there is one, the fix. Mistakes of the calling code, such as a
negative level or a box of the wrong shape, raise ``ValueError`` instead.
"""

from __future__ import annotations


class StorageError(Exception):
    """The root of all errors that a user's files, disks or networks can cause in this package."""


class MissingImageError(StorageError):
    """The file, folder or URL does not exist."""


class UnsupportedImageError(StorageError):
    """The file is not a TIFF, or a TIFF of a kind that is refused (see ``storage.images.tiff_structure``)."""


class CorruptImageError(StorageError):
    """A TIFF or pyramid is damaged: a checksum, a length or a header is wrong."""


class NotAPyramidError(StorageError):
    """The folder or URL is not an OME-Zarr 0.5 pyramid of the layout that ``Slide`` reads."""


class ConversionError(StorageError):
    """The output cannot be written, because it is busy, forbidden, occupied or out of space."""


class TransferError(StorageError):
    """An object store or web server failed to answer a request, after its retries."""
