"""TIFF slides read where they lie: the pixels of tifffile and of our own pyramids, and no more than is asked for."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from storage import ConvertOptions, CorruptImageError, MissingImageError, Slide, UnsupportedImageError, convert
from storage.images.tiff import TiffImage
from storage.images.tiff_header import SHOWN
from storage.place import local_store
from storage.read.cache import ChunkCache


def pixels_of(path, level=0):
    """(C, H, W) as tifffile reads a level."""
    with tifffile.TiffFile(path) as tif:
        series = tif.series[0]
        pixels = series.levels[level].asarray()
        axes = series.levels[level].axes
    if axes == "YX":
        return pixels[None]
    return pixels.transpose(2, 0, 1) if axes.endswith("S") else pixels


def write_pyramid(path, pixels, scales, **settings):
    """A TIFF whose coarser levels are SubIFDs, each with other pixels than a mean would give."""
    options = {"tile": (64, 64), "photometric": "rgb", "compression": "deflate"} | settings
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as tif:
        image = pixels.transpose(1, 2, 0)
        tif.write(image, subifds=len(scales), **options)
        for scale in scales:
            tif.write(np.ascontiguousarray(image[::scale, ::scale]), subfiletype=1, **options)
    return path


def boxes_of(shape_yx, size, count=12, seed=0):
    """Boxes of one size, some of which leave the image."""
    rng = np.random.default_rng(seed)
    starts = rng.integers((-size // 2, -size // 2), (shape_yx[0], shape_yx[1]), (count, 2))
    return np.concatenate([starts, np.full((count, 2), size)], 1)


def cut_out(pixels, box, fill):
    y, x, h, w = (int(each) for each in box)
    out = np.full((pixels.shape[0], h, w), fill, pixels.dtype)
    y0, x0, y1, x1 = max(y, 0), max(x, 0), min(y + h, pixels.shape[1]), min(x + w, pixels.shape[2])
    if y0 < y1 and x0 < x1:
        out[:, y0 - y : y1 - y, x0 - x : x1 - x] = pixels[:, y0:y1, x0:x1]
    return out


def check(slide, level, pixels, size=50, fill=3):
    boxes = boxes_of(slide.levels[level].shape_yx, size)
    for box, found in zip(boxes, slide.read_many(level, boxes, fill=fill), strict=True):
        np.testing.assert_array_equal(found, cut_out(pixels, box, fill))


LAYOUTS = {
    "tiles": {"tile": (64, 64), "compression": "deflate"},
    "jpeg": {"tile": (64, 64), "compression": "jpeg", "subsampling": (2, 2)},
    "plain tiles": {"tile": (64, 48)},
    "strips": {"tile": None, "rowsperstrip": 7, "compression": "lzw"},
    "plain strips": {"tile": None, "rowsperstrip": 11},
    "predictor": {"tile": (32, 32), "compression": "deflate", "predictor": True},
    "big": {"tile": (64, 64), "compression": "zstd", "bigtiff": True},
    "big-endian": {"tile": (64, 64), "compression": "deflate", "byteorder": ">"},
    "jpeg 2000": {"tile": (64, 64), "compression": "jpeg2000"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_as_tifffile_reads_it(tiff, layout):
    path, _ = tiff(300, 217, **LAYOUTS[layout])
    with Slide(path) as slide:
        assert (slide.name, slide.channels, str(slide.dtype)) == ("image", ("R", "G", "B"), "uint8")
        assert slide.levels[0].made_of is None
        check(slide, 0, pixels_of(path))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
def test_types_and_planes(tmp_path, textured, dtype, planarconfig):
    pixels = textured((4, 130, 150), dtype)
    stored = pixels if planarconfig == "separate" else pixels.transpose(1, 2, 0)
    options = {"photometric": "minisblack", "planarconfig": planarconfig, "tile": (32, 32), "compression": "deflate"}
    tifffile.imwrite(tmp_path / "a.tif", stored, **options)
    with Slide(tmp_path / "a.tif") as slide:
        check(slide, 0, pixels)


@pytest.mark.parametrize("size", [(300, 217), (128, 64), (129, 65), (40, 30)])
def test_levels_that_it_lacks_are_those_of_a_conversion(tiff, tmp_path, size):
    path, _ = tiff(*size)
    convert(path, tmp_path / "a.ome.zarr")
    with Slide(path) as slide, Slide(tmp_path / "a.ome.zarr") as pyramid:
        assert [level.shape_yx for level in slide.levels] == [level.shape_yx for level in pyramid.levels]
        assert [level.downsample for level in slide.levels] == [level.downsample for level in pyramid.levels]
        for mine, theirs in zip(slide.levels, pyramid.levels, strict=True):
            assert (mine.scale_yx, mine.translation_yx, mine.mpp) == (
                theirs.scale_yx,
                theirs.translation_yx,
                theirs.mpp,
            )
        for number, level in enumerate(pyramid.levels):
            whole = pyramid.read(number, (0, 0, *level.shape_yx))
            np.testing.assert_array_equal(slide.read(number, (0, 0, *level.shape_yx)), whole)
            check(slide, number, whole, size=30)
    assert [level.made_of for level in slide.levels] == [None, *[1.0] * (len(slide.levels) - 1)]


def test_blocks_of_a_level_that_is_made_join(tiff, tmp_path, monkeypatch):
    monkeypatch.setattr("storage.read.halved.BLOCK", 16)
    path, _ = tiff(301, 217)
    convert(path, tmp_path / "a.ome.zarr")
    with Slide(path) as slide, Slide(tmp_path / "a.ome.zarr") as pyramid:
        for number in (1, 2):
            check(slide, number, pyramid.read(number, (0, 0, *pyramid.levels[number].shape_yx)), size=41)


def test_levels_that_it_has_are_read_and_gaps_between_them_made(tmp_path, textured):
    pixels = textured((3, 700, 530))
    path = write_pyramid(tmp_path / "a.tif", pixels, (4, 8))
    with Slide(path) as slide:
        assert [(level.downsample, level.made_of) for level in slide.levels] == [
            (1.0, None),
            (2.0, 1.0),
            (4.0, None),
            (8.0, None),
            (16.0, 8.0),
        ]
        for number, scale in ((0, 1), (2, 4), (3, 8)):
            check(slide, number, pixels[:, ::scale, ::scale])
        read = slide.statistics
        slide.read(4, (0, 0, 10, 10))
        assert (slide.statistics - read).chunks_decoded == 1  # of the level at 8


def test_sizes_that_writers_round_are_whole_downsamples(tmp_path, textured):
    """Some round down, some up, and a level's sides each in their way."""
    pixels = textured((3, 1003, 1010))
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": "deflate"}
        image = pixels.transpose(1, 2, 0)
        tif.write(image, subifds=2, **options)
        tif.write(np.ascontiguousarray(image[: 1003 // 4 * 4 : 4, : 1010 // 4 * 4 : 4]), subfiletype=1, **options)
        tif.write(np.ascontiguousarray(image[::16, : 1010 // 16 * 16 : 16]), subfiletype=1, **options)
    with Slide(tmp_path / "a.tif") as slide:
        stored = [(level.downsample, level.shape_yx) for level in slide.levels if level.made_of is None]
    assert stored == [(1.0, (1003, 1010)), (4.0, (250, 252)), (16.0, (63, 63))]


def test_a_level_of_other_pixels_is_left_out(tmp_path, textured):
    pixels = textured((3, 256, 256)).transpose(1, 2, 0)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(pixels, subifds=1, tile=(64, 64), photometric="rgb")
        tif.write(pixels[::2, ::2].astype(np.uint16), subfiletype=1, tile=(64, 64), photometric="rgb")
    with Slide(tmp_path / "a.tif") as slide:
        assert slide.levels[1].made_of == 1.0


def test_each_tile_is_decoded_once_and_no_other(tiff):
    path, _ = tiff(640, 640)
    with Slide(path) as slide:
        before = slide.statistics
        slide.read_many(0, [(70, 70, 50, 50), (66, 66, 50, 50), (70, 330, 50, 50), (60, 60, 50, 50)])
        read = slide.statistics - before
    assert read.chunks_decoded == 5  # (0, 0), (0, 1), (1, 0), (1, 1) and (1, 5)
    assert read.bytes_read < path.stat().st_size / 10


def test_more_tiles_than_tifffile_is_shown(tmp_path, textured):
    pixels = textured((1, 16 * 70, 16 * 70))
    assert SHOWN < 70 * 70
    for name, options in {"tiles": {"tile": (16, 16)}, "big": {"tile": (16, 16), "bigtiff": True}}.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels[0], compression="deflate", **options)
        with Slide(tmp_path / f"{name}.tif") as slide:
            np.testing.assert_array_equal(slide.read(0, (0, 0, 1120, 1120)), pixels)
        with TiffImage(tmp_path / f"{name}.tif") as image:
            assert len(image._key.dataoffsets) == SHOWN
            np.testing.assert_array_equal(image.read(0, 0, 1120, 1120), pixels)
    tifffile.imwrite(tmp_path / "strips.tif", pixels[0].reshape(-1, 140), rowsperstrip=1)
    with Slide(tmp_path / "strips.tif") as slide:
        np.testing.assert_array_equal(slide.read(0, (8000, 0, 900, 140))[0], pixels.reshape(-1, 140)[8000:8900])


def test_its_identity_is_that_of_its_pixels(tiff, tmp_path):
    path, pixels = tiff(640, 640)
    copy = tmp_path / "elsewhere" / "other.tif"
    copy.parent.mkdir()
    shutil.copy(path, copy)
    os.utime(copy, (1, 1))
    with Slide(path) as one, Slide(copy) as other:
        assert one.identity == other.identity
    changed = pixels.copy()
    changed[:, :10, :10] += 1
    tifffile.imwrite(copy, changed.transpose(1, 2, 0), photometric="rgb", tile=(64, 64), compression="deflate")
    with Slide(path) as one, Slide(copy) as other:
        assert one.identity != other.identity


class TestOverHttp:
    def test_only_what_is_touched_is_asked_for(self, web, tiff):
        path, pixels = tiff(1280, 1280)
        with Slide(f"{web.url}/image.tif") as slide:
            before, asked = slide.statistics, len(web.log)
            np.testing.assert_array_equal(slide.read(0, (700, 700, 100, 100)), pixels[:, 700:800, 700:800])
            read = slide.statistics - before
            assert read.requests == len(web.log) - asked
            assert read.bytes_read < path.stat().st_size / 5
            np.testing.assert_array_equal(pickle.loads(pickle.dumps(slide)).read(0, (0, 0, 9, 9)), pixels[:, :9, :9])

    def test_tiles_are_kept_and_not_served_of_another_file(self, web, tiff, tmp_path):
        _, pixels = tiff(640, 640)
        cache = ChunkCache(tmp_path / "cache", 10**8)
        box = (100, 200, 100, 100)
        url = f"{web.url}/image.tif"
        with Slide(url, cache=cache) as slide:
            first = slide.read(0, box)
        with Slide(url, cache=cache) as slide:
            np.testing.assert_array_equal(slide.read(0, box), first)
            assert slide.statistics.requests == 0
            assert slide.statistics.cached_chunks > 0
        changed = 255 - pixels
        tiff(640, 640)  # the fixture's pixels are the same; another file replaces it
        tifffile.imwrite(tmp_path / "image.tif", changed.transpose(1, 2, 0), photometric="rgb", tile=(64, 64))
        with Slide(url, cache=cache) as slide:
            np.testing.assert_array_equal(slide.read(0, box), changed[:, 100:200, 200:300])

    def test_a_server_that_fails_for_a_while(self, web, tiff):
        _, pixels = tiff(300, 300)
        with Slide(f"{web.url}/image.tif") as slide:
            web.failures += [503, "cut"]
            np.testing.assert_array_equal(slide.read(0, (0, 0, 300, 300)), pixels)

    def test_there_is_none(self, web):
        with pytest.raises(MissingImageError, match=r"none\.svs"):
            Slide(f"{web.url}/none.svs")


class TestDamage:
    def test_a_tile_that_does_not_decode_fails_alone(self, tiff):
        path, pixels = tiff(300, 300)
        with TiffImage(path) as image:
            offset, count = int(image.planes[0].offsets[7]), int(image.planes[0].counts[7])
        data = bytearray(path.read_bytes())
        data[offset : offset + count] = bytes(count)
        path.write_bytes(data)
        with Slide(path) as slide:
            with pytest.raises(CorruptImageError, match=r"image\.tif: tile \(1, 2\) does not decode"):
                slide.read(0, (70, 130, 10, 10))
            np.testing.assert_array_equal(slide.read(0, (70, 200, 10, 10)), pixels[:, 70:80, 200:210])

    @pytest.mark.parametrize("kept", [0.5, 0.9, 0.999])
    def test_a_file_that_is_cut_short(self, tiff, kept):
        path, _ = tiff(300, 300)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
        with pytest.raises(CorruptImageError, match=r"image\.tif: .*copy or download it again"):
            Slide(path)

    def test_a_coarser_level_whose_tiles_lie_beyond_the_end(self, tmp_path, textured):
        path = write_pyramid(tmp_path / "a.tif", textured((3, 256, 256)), (2,))
        with TiffImage(path, coarser=True) as image:
            [coarser] = image.coarser
            place = coarser._key.tags[324].valueoffset
        data = bytearray(path.read_bytes())
        data[place : place + 4] = (2**31).to_bytes(4, "little")
        path.write_bytes(data)
        with pytest.raises(CorruptImageError, match=r"a\.tif: truncated, tiles or strips lie past the end"):
            Slide(path)

    def test_a_kind_that_is_not_read(self, tmp_path):
        tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 64, 64), np.uint8), photometric="minisblack")
        with pytest.raises(UnsupportedImageError, match="a stack of 5 pages"):
            Slide(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("text", "mpp"),
    [("AppMag = 40|MPP = 0.2325", 0.2325), ("AppMag = 20", 0.5), ("AppMag = 0", None), ("Date = x", None)],
)
def test_pixels_of_an_aperio_slide_in_micrometres(tiff, text, mpp):
    path, _ = tiff(100, 100, description=f"Aperio Image Library v12|{text}", metadata=None)
    with Slide(path) as slide:
        assert slide.mpp == mpp


@pytest.mark.data
class TestRealSlides:
    @pytest.mark.parametrize(
        ("name", "downsamples"),
        [
            ("CMU-1-Small-Region.svs", [1]),
            ("wsi-flavours/CMU-1-JP2K-Region.svs", [1]),
            ("wsi-flavours/cog.tif", [1, 2, 4, 8, 16]),
            ("wsi-flavours/RGB.byte.tif", [1]),
            ("mosaics/ypm-iz-420983.tif", [1, 2, 4, 8, 16, 32, 64]),
        ],
    )
    def test_levels_of_the_file_are_read_as_they_are(self, data, name, downsamples):
        path = Path(data, name)
        with Slide(path) as slide:
            stored = [i for i, level in enumerate(slide.levels) if level.made_of is None]
            assert [slide.levels[i].downsample for i in stored] == downsamples
            for number, level in enumerate(stored[1:] or stored, start=len(stored) > 1):
                check(slide, level, pixels_of(path, number), size=70)

    def test_an_aperio_slide_as_openslide_reads_it(self, data):
        openslide = pytest.importorskip("openslide")
        path = Path(data, "CMU-1-Small-Region.svs")
        with Slide(path) as slide, openslide.OpenSlide(path) as other:
            assert slide.mpp == float(other.properties["openslide.mpp-x"])
            for y, x in ((0, 0), (1000, 777), (2700, 2000)):
                theirs = np.asarray(other.read_region((x, y), 0, (200, 200)).convert("RGB")).transpose(2, 0, 1)
                inside = (slice(None), slice(0, 2967 - y), slice(0, 2220 - x))
                mine = slide.read(0, (y, x, 200, 200))
                assert np.abs(mine[inside].astype(int) - theirs[inside]).max() <= 2  # two JPEG decoders


def test_options_of_a_conversion_do_not_matter(tiff, tmp_path):
    """A conversion with another smallest level has fewer levels; those that both have are the same pixels."""
    path, _ = tiff(400, 300)
    convert(path, tmp_path / "a.ome.zarr", options=ConvertOptions(min_level_size=200, chunk=32, shard=64))
    with Slide(path) as slide, Slide(tmp_path / "a.ome.zarr") as pyramid:
        assert len(pyramid.levels) < len(slide.levels)
        for number in range(len(pyramid.levels)):
            check(slide, number, pyramid.read(number, (0, 0, *pyramid.levels[number].shape_yx)))


def test_a_file_that_was_replaced_is_not_read_by_the_table_of_the_first_one(tmp_path, monkeypatch):
    """Its descriptor may be given back between two reads, where many slides are open."""
    place, pixels = tmp_path / "a.tif", np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    tifffile.imwrite(place, pixels, tile=(64, 64), photometric="rgb")
    monkeypatch.setattr(local_store._descriptors, "limit", 1)
    tifffile.imwrite(tmp_path / "b.tif", pixels, tile=(64, 64), photometric="rgb")
    with Slide(place) as slide, Slide(tmp_path / "b.tif") as other:
        first = slide.read(0, (0, 0, 300, 300))
        other.read(0, (0, 0, 300, 300))  # takes the place of the descriptor
        assert np.array_equal(slide.read(0, (0, 0, 300, 300)), first)
        other.read(0, (0, 0, 300, 300))
        place.unlink()
        tifffile.imwrite(place, 255 - pixels, tile=(32, 32), photometric="rgb", compression="deflate")
        with pytest.raises(CorruptImageError, match=r"a\.tif: was replaced while it was read; run again"):
            slide.read(0, (0, 0, 300, 300))
    with Slide(place) as slide:
        assert np.array_equal(slide.read(0, (0, 0, 300, 300)), 255 - first)


@pytest.mark.data
class TestNDPI:
    """Hamamatsu's slides: one JPEG a level, of which only the pieces between restart markers that a box touches."""

    NAME = "wsi-flavours/hamamatsu-test3-dapi.ndpi"

    def test_every_level_has_the_pixels_of_tifffile(self, data):
        with Slide(data / self.NAME) as slide, tifffile.TiffFile(data / self.NAME) as tif:
            assert slide.mpp == pytest.approx(0.22818, abs=1e-5)
            assert [level.made_of for level in slide.levels] == [None] * 4 + [8.0] * 4
            for number, level in enumerate(tif.series[0].levels):
                check(slide, number, level.asarray().transpose(2, 0, 1))

    def test_openslide_reads_the_same(self, data):
        openslide = pytest.importorskip("openslide")
        with Slide(data / self.NAME) as slide, openslide.OpenSlide(data / self.NAME) as other:
            wanted = np.asarray(other.read_region((700, 900), 0, (300, 200)))[..., :3].transpose(2, 0, 1)
            np.testing.assert_array_equal(slide.read(0, (900, 700, 200, 300)), wanted)

    def test_a_box_reads_the_pieces_it_touches(self, data, tmp_path, web):
        shutil.copy(data / self.NAME, tmp_path / "a.ndpi")
        with Slide(f"{web.url}/a.ndpi") as slide, Slide(data / self.NAME) as local:
            before = slide.statistics.bytes_read
            box = (2000, 100, 64, 64)
            np.testing.assert_array_equal(slide.read(0, box), local.read(0, box))
            read = slide.statistics.bytes_read - before
        assert read < (data / self.NAME).stat().st_size / 20

    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
    def test_one_that_is_cut_short_is_refused(self, data, tmp_path, kept):
        whole = (data / self.NAME).read_bytes()
        (tmp_path / "cut.ndpi").write_bytes(whole[: int(len(whole) * kept)])
        with pytest.raises(CorruptImageError, match=r"cut\.ndpi: truncated"), Slide(tmp_path / "cut.ndpi"):
            pass
