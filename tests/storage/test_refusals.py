"""TIFFs that are damaged, lying or of kinds that are not read: refused, and never decoded to zeros."""

import struct

import numpy as np
import pytest
import tifffile

from storage import CorruptImageError, StorageError, TiffImage, UnsupportedImageError, convert
from storage.limits import Limits

TAG_OFFSETS, TAG_COUNTS = 324, 325


def patch_tag(path, code, edit):
    """Rewrite one tag's values in place; ``edit`` gets and returns a list."""
    with tifffile.TiffFile(path) as tif:
        tag = tif.pages[0].tags[code]
        values = list(tag.value) if isinstance(tag.value, tuple) else [tag.value]
        form = {3: "H", 4: "I", 16: "Q"}[tag.dtype]
        position, order = tag.valueoffset, tif.byteorder
    data = bytearray(path.read_bytes())
    struct.pack_into(f"{order}{len(values)}{form}", data, position, *edit(values))
    path.write_bytes(data)


@pytest.mark.parametrize("data", [b"", b"II", b"hello world, this is text", b"\x89PNG\r\n\x1a\n" + b"0" * 40])
def test_other_files(tmp_path, data):
    (tmp_path / "x.tif").write_bytes(data)
    with pytest.raises(UnsupportedImageError, match=r"not a TIFF|empty file"):
        TiffImage(tmp_path / "x.tif")


def test_folder(tmp_path):
    with pytest.raises(StorageError, match="folder"):
        TiffImage(tmp_path)


@pytest.mark.parametrize("bigtiff", [False, True])
def test_truncated_anywhere(tiff, tmp_path, bigtiff):
    path, _ = tiff(300, 200, bigtiff=bigtiff, compression=None)
    data = path.read_bytes()
    for keep in [4, 7, 8, 12, 15, 16, 40, 150, 400, 900, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:keep])
        with pytest.raises(StorageError, match=r"image\.tif: "):
            TiffImage(path)


@pytest.mark.parametrize(
    ("tag", "edit", "error"),
    [
        (TAG_OFFSETS, lambda v: [0, *v[1:]], CorruptImageError),
        (TAG_COUNTS, lambda v: [*v[:-1], 0], CorruptImageError),
        (TAG_OFFSETS, lambda v: [*v[:-1], 2**31], CorruptImageError),
        (TAG_COUNTS, lambda v: [*v[:-1], 65535], CorruptImageError),
        (TAG_OFFSETS, lambda v: [v[0], v[0] + 1, *v[2:]], CorruptImageError),
        (TAG_COUNTS, lambda v: [v[0] + 64, *v[1:]], CorruptImageError),
    ],
)
def test_lying_offsets_and_lengths(tiff, tag, edit, error):
    path, _ = tiff(300, 200, compression=None)
    patch_tag(path, tag, edit)
    with pytest.raises(error):
        TiffImage(path)


def test_short_plain_tiles(tiff):
    path, _ = tiff(100, 100, compression=None)
    patch_tag(path, TAG_COUNTS, lambda v: [v[0] - 1, *v[1:]])
    with pytest.raises(CorruptImageError, match="shorter than their pixels"):
        TiffImage(path)


@pytest.mark.parametrize("size", [60000, 65000])
def test_claim_of_a_huge_image_with_few_tiles(tiff, size):
    path, _ = tiff(200, 200)
    patch_tag(path, 256, lambda _: [size])
    patch_tag(path, 257, lambda _: [size])
    with pytest.raises(StorageError, match=r"image\.tif: "):
        TiffImage(path)


def test_one_huge_blank_strip(tiff, textured, tmp_path):
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((4000, 4000), np.uint8), rowsperstrip=4000, compression="deflate")
    with pytest.raises(UnsupportedImageError, match="rewrite it as a tiled TIFF"):
        TiffImage(tmp_path / "b.tif", limits=Limits(segment_bytes=2**20))
    with pytest.raises(UnsupportedImageError, match="claims"):
        TiffImage(tmp_path / "b.tif", limits=Limits(ratio=100, ratio_free_bytes=2**20))
    with TiffImage(tmp_path / "b.tif") as image:
        assert not image.read(0, 0, 10, 10).any()


def test_circular_directories(tiff):
    path, _ = tiff(40, 40)
    data = bytearray(path.read_bytes())
    first = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[first : first + 2])[0]
    struct.pack_into("<I", data, first + 2 + 12 * count, first)
    path.write_bytes(data)
    with pytest.raises(CorruptImageError, match="circle"):
        TiffImage(path)


def test_too_many_directories(tmp_path):
    data = bytearray(b"II*\0" + struct.pack("<I", 8))
    for i in range(5000):
        data += struct.pack("<HHHIII", 1, 256, 3, 1, 1, 8 + 18 * (i + 1))
    (tmp_path / "x.tif").write_bytes(data)
    with pytest.raises(UnsupportedImageError, match="more than 4096 images; keep one: vips copy"):
        TiffImage(tmp_path / "x.tif")


def test_jpeg_tile_that_claims_more_pixels(tiff):
    path, _ = tiff(64, 64, compression="jpeg")
    data = bytearray(path.read_bytes())
    frame = data.find(b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, 60000, 60000)
    path.write_bytes(data)
    with TiffImage(path) as image, pytest.raises(CorruptImageError, match=r"tile \(0, 0\) is damaged"):
        image.read(0, 0, 8, 8)


def test_undecodable_tile_stops_the_conversion(tiff, tmp_path):
    path, _ = tiff(200, 200)
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[0].dataoffsets[5]
    data = bytearray(path.read_bytes())
    data[offset : offset + 16] = b"\xff" * 16
    path.write_bytes(data)
    with pytest.raises(CorruptImageError, match=r"tile \(1, 1\) does not decode"):
        convert(path, tmp_path / "p.zarr")
    assert not (tmp_path / "p.zarr").exists()


def test_mutated_bytes_raise_only_errors_of_ours(tiff, rng, textured):
    """Headers with random bytes changed: opened and read, or refused, never anything else."""
    path, _ = tiff(150, 150, compression="lzw")
    sound = path.read_bytes()
    with tifffile.TiffFile(path) as tif:
        start, end = tif.pages[0].offset, min(tif.pages[0].dataoffsets)
    messages = []
    for _ in range(300):
        data = bytearray(sound)
        for position in rng.integers(start, end, 3):
            data[position] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            with TiffImage(path) as image:
                if image.nbytes < 2**24:
                    image.read(0, 0, image.shape[1], image.shape[2])
        except StorageError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all(message.startswith(str(path)) for message in messages)


def test_boxes_that_leave_the_image_are_programming_errors(tiff):
    path, pixels = tiff(100, 90)
    with TiffImage(path) as image:
        assert image.read(3, 4, 0, 5).shape == (3, 0, 5)
        np.testing.assert_array_equal(image.read(60, 60, 40, 30), pixels[:, 60:, 60:])
        for box in [(-1, 0, 5, 5), (0, 0, 101, 5), (0, 86, 5, 5)]:
            with pytest.raises(ValueError, match="leaves the image"):
                image.read(*box)
