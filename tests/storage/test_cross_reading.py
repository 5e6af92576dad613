"""Other people's readers and validators on our pyramids."""

import shutil
import warnings

import numpy as np
import pytest
import tensorstore
import zarr

from storage import ConvertOptions, convert, write_pyramid
from storage.format.shard import hilbert_order

CASES = [
    ((3, 150, 200), "uint8", "lz4"),
    ((3, 150, 200), "uint8", "zstd"),
    ((4, 90, 70), "uint16", "lz4"),
    ((1, 65, 33), "float32", "zstd"),
    ((2, 90, 70), "int16", "lz4"),
    ((1, 80, 70), "float64", "zstd"),
    ((1, 90, 70), "int8", "lz4"),
    ((1, 90, 70), "uint32", "lz4"),
    ((2, 90, 70), "int32", "zstd"),
    ((1, 1, 1), "uint8", "lz4"),
]


@pytest.fixture(params=CASES, ids=str)
def pyramid(request, tmp_path, textured):
    shape, dtype, codec = request.param
    pixels = textured(shape, dtype)
    options = ConvertOptions(codec=codec, chunk=16, shard=64)
    write_pyramid(tmp_path / "p.ome.zarr", pixels, options=options, mpp=0.25 if dtype == "uint8" else None)
    return tmp_path / "p.ome.zarr", pixels


def test_zarr_python(pyramid):
    path, pixels = pyramid
    group = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(group["0"][:], pixels)
    np.testing.assert_array_equal(zarr.open_array(path / "0", mode="r")[:], pixels)
    assert group["0"].metadata.dimension_names == ("c", "y", "x")


def test_tensorstore(pyramid):
    path, pixels = pyramid
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/0"}}
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), pixels)


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 5, 7, 8, 12, 16])
def test_chunks_lie_along_a_hilbert_curve(grid):
    order = np.array(hilbert_order(grid))
    assert len({*map(tuple, order.tolist())}) == len(order) == grid * grid
    assert order.min() == 0
    assert order.max() == grid - 1
    steps = np.abs(np.diff(order, axis=0)).sum(axis=1)
    if grid & (grid - 1) == 0:
        assert (steps == 1).all()  # from neighbour to neighbour
    else:
        assert (steps == 1).mean() > 0.7


def test_shards_of_any_order_are_read(tmp_path, textured):
    """Ours lie along a curve; another writer's may lie in any order, also in ours."""
    pixels = textured((3, 190, 150))
    write_pyramid(tmp_path / "p.zarr", pixels, options=ConvertOptions(chunk=16, shard=96))
    index = np.frombuffer((tmp_path / "p.zarr/0/c/0/1/0").read_bytes()[-36 * 16 - 4 : -4], "<u8").reshape(6, 6, 2)
    stored = [place for place in hilbert_order(6) if index[place][1] != 2**64 - 1]
    offsets = [int(index[place][0]) for place in stored]
    assert offsets == sorted(offsets)
    assert index[..., 0].ravel().tolist() != sorted(offsets)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "p.zarr/0", mode="r")[:], pixels)


def test_ome_zarr_models(pyramid):
    from ome_zarr_models.v05 import Image

    path, _ = pyramid
    image = Image.from_zarr(zarr.open_group(path, mode="r"))
    multiscale = image.attributes.ome.multiscales[0]
    assert [axis.name for axis in multiscale.axes] == ["c", "y", "x"]
    assert len(multiscale.datasets) >= 2


def test_ngff_zarr_validator(pyramid):
    import ngff_zarr

    path, pixels = pyramid
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        multiscales = ngff_zarr.from_ngff_zarr(str(path), validate=True, version="0.5")
    np.testing.assert_array_equal(np.asarray(multiscales.images[0].data), pixels)


def test_ome_zarr_py(pyramid):
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    path, pixels = pyramid
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nodes = list(Reader(parse_url(str(path), mode="r"))())
    assert len(nodes) == 1
    np.testing.assert_array_equal(np.asarray(nodes[0].data[0]), pixels)


def test_peers_find_a_flipped_bit_too(pyramid):
    path, _ = pyramid
    shard = next(p for p in sorted((path / "0").rglob("*")) if p.is_file() and p.name != "zarr.json")
    data = bytearray(shard.read_bytes())
    data[30] ^= 4
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"(?i)checksum"):
        zarr.open_array(path / "0", mode="r")[:]


def test_svs_in_default_layout(svs, tmp_path):
    convert(svs, tmp_path / "p.ome.zarr")
    ours = zarr.open_array(tmp_path / "p.ome.zarr/1", mode="r")[:]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/p.ome.zarr/1"}}
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), ours)
    shutil.rmtree(tmp_path / "p.ome.zarr")
