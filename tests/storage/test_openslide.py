"""Slides that OpenSlide reads: its own pixels, at its levels and those between, and what is said without it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid
from wsidicom import WsiDicom

from storage import (
    CorruptImageError,
    MissingImageError,
    NotAPyramidError,
    Slide,
    UnsupportedImageError,
    convert,
    open_image,
)
from storage.images.halving import downsample
from storage.read.slide import dicom_file

openslide = pytest.importorskip("openslide")
pytestmark = pytest.mark.data

NDPI = "wsi-flavours/hamamatsu-test3-dapi.ndpi"
DICOM = "wsi-flavours/dicom-cmu-1-small-region"
TILE = 256


@pytest.fixture
def no_tiff(monkeypatch):
    """Refuse every TIFF, as those are whose kind only OpenSlide knows."""

    def refuse(_, path, **options):
        raise UnsupportedImageError(f"{getattr(path, 'location', path)}: of a kind that is not read")

    monkeypatch.setattr("storage.images.tiff_structure.TiffStructure.__init__", refuse)


def region(path, level, y, x, size):
    """(3, size, size) as OpenSlide reads it, at a corner in pixels of the level."""
    with openslide.OpenSlide(path) as slide:
        scale = slide.level_downsamples[level]
        pixels = slide.read_region((round(x * scale), round(y * scale)), level, (size, size))
    return np.asarray(pixels.convert("RGB")).transpose(2, 0, 1)


def test_an_ndpi_at_each_of_its_levels(data, no_tiff):
    path = data / NDPI
    with Slide(path) as slide:
        assert (slide.name, slide.channels, str(slide.dtype)) == ("hamamatsu-test3-dapi", ("R", "G", "B"), "uint8")
        assert slide.mpp == pytest.approx(0.22818, abs=1e-5)
        assert [level.downsample for level in slide.levels] == [1, 2, 4, 8, 16, 32, 64, 128]
        assert [level.made_of for level in slide.levels] == [None] * 7 + [64]
        for number in (0, 2, 4):
            height, width = slide.levels[number].shape_yx
            boxes = [(7, 9, 60, 60), (height - 60, width - 60, 60, 60)]
            for (y, x, *_), found in zip(boxes, slide.read_many(number, boxes), strict=True):
                np.testing.assert_array_equal(found, region(path, number, y, x, 60))
        outside = slide.read(0, (-30, -30, 60, 60), fill=9)
        assert (outside[:, :30] == 9).all()
        np.testing.assert_array_equal(outside[:, 30:, 30:], region(path, 0, 0, 0, 30))
        assert slide.statistics.chunks_decoded == 7


def test_a_dicom_series_by_its_folder_or_one_of_its_files(data):
    folder = data / DICOM
    with Slide(folder) as slide, Slide(folder / "level-0-frames-0-30.dcm") as other:
        assert slide.identity == other.identity
        assert slide.mpp == 0.499
        assert [level.downsample for level in slide.levels][:8] == [1, 2, 4, 8, 16, 32, 64, 128]
        found = slide.read(1, (700, 500, 90, 90))
        np.testing.assert_array_equal(found, other.read(1, (700, 500, 90, 90)))
        np.testing.assert_array_equal(found, region(folder / "level-0-frames-0-30.dcm", 1, 700, 500, 90))
    with Slide(data / "CMU-1-Small-Region.svs") as aperio, Slide(folder) as slide:
        assert aperio.shape_yx == slide.shape_yx


def test_wsidicom_sees_the_same_pixels(data):
    """At coarser levels OpenSlide takes a corner in pixels of the finest, and others than the first lie beside it."""
    folder = data / DICOM
    with Slide(folder) as slide, WsiDicom.open(folder) as theirs:
        sizes = [(level.size.height, level.size.width) for level in theirs.levels]
        assert sizes == [level.shape_yx for level in slide.levels if level.made_of is None][: len(sizes)]
        for level, (y, x) in ((0, (989, 740)), (1, (0, 0)), (2, (0, 0))):
            wanted = np.asarray(theirs.read_region((x, y), level, (200, 200)).convert("RGB")).transpose(2, 0, 1)
            np.testing.assert_array_equal(slide.read(level, (y, x, 200, 200)), wanted)


def write_dicom(folder, pixels, mpp):
    """A DICOM series of one level, as the standard has it: tiles of YCbCr JPEG that say so, the last ones padded."""
    folder.mkdir()
    height, width = pixels.shape[:2]
    rows, columns = -(-height // TILE), -(-width // TILE)
    padded = np.pad(pixels, ((0, rows * TILE - height), (0, columns * TILE - width), (0, 0)), "edge")
    tiles = padded.reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, TILE, TILE, 3)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = (generate_uid() for _ in range(3))
    data.Modality, data.ImageType = "SM", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.DimensionOrganizationType, data.NumberOfFrames = "TILED_FULL", rows * columns
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = height, width
    data.TotalPixelMatrixFocalPlanes = data.NumberOfOpticalPaths = 1
    data.Rows = data.Columns = TILE
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "YBR_FULL_422", 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.ImagedVolumeHeight, data.ImagedVolumeWidth = height * mpp / 1000, width * mpp / 1000
    measures, shared, path = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1000, mpp / 1000], 0.001
    shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    path.OpticalPathIdentifier = "0"
    data.OpticalPathSequence = [path]
    frames = [imagecodecs.jpeg8_encode(tile, level=95, subsampling="422") for tile in tiles]
    data.PixelData = encapsulate(frames)
    data["PixelData"].is_undefined_length = True
    data.save_as(folder / "level-0.dcm", enforce_file_format=True)


def test_a_dicom_series_whose_colours_are_right(data, tmp_path):
    """Made of an Aperio file, it has the same pixels, but for one more loss by JPEG, and the same size and scale."""
    with Slide(data / "CMU-1-Small-Region.svs") as aperio:
        pixels = aperio.read(0, (600, 500, 700, 650))
    write_dicom(tmp_path / "series", pixels.transpose(1, 2, 0), 0.499)
    with Slide(tmp_path / "series") as slide, WsiDicom.open(tmp_path / "series") as theirs:
        assert slide.shape_yx == (700, 650)
        assert slide.mpp == pytest.approx(0.499)
        found = slide.read(0, (0, 0, 700, 650))
        wanted = np.asarray(theirs.read_region((0, 0), 0, (650, 700)).convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(found, wanted)
    assert np.abs(found.astype(int) - pixels).mean() < 3
    assert np.abs(found.mean((1, 2)) - pixels.mean((1, 2))).max() < 1


@pytest.mark.parametrize("level", [0, 3])
def test_an_instance_that_is_no_dicom_is_named(data, tmp_path, level):
    """OpenSlide would pass over it, and the slide would lack a level, maybe its finest, without a word."""
    shutil.copytree(data / DICOM, tmp_path / "series", copy_function=shutil.copyfile)
    [instance] = (tmp_path / "series").glob(f"level-{level}-*.dcm")
    instance.write_bytes(b"a page that says: not found")
    for open_ in (Slide, lambda folder: open_image(dicom_file(folder))):
        with pytest.raises(
            CorruptImageError, match=rf"level-{level}-.*\.dcm: is no DICOM file, .* out of the folder"
        ):
            open_(str(tmp_path / "series"))
    instance.rename(instance.with_name(f"._{instance.name}"))  # as macOS leaves them beside files
    with Slide(tmp_path / "series") as slide:
        assert slide.levels


def test_an_instance_that_is_cut_short_is_named_by_its_level(data, tmp_path):
    shutil.copytree(data / DICOM, tmp_path / "series", copy_function=shutil.copyfile)
    [instance] = (tmp_path / "series").glob("level-1-*.dcm")
    instance.write_bytes(instance.read_bytes()[:200_000])
    with Slide(tmp_path / "series") as slide:
        slide.read(0, (0, 0, 99, 99))
        with pytest.raises(CorruptImageError, match="series.*: OpenSlide cannot read it at level 1 "):
            slide.read(1, (0, 0, *slide.levels[1].shape_yx))


def test_a_level_that_it_lacks_is_made(data, request):
    """OpenSlide reads an SVS, as if nothing else could; its levels are the same as by tifffile."""
    path = data / "wsi-flavours" / "CMU-1-JP2K-Region.svs"
    with Slide(path) as tiff:
        levels = [level.shape_yx for level in tiff.levels]
    request.getfixturevalue("no_tiff")
    with Slide(path) as slide:
        assert [level.shape_yx for level in slide.levels] == levels
        assert [level.made_of for level in slide.levels] == [None, *[1.0] * (len(levels) - 1)]
        np.testing.assert_array_equal(
            slide.read(1, (100, 60, 50, 50)), downsample(slide.read(0, (200, 120, 100, 100)))
        )


def test_it_is_converted_like_any_image(data, tmp_path, no_tiff):
    convert(data / NDPI, tmp_path / "a.ome.zarr")
    with Slide(tmp_path / "a.ome.zarr") as pyramid, Slide(data / NDPI) as slide:
        assert pyramid.shape_yx == slide.shape_yx
        assert pyramid.mpp == slide.mpp
        box = (1000, 1200, 300, 300)
        np.testing.assert_array_equal(pyramid.read(0, box), slide.read(0, box))


def test_what_a_scanner_left_out_is_background(data, monkeypatch, no_tiff):
    with open_image(data / NDPI) as image:
        image._background = (250, 240, 230)
        pixels = np.zeros((4, 4, 4), np.uint8)
        pixels[0] = 255  # opaque white
        monkeypatch.setattr(image, "_ask", lambda *_: pixels)
        found = image.read(0, 0, 4, 4)
    assert (found[:, 0] == 255).all()
    assert found[:, 1:].reshape(3, -1).T.tolist() == [[250, 240, 230]] * 12


def read_all(path):
    with Slide(path) as slide:
        for number, level in enumerate(slide.levels):
            slide.read(number, (0, 0, *level.shape_yx))


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_one_that_is_cut_short(data, tmp_path, kept, no_tiff):
    whole = (data / NDPI).read_bytes()
    (tmp_path / "cut.ndpi").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises((CorruptImageError, UnsupportedImageError), match=r"cut\.ndpi"):
        read_all(tmp_path / "cut.ndpi")


def test_after_an_error_it_is_opened_anew(data, no_tiff):
    with open_image(data / NDPI) as image:
        first = image.read(0, 0, 9, 9)

        def fail(slide):
            raise openslide.OpenSlideError("cannot decode")

        with pytest.raises(CorruptImageError, match=r"\.ndpi: OpenSlide cannot read it \(cannot decode\)"):
            image._ask(fail)
        np.testing.assert_array_equal(image.read(0, 0, 9, 9), first)


def test_without_the_extra_its_name_is_given(data, tmp_path, monkeypatch, no_tiff):
    monkeypatch.setitem(sys.modules, "openslide", None)
    for open_ in (Slide, open_image):
        with pytest.raises(UnsupportedImageError, match=r'not read.*pip install "nested-ats\[slides\]"'):
            open_(data / NDPI)
    with pytest.raises(NotAPyramidError, match=r'pip install "nested-ats\[slides\]"'):
        Slide(data / DICOM)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(NotAPyramidError) as error:
        Slide(tmp_path / "a.txt")
    assert "pip" not in str(error.value)


def test_a_tiff_that_we_refuse_is_not_read_by_its_first_page(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 64, 64), np.uint8), tile=(16, 16), photometric="minisblack")
    assert openslide.OpenSlide.detect_format(tmp_path / "a.tif") == "generic-tiff"
    with pytest.raises(UnsupportedImageError, match="a stack of 5 pages"):
        Slide(tmp_path / "a.tif")


def test_one_that_is_not_there(tmp_path):
    with pytest.raises(MissingImageError, match=r"gone\.mrxs: does not exist"):
        Slide(Path(tmp_path, "gone.mrxs"))
