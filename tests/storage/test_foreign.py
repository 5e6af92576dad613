"""OME-Zarr of other writers: their pixels, geometry and units, requests counted, and clear refusals."""

import json
import math
import multiprocessing

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from storage import CorruptImageError, NotAPyramidError, Slide, TransferError
from storage.read.foreign import ForeignSource

MICRO = {"type": "space", "unit": "micrometer"}
SPACE = {"y": MICRO, "x": MICRO, "z": MICRO, "c": {"type": "channel"}, "t": {"type": "time"}}


def shrunk(pixels):
    """Every second pixel: what the coarser level holds does not matter here."""
    return pixels[:, ::2, ::2]


def on_axes(pixels, axes):
    """(C, H, W) as an array with ``axes``, those that it lacks of size 1."""
    have = [axis for axis in "cyx" if axis in axes]
    array = pixels if "c" in axes else pixels[0]
    array = array.transpose(["cyx".index(a) - (0 if "c" in axes else 1) for a in have])
    order = [a for a in axes if a in have]
    array = array.transpose([have.index(a) for a in order])
    for i, axis in enumerate(axes):
        if axis in "tz":
            array = np.expand_dims(array, i)
    return array


def write_foreign(
    path,
    pixels,
    *,
    axes="tczyx",
    version="0.5",
    scale=0.5,
    chunk=32,
    units=SPACE,
    group=None,
    attributes=None,
    **kwargs,
):
    """Write an image of two levels with zarr-python; ``kwargs`` go to ``create_array``."""
    root = zarr.open_group(path, mode="a", zarr_format=3 if version == "0.5" else 2)
    place = root.require_group(group) if group else root
    datasets = []
    for i, level in enumerate((pixels, shrunk(pixels))):
        array = on_axes(level, axes)
        chunks = tuple(1 if a in "tz" else min(chunk, n) for a, n in zip(axes, array.shape, strict=True))
        place.create_array(str(i), data=array, **({"chunks": chunks} | kwargs))
        steps = [scale * 2**i if a in "yx" else 1.0 for a in axes]
        datasets.append({"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": steps}]})
    multiscale = {"name": "other", "axes": [{"name": a} | units.get(a, {}) for a in axes], "datasets": datasets}
    if version == "0.5":
        place.attrs["ome"] = {"version": "0.5", "multiscales": [multiscale]} | (attributes or {})
    else:
        place.attrs.update({"multiscales": [multiscale | {"version": "0.4"}]} | (attributes or {}))
    return path


def texture(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, endpoint=True).astype(dtype)


@pytest.fixture
def pixels():
    return texture((3, 100, 70), "uint8")


