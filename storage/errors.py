"""The errors that leave this package, one small tree.

Every message names the file, the cause and, where there is one, the fix. Mistakes of the calling code (a
negative level, a box of the wrong shape) are ``ValueError`` instead.
"""

from __future__ import annotations


class StorageError(Exception):
    """Root of all errors that a user's files, disks or networks can cause in this package."""


class MissingImageError(StorageError):
    """The file, folder or URL does not exist."""


class UnsupportedImageError(StorageError):
    """The file is not a TIFF, or a TIFF of a kind that is refused (see ``storage.images.tiff_structure``)."""


class CorruptImageError(StorageError):
    """A TIFF or pyramid is damaged: a checksum, a length or a header does not hold."""


class NotAPyramidError(StorageError):
    """The folder or URL is not an OME-Zarr 0.5 pyramid of the layout that ``Slide`` reads."""


class ConversionError(StorageError):
    """The output cannot be written: busy, forbidden, occupied or out of space."""


class TransferError(StorageError):
    """An object store or web server failed to answer a request, after its retries."""
