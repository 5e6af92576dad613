"""The errors that leave this package, in one small tree.

Every message names the file, the cause and, where there is one, the fix. Mistakes of the calling code, such as a
negative level or a box of the wrong shape, raise ``ValueError`` instead.
"""

from __future__ import annotations


class StorageError(Exception):
    """The root of all errors that a user's files, disks or networks can cause in this package."""


class MissingImageError(StorageError):
    """The file, folder or URL does not exist.

    Paths in a manifest are relative to the manifest; a path in a URL has capital and small letters.
    """


class UnsupportedImageError(StorageError):
    """The file is no image that is read, or a TIFF of a kind that is refused.

    Where a command can make one of it that is read, the message has this command. The extra ``slides`` brings
    OpenSlide, which reads further formats.
    """


class CorruptImageError(StorageError):
    """A TIFF or pyramid is damaged: a checksum, a length or a header is wrong.

    Most such files were cut short by a copy or a full disk. Copy the file again from where it came from, or convert
    the pyramid again; `nested-ats validate` says what else is damaged.
    """


class NotAPyramidError(StorageError):
    """The folder or URL is not an OME-Zarr image that ``Slide`` reads, versions 0.4 and 0.5.

    Name the image's own folder, which has ``zarr.json`` or ``.zattrs``; else make a pyramid of the image that it came
    from by `nested-ats convert`.
    """


class ConversionError(StorageError):
    """The output cannot be written, because it is busy, forbidden, occupied or out of space.

    What was there before is as it was. Make room or choose another output; the same command goes on from there.
    """


class TransferError(StorageError):
    """An object store or web server failed to answer a request, after its retries.

    Check the URL, the network, and the credentials and the endpoint in the environment, such as ``AWS_ACCESS_KEY_ID``
    and ``AWS_ENDPOINT_URL``; then run the same command again. `nested-ats doctor URL` tries one read.
    """