CODECS = {
    "none": {"compressors": None},
    "zstd": {"compressors": [ZstdCodec(level=1)]},
    "gzip": {"compressors": [GzipCodec()]},
    "blosc": {"compressors": [BloscCodec(cname="zstd", shuffle="bitshuffle")]},
    "sharded": {"compressors": [ZstdCodec(checksum=True)], "sharded": True},
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    axes=st.sampled_from(["yx", "cyx", "zyx", "tcyx", "czyx", "tczyx", "xyc", "tyx"]),
    version=st.sampled_from(["0.4", "0.5"]),
    dtype=st.sampled_from(["uint8", "uint16", "int16", "float32", "float64", ">u2"]),
    codec=st.sampled_from(sorted(CODECS)),
    chunk_y=st.integers(5, 60),
    chunk_x=st.integers(5, 60),
    chunk_c=st.integers(1, 3),
    corners=st.lists(st.tuples(st.integers(-30, 60), st.integers(-30, 60)), min_size=1, max_size=5),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
def test_boxes_are_those_of_the_array(
    tmp_path_factory, axes, version, dtype, codec, chunk_y, chunk_x, chunk_c, corners, size
):
    image = texture((3 if "c" in axes else 1, 45, 52), dtype)
    path = tmp_path_factory.mktemp("foreign") / "f.zarr"
    sizes = {"y": chunk_y, "x": chunk_x, "c": min(chunk_c, image.shape[0])}
    storing = dict(CODECS[codec])
    chunks = tuple(sizes.get(a, 1) for a in axes)
    if version == "0.4":  # zarr v2 has other codec classes, and no shards
        storing = {}
    elif storing.pop("sharded", False):
        storing["shards"] = tuple(2 * sizes[a] if a in "yx" else sizes.get(a, 1) for a in axes)
    write_foreign(path, image, axes=axes, version=version, **storing, chunks=chunks)
    boxes = [(y, x, *size) for y, x in corners]
    for level, expected in enumerate((image, shrunk(image))):
        padded = np.pad(expected, ((0, 0), (100, 100), (100, 100)), constant_values=7)
        with Slide(path) as slide:
            for (y, x, h, w), actual in zip(boxes, slide.read_many(level, boxes, fill=7), strict=True):
                np.testing.assert_array_equal(actual, padded[:, y + 100 : y + 100 + h, x + 100 : x + 100 + w])
            assert slide.dtype == np.dtype(dtype).newbyteorder("=")


def test_levels_are_told_in_micrometres(tmp_path, pixels):
    path = write_foreign(tmp_path / "f.zarr", pixels, scale=500.0, units={a: {"unit": "nanometer"} for a in "yx"})
    with Slide(path) as slide:
        assert (slide.name, slide.mpp, slide.shape_yx, len(slide.channels)) == ("other", 0.5, (100, 70), 3)
        assert [level.downsample for level in slide.levels] == [1, 2]
        assert [level.mpp for level in slide.levels] == [0.5, 1]
        assert slide.levels[1].scale_yx == (1.0, 1.0)
        assert (slide.levels[0].chunk, slide.levels[0].shard) == (32, 32)


@pytest.mark.parametrize("unit", [{}, {"unit": "parsec"}])
def test_unknown_units_leave_the_pixel_size_unknown(tmp_path, pixels, unit):
    path = write_foreign(tmp_path / "f.zarr", pixels, scale=3.0, units=dict.fromkeys("yx", unit))
    with Slide(path) as slide:
        assert slide.mpp is None
        assert [level.scale_yx for level in slide.levels] == [(1, 1), (2, 2)]


def edit(path, change, name="zarr.json"):
    root = json.loads((path / name).read_text())
    change(root["attributes"]["ome"] if name == "zarr.json" else root)
    root.pop("consolidated_metadata", None)
    (path / name).write_text(json.dumps(root))


def test_transformations_of_levels_and_of_the_image_are_composed(tmp_path, pixels):
    path = write_foreign(tmp_path / "f.zarr", pixels, axes="cyx")

    def change(ome):
        multiscale = ome["multiscales"][0]
        multiscale["coordinateTransformations"] = [{"type": "scale", "scale": [1, 10, 10]}]
        multiscale["datasets"][1]["coordinateTransformations"].append(
            {"type": "translation", "translation": [0, 2, 3]}
        )

    edit(path, change)
    with Slide(path) as slide:
        assert slide.mpp == 5
        assert slide.levels[1].translation_yx == (20, 30)


def test_labels_of_channels_come_from_omero(tmp_path, pixels):
    omero = {"omero": {"channels": [{"label": name} for name in ("DAPI", "CD3", "CD8")]}}
    with Slide(write_foreign(tmp_path / "f.zarr", pixels, attributes=omero)) as slide:
        assert slide.channels == ("DAPI", "CD3", "CD8")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_the_first_image_of_a_bioformats2raw_folder_is_opened(tmp_path, pixels, version):
    path = write_foreign(tmp_path / "f.zarr", pixels, version=version, group="0")
    root = zarr.open_group(path, mode="r+")
    layout = {"bioformats2raw.layout": 3}
    root.attrs.update(layout if version == "0.4" else {"ome": layout | {"version": "0.5"}})
    with Slide(path) as slide:
        np.testing.assert_array_equal(slide.read(0, (0, 0, 100, 70)), pixels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ome: ome.update(plate={}), "a plate; open one of its images, as in .*/A/1/0"),
        (lambda ome: ome.update(well={}), "a well of a plate"),
        (lambda ome: ome.update({"image-label": {}}), "a label image"),
        (lambda ome: (ome.pop("multiscales"), ome.update(labels=["a"])), "a group of labels"),
        (lambda ome: ome.pop("multiscales"), "no multiscales"),
        (lambda ome: ome.update(version="0.3"), "OME-Zarr 0.3 in zarr v3"),
        (lambda ome: ome["multiscales"][0]["axes"][0].update(name="q"), "its axes are q, c, z, y, x"),
        (lambda ome: ome["multiscales"][0]["datasets"][0].update(path="../0"), "leaves the pyramid"),
        (lambda ome: ome["multiscales"][0]["datasets"][0].update(path="/0"), "leaves the pyramid"),
        (
            lambda ome: ome["multiscales"][0]["datasets"][1].update(
                coordinateTransformations=[{"type": "scale", "scale": [1, 1, 1, 0.5, 0.5]}]
            ),
            "correct the scales",
        ),
        (
            lambda ome: ome["multiscales"][0]["datasets"][1].update(
                coordinateTransformations=[{"type": "affine", "affine": []}]
            ),
            "a transformation that is not read",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, pixels, change, words):
    path = write_foreign(tmp_path / "f.zarr", pixels)
    edit(path, change)
    with pytest.raises(NotAPyramidError, match=rf"f\.zarr.*{words}"):
        Slide(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda ome: ome["multiscales"][0]["datasets"][1].pop("coordinateTransformations"),
        lambda ome: ome["multiscales"][0]["datasets"][1].update(path="7"),
        lambda ome: ome.update(multiscales="big"),
        lambda ome: ome["multiscales"][0]["datasets"][0].update(
            coordinateTransformations=[{"type": "scale", "scale": [1, 1, 1, math.nan, 1]}]
        ),
    ],
)
def test_damaged_metadata_is_an_error_of_ours(tmp_path, pixels, change):
    path = write_foreign(tmp_path / "f.zarr", pixels)
    edit(path, change)
    with pytest.raises(CorruptImageError, match=r"f\.zarr"):
        Slide(path)


@pytest.mark.parametrize("axis", ["t", "z"])
def test_stacks_are_refused(tmp_path, axis):
    path = tmp_path / "f.zarr"
    write_foreign(path, texture((1, 40, 40), "uint8"), axes=f"{axis}yx")
    for level in "01":
        zarr.create_array(path / level, data=np.ones((4, 40, 40), "uint8"), overwrite=True)
    with pytest.raises(NotAPyramidError, match=f"has 4 planes along {axis}; store one"):
        Slide(path)


def test_other_types_and_single_arrays_are_refused(tmp_path):
    path = write_foreign(tmp_path / "f.zarr", texture((1, 40, 40), "int64"))
    with pytest.raises(NotAPyramidError, match="holds .int64.; only uint8, int8, uint16, int16, uint32"):
        Slide(path)
    with pytest.raises(NotAPyramidError, match="a single array; open the image it belongs to"):
        Slide(path / "0")


def test_an_absent_chunk_holds_the_fill_value(tmp_path, pixels):
    """Zarr specifies it so; our own pyramids list what must be there instead."""
    path = write_foreign(tmp_path / "f.zarr", pixels, axes="cyx", fill_value=9)
    (path / "0/c/0/0/0").unlink()
    with Slide(path) as slide:
        assert (slide.read(0, (0, 0, 32, 32)) == 9).all()


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_damaged_chunk_is_named(tmp_path, pixels, version):
    path = write_foreign(tmp_path / "f.zarr", pixels, axes="cyx", version=version)
    chunk = path / ("0/c/0/1/2" if version == "0.5" else "0/0.1.2")
    chunk.write_bytes(chunk.read_bytes()[:9])
    with Slide(path) as slide:
        slide.read(0, (0, 0, 32, 64))
        with pytest.raises(CorruptImageError, match=r"f\.zarr: level 0, chunk \(1, 2\) is damaged"):
            slide.read(0, (0, 0, 100, 70))


def test_a_chunk_with_a_checksum_never_decodes_wrong(tmp_path, pixels):
    path = write_foreign(tmp_path / "f.zarr", pixels, axes="cyx", compressors=[ZstdCodec(), Crc32cCodec()])
    chunk = path / "0/c/0/0/0"
    sound = chunk.read_bytes()
    for position in range(0, len(sound), 97):
        damaged = bytearray(sound)
        damaged[position] ^= 4
        chunk.write_bytes(damaged)
        with Slide(path) as slide, pytest.raises(CorruptImageError, match="damaged"):
            slide.read(0, (0, 0, 8, 8))


def test_over_http_requests_and_bytes_are_those_that_the_server_saw(web, tmp_path, pixels):
    sharded = {"shards": (3, 64, 64), "chunks": (3, 32, 32)}
    write_foreign(tmp_path / "f.zarr", pixels, axes="cyx", **sharded)
    boxes = [(y, x, 30, 30) for y in (0, 20, 60) for x in (0, 3, 35)]
    with Slide(f"{web.url}/f.zarr") as remote, Slide(tmp_path / "f.zarr") as local:
        np.testing.assert_array_equal(remote.read_many(0, boxes), local.read_many(0, boxes))
        assert remote.statistics.requests == len(web.log) == local.statistics.requests
        assert remote.statistics.bytes_read == local.statistics.bytes_read > 0
        # Every chunk once, whichever boxes share it: 3 x 3, and the indexes of 2 x 2 shards.
        fetched = [(path, wanted) for path, wanted in web.log if "/c/" in path]
        assert len(set(fetched)) == len(fetched) == 9 + 4
        assert remote.statistics.chunks_decoded == 9
        before = len(web.log)
        remote.read(0, (0, 0, 5, 5))
        assert len(web.log) == before + 1  # the shard's index was kept


def test_zarr_v2_over_http(web, tmp_path, pixels):
    write_foreign(tmp_path / "f.zarr", pixels, version="0.4")
    with Slide(f"{web.url}/f.zarr") as slide:
        np.testing.assert_array_equal(slide.read(0, (0, 0, 100, 70)), pixels)
        assert slide.statistics.requests == len(web.log)


def test_a_server_that_refuses_is_an_error_of_ours(web, tmp_path, pixels):
    write_foreign(tmp_path / "f.zarr", pixels)
    with Slide(f"{web.url}/f.zarr") as slide:
        web.failures[:] = [403] * 50
        with pytest.raises(TransferError, match=r"f\.zarr/0/c/.*: the request failed"):
            slide.read(0, (0, 0, 9, 9))
        web.failures.clear()
        np.testing.assert_array_equal(slide.read(0, (0, 0, 9, 9)), pixels[:, :9, :9])


def test_spawned_workers_read_it(tmp_path, pixels):
    with Slide(write_foreign(tmp_path / "f.zarr", pixels)) as slide:
        assert isinstance(slide._source, ForeignSource)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            np.testing.assert_array_equal(pool.apply(Slide.read, (slide, 0, (0, 0, 100, 70))), pixels)


def test_huge_chunks_are_refused_before_they_are_decoded(tmp_path):
    path = write_foreign(tmp_path / "f.zarr", texture((1, 40, 40), "uint8"), axes="yx")
    zarr.create_array(path / "0", shape=(2**20, 2**20), chunks=(2**20, 2**20), dtype="uint8", overwrite=True)
    with pytest.raises(NotAPyramidError, match="store it in smaller chunks"):
        Slide(path)
