"""``validate`` finds every kind of damage and names it at the right place; a sound pyramid has no problems."""

import errno
import json
import os
import shutil
import zlib

import numpy as np
import pytest
import tifffile
import zarr

from storage import (
    ConvertOptions,
    CorruptImageError,
    MissingImageError,
    NotAPyramidError,
    TransferError,
    convert,
    validate,
    write_pyramid,
)
from storage.format.ome_zarr import seal

HEIGHT, WIDTH = 150, 200  # level 0: 3 x 4 shards of 64, chunks of 16


@pytest.fixture
def pyramid(tmp_path, textured, small):
    """A pyramid whose first shard of level 0 is absent, because all of it is zero."""
    pixels = textured((3, HEIGHT, WIDTH))
    pixels[:, :64, :64] = 0
    write_pyramid(tmp_path / "p.ome.zarr", pixels, options=small)
    return tmp_path / "p.ome.zarr"


def shard(pyramid, level, y, x):
    return pyramid / str(level) / "c" / "0" / str(y) / str(x)


def chunk_span(path, inner, grid=4):
    """Offset and length of a chunk in a shard file, by its number in row-major order."""
    index = np.frombuffer(path.read_bytes()[-grid * grid * 16 - 4 : -4], "<i8").reshape(-1, 2)
    return index[inner].tolist()


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def found(problems):
    """The problems without their words."""
    return [(problem.what, problem.level, problem.place) for problem in problems]


def write_root(pyramid, root):
    """Replace the root's metadata, as a converter with a bug would write it."""
    seal(root)
    (pyramid / "zarr.json").write_text(json.dumps(root))


def put(pyramid, level, y, x, data):
    """Replace a shard and enter it in the root's table, as a converter with a bug would."""
    shard(pyramid, level, y, x).write_bytes(data)
    root = json.loads((pyramid / "zarr.json").read_text())
    table = root["attributes"]["nested_ats"]["shards"][level]
    columns = -(-json.loads((pyramid / f"{level}/zarr.json").read_text())["shape"][2] // 64)
    for name, value in (
        ("length", len(data)),
        ("crc32", zlib.crc32(data)),
        ("index_crc32c", int.from_bytes(data[-4:], "little")),
    ):
        table[name][y * columns + x] = value
    write_root(pyramid, root)


@pytest.fixture(params=[False, True], ids=["quick", "full"])
def full(request):
    return request.param


class TestSound:
    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
    @pytest.mark.parametrize("shape", [(3, HEIGHT, WIDTH), (1, 1, 1), (2, 129, 63)])
    def test_has_no_problems(self, tmp_path, textured, small, shape, dtype, full):
        pixels = textured(shape, {"int16": "uint16", "float64": "float32"}.get(dtype, dtype)).astype(dtype)
        if pixels.dtype.kind == "f":
            pixels[:, -1, -1] = np.nan
        write_pyramid(tmp_path / "p.zarr", pixels, options=small)
        assert validate(tmp_path / "p.zarr", full=full) == []

    def test_of_a_map_that_lies_over_a_slide(self, tmp_path, textured, small, full):
        pixels = textured((1, HEIGHT, WIDTH))
        write_pyramid(tmp_path / "p.zarr", pixels, options=small, mpp=0.2431, downsample=37.3)
        assert validate(tmp_path / "p.zarr", full=full) == []

    def test_an_absent_shard_is_no_problem(self, pyramid, full):
        assert not shard(pyramid, 0, 0, 0).exists()
        assert validate(pyramid, full=full) == []

    def test_equals_its_source(self, tmp_path, tiff, small):
        path, _ = tiff(HEIGHT, WIDTH)
        convert(path, tmp_path / "p.zarr", options=small)
        assert validate(tmp_path / "p.zarr", source=path) == []

    def test_by_url(self, pyramid, web, full):
        problems = validate(f"{web.url}/p.ome.zarr", full=full)
        assert found(problems) == [("unchecked", None, None)]
        assert "cannot be listed" in problems[0].message
        assert problems[0].warning

    def test_progress_ends_at_all_bytes(self, pyramid, full):
        calls = []
        validate(pyramid, full=full, progress=lambda *done: calls.append(done))
        assert [total for _, total in calls] == [calls[-1][0]] * len(calls)
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
        assert calls[-1][1] == sum(array.nbytes for _, array in zarr.open_group(pyramid, mode="r").arrays())


class TestDamage:
    @pytest.mark.parametrize("inner", [0, 5, 15])
    def test_a_bit_in_a_chunk(self, pyramid, full, inner):
        path = shard(pyramid, 0, 1, 2)
        offset, length = chunk_span(path, inner)
        flip(path, offset + length // 2)
        place = (4 + inner // 4, 8 + inner % 4)
        problems = validate(pyramid, full=full)
        assert found(problems) == [("shard", 0, (1, 2)), ("chunk", 0, place)]
        assert "0/c/0/1/2" in problems[0].message
        assert not problems[1].warning

    def test_a_bit_in_the_index(self, pyramid, full):
        flip(shard(pyramid, 1, 1, 0), -9)
        problems = validate(pyramid, full=full)
        assert set(found(problems)) == {("shard", 1, (1, 0))}
        assert any("checksum of the shard index" in problem.message for problem in problems)

    def test_a_truncated_shard(self, pyramid, full):
        path = shard(pyramid, 0, 2, 3)
        length = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-1])
        problems = validate(pyramid, full=full)
        assert found(problems) == [("shard", 0, (2, 3))]
        assert f"holds {length - 1} bytes, not {length}" in problems[0].message

    def test_a_removed_shard(self, pyramid, full):
        shard(pyramid, 0, 0, 3).unlink()
        problems = validate(pyramid, full=full)
        assert found(problems) == [("shard", 0, (0, 3))]
        assert "0/c/0/0/3 is missing" in problems[0].message

    def test_an_exchanged_shard_of_the_same_length(self, tmp_path, textured, full):
        """Each chunk's checksum holds, and the index's too: only the table can tell."""
        pixels = textured((1, 128, 64))
        pixels[:, 0:32] = 7  # the shards hold the same chunks in another order
        pixels[:, 64:96], pixels[:, 96:128] = pixels[:, 32:64], pixels[:, 0:32]
        self._exchange(tmp_path / "p.zarr", pixels, full=full)

    def test_an_exchanged_shard_of_equal_chunk_lengths(self, tmp_path, rng):
        """Pixels that do not compress: all chunks are of one length."""
        self._exchange(tmp_path / "p.zarr", rng.integers(1, 256, (1, 128, 64), dtype=np.uint8), full=False)

    @staticmethod
    def _exchange(path, pixels, *, full):
        write_pyramid(path, pixels, options=ConvertOptions(chunk=32, shard=64, min_level_size=64))
        upper, lower = shard(path, 0, 0, 0), shard(path, 0, 1, 0)
        first, second = upper.read_bytes(), lower.read_bytes()
        assert len(first) == len(second)
        assert first != second
        upper.write_bytes(second)
        lower.write_bytes(first)
        problems = validate(path, full=full)
        assert found(problems) == [("shard", 0, (0, 0)), ("shard", 0, (1, 0))]
        assert "not the shard that was written here" in problems[0].message

    def test_a_file_where_all_is_zero(self, pyramid, full):
        shutil.copy(shard(pyramid, 0, 1, 1), shard(pyramid, 0, 0, 0))
        assert found(validate(pyramid, full=full)) == [("shard", 0, (0, 0))]

    def test_files_that_do_not_belong_there(self, pyramid, full):
        (pyramid / "0" / "c" / "0" / "9").mkdir()
        for key in ("notes.txt", "0/c/0/9/9", "0/c/0/1/1.7.tmp"):
            (pyramid / key).write_text("mine")
        problems = validate(pyramid, full=full)
        assert found(problems) == [("stray", None, None)] * 3
        assert [problem.message.split()[0] for problem in problems] == ["0/c/0/1/1.7.tmp", "0/c/0/9/9", "notes.txt"]
        assert all(problem.warning for problem in problems)

    @pytest.mark.parametrize("damage", ["changed", "missing", "no JSON"])
    def test_metadata_of_a_level(self, pyramid, full, damage):
        path = pyramid / "1" / "zarr.json"
        if damage == "changed":
            path.write_text(path.read_text().replace('"fill_value":0', '"fill_value":7'))
        elif damage == "missing":
            path.unlink()
        else:
            path.write_text("{")
        problems = validate(pyramid, full=full)
        assert found(problems) == [("metadata", 1, None)]
        assert "1/zarr.json" in problems[0].message

    @pytest.mark.parametrize("text", ["{", "[]", '{"attributes": {"ome": {}}}'])
    def test_metadata_of_the_root(self, pyramid, full, text):
        (pyramid / "zarr.json").write_text(text)
        if text == '{"attributes": {"ome": {}}}':
            with pytest.raises(NotAPyramidError):
                validate(pyramid, full=full)
            return
        problems = validate(pyramid, full=full)
        assert found(problems) == [("metadata", None, None)]
        assert str(pyramid) not in problems[0].message

    def test_a_table_of_other_shards(self, pyramid, full):
        path = pyramid / "zarr.json"
        root = json.loads(path.read_text())
        root["attributes"]["nested_ats"]["shards"][0]["length"].pop()
        path.write_text(json.dumps(root))
        assert found(validate(pyramid, full=full)) == [("metadata", None, None)]

    def test_a_level_that_is_not_half_of_the_finer(self, pyramid, full):
        for path in (pyramid / "zarr.json", pyramid / "1" / "zarr.json"):
            path.write_text(path.read_text().replace('"shape":[3,75,100]', '"shape":[3,75,99]'))
        write_root(pyramid, json.loads((pyramid / "zarr.json").read_text()))
        problems = [p for p in validate(pyramid, full=full) if p.what == "metadata"]
        assert found(problems) == [("metadata", 1, None)]
        assert problems[0].message == "(3, 75, 99) is not half of level 0, (3, 150, 200)"

    @pytest.mark.parametrize("step", [0, 1], ids=["scale", "translation"])
    def test_a_level_that_lies_elsewhere(self, pyramid, full, step):
        path = pyramid / "zarr.json"
        root = json.loads(path.read_text())
        transform = root["attributes"]["ome"]["multiscales"][0]["datasets"][2]["coordinateTransformations"][step]
        transform[transform["type"]][2] *= 1.001
        write_root(pyramid, root)
        problems = validate(pyramid, full=full)
        assert found(problems) == [("metadata", 2, None)]
        assert "should be (4.0, 4.0) and (1.5, 1.5)" in problems[0].message

    def test_several_at_once(self, pyramid, full):
        shard(pyramid, 0, 2, 2).unlink()
        shard(pyramid, 2, 0, 0).write_bytes(b"")
        (pyramid / "3" / "zarr.json").unlink()
        expected = [("shard", 0, (2, 2)), ("shard", 2, (0, 0)), ("metadata", 3, None)]
        assert found(validate(pyramid, full=full)) == expected

    def test_a_shard_that_cannot_be_read(self, pyramid, full, monkeypatch):
        original = os.open

        def fails(path, *args, **settings):
            if str(path).endswith("0/c/0/1/1"):
                raise OSError(errno.EIO, "Input/output error")
            return original(path, *args, **settings)

        monkeypatch.setattr(os, "open", fails)
        problems = validate(pyramid, full=full)
        assert found(problems) == [("shard", 0, (1, 1))]
        assert problems[0].message.startswith("0/c/0/1/1: cannot be read (Input/output error)")


class TestPixels:
    """Checksums hold in all of these: only a full look finds them."""

    @pytest.fixture
    def other(self, tmp_path, textured, small):
        """The same image but for one pixel."""
        pixels = textured((3, HEIGHT, WIDTH))
        pixels[:, :64, :64] = 0
        pixels[1, 100, 170] ^= 128
        write_pyramid(tmp_path / "other.zarr", pixels, options=small)
        return tmp_path / "other.zarr"

    def test_a_coarser_level_that_is_wrong(self, pyramid, other):
        put(pyramid, 1, 0, 1, shard(other, 1, 0, 1).read_bytes())
        assert validate(pyramid) == []
        problems = validate(pyramid, full=True)
        # Level 1 differs from the means of level 0, and those of level 1 from level 2.
        assert found(problems) == [("pixels", 1, (0, 1)), ("pixels", 2, (0, 0))]
        expected = (
            "1 of 1024 pixels, the first at y=50, x=85 in chunk (3, 5), are not the means of shard (1, 2) of level 0"
        )
        assert problems[0].message == expected

    def test_level_0_that_is_wrong(self, pyramid, other):
        put(pyramid, 0, 1, 2, shard(other, 0, 1, 2).read_bytes())
        assert found(validate(pyramid, full=True)) == [("pixels", 1, (0, 1))]

    def test_level_0_that_is_not_the_source(self, tmp_path, tiff, small):
        path, pixels = tiff(HEIGHT, WIDTH)
        convert(path, tmp_path / "p.zarr", options=small)
        pixels[2, 149, 199] ^= 1
        pixels[2, 149, 198] ^= 1
        tifffile.imwrite(path, pixels.transpose(1, 2, 0), photometric="rgb", tile=(64, 64))
        assert validate(tmp_path / "p.zarr", full=True) == []
        [problem] = validate(tmp_path / "p.zarr", source=path)
        assert found([problem]) == [("pixels", 0, (2, 3))]
        assert problem.message == "2 of 176 pixels, the first at y=149, x=198 in chunk (9, 12), are not the source's"

    def test_a_source_of_another_shape(self, tmp_path, tiff, pyramid):
        path, _ = tiff(HEIGHT, WIDTH + 1)
        [problem] = validate(pyramid, source=path)
        assert found([problem]) == [("pixels", 0, None)]
        assert "(3, 150, 201)" in problem.message

    def test_a_source_that_is_damaged_since(self, tmp_path, tiff, small):
        path, _ = tiff(HEIGHT, WIDTH)
        convert(path, tmp_path / "p.zarr", options=small)
        with tifffile.TiffFile(path) as file:
            offset = file.pages[0].dataoffsets[6]  # row 1, column 2
        flip(path, offset + 40)
        [problem] = validate(tmp_path / "p.zarr", source=path)
        assert found([problem]) == [("unchecked", 0, (1, 2))]
        assert "tile (1, 2)" in problem.message

    def test_a_source_that_cannot_be_opened(self, tmp_path, tiff, pyramid):
        with pytest.raises(MissingImageError, match="gone.tif"):
            validate(pyramid, source=tmp_path / "gone.tif")
        path, _ = tiff(HEIGHT, WIDTH)
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(CorruptImageError, match="image.tif"):
            validate(pyramid, source=path)


class TestOtherWriters:
    """Ours without the table of shards are what another writer of the same layout would leave."""

    @pytest.fixture
    def foreign(self, pyramid):
        root = json.loads((pyramid / "zarr.json").read_text())
        del root["attributes"]["nested_ats"]
        (pyramid / "zarr.json").write_text(json.dumps(root))
        # Without a table an absent shard cannot be told from a lost one.
        shutil.copy(shard(pyramid, 0, 1, 1), shard(pyramid, 0, 0, 0))
        return pyramid

    def test_what_was_not_checked_is_said(self, foreign, full):
        [problem] = validate(foreign, full=full)
        assert found([problem]) == [("unchecked", None, None)]
        assert "without a table of shards" in problem.message
        assert ("no chunk was decoded" in problem.message) is not full

    def test_chunks_are_decoded_in_full(self, foreign):
        path = shard(foreign, 0, 1, 2)
        for inner in (0, 5):
            flip(path, sum(chunk_span(path, inner)) - 6)
        problems = validate(foreign, full=True)
        assert found(problems) == [("unchecked", None, None), ("chunk", 0, (4, 8)), ("chunk", 0, (5, 9))]
        assert len(validate(foreign)) == 1

    def test_level_0_is_compared_with_the_source(self, foreign, tiff):
        path, _ = tiff(HEIGHT, WIDTH)  # it is zero where the pyramid has the copied shard
        problems = validate(foreign, source=path)
        assert found(problems) == [("unchecked", None, None), ("pixels", 0, (0, 0))]


class TestOmeZarr04:
    @pytest.fixture
    def old(self, tmp_path, textured):
        """Written by zarr-python: no shards, no table, no consolidated metadata."""
        group = zarr.open_group(tmp_path / "old.zarr", mode="w", zarr_format=2)
        pixels = textured((3, HEIGHT, WIDTH))
        datasets = []
        for number in range(2):
            level = pixels[:, :: 2**number, :: 2**number]  # by decimation, as some do
            array = group.create_array(str(number), shape=level.shape, chunks=(1, 64, 64), dtype="uint8")
            array[:] = level
            scale = {"type": "scale", "scale": [1.0, 2.0**number, 2.0**number]}
            datasets.append({"path": str(number), "coordinateTransformations": [scale]})
        axes = [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
        group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
        return tmp_path / "old.zarr"

    def test_sound_as_far_as_can_be_seen(self, old, full):
        assert found(validate(old, full=full)) == [("unchecked", None, None)]

    def test_chunks_that_do_not_decode(self, old):
        for key in ("0/1.1.2", "0/0.2.3", "1/2.0.1"):
            assert (old / key).exists()
            (old / key).write_bytes(bytes(20))  # cut, blosc would read past the end, and not notice
        expected = [("chunk", 0, (1, 2)), ("chunk", 0, (2, 3)), ("chunk", 1, (0, 1))]
        assert found(validate(old, full=True)) == [("unchecked", None, None), *expected]

    def test_level_0_is_compared_with_the_source(self, old, tiff):
        path, _ = tiff(HEIGHT, WIDTH)
        assert found(validate(old, source=path)) == [("unchecked", None, None)]


class TestNoPyramid:
    def test_unfinished(self, tmp_path, pyramid, full):
        pyramid.rename(tmp_path / "q.zarr.partial")
        for path in (tmp_path / "q.zarr", tmp_path / "q.zarr.partial"):
            [problem] = validate(path, full=full)
            assert found([problem]) == [("unfinished", None, None)]
            assert "convert again" in problem.message

    def test_an_unfinished_replacement_beside_it(self, tmp_path, pyramid):
        (tmp_path / "p.ome.zarr.partial").mkdir()
        [problem] = validate(pyramid)
        assert found([problem]) == [("stray", None, None)]
        assert "p.ome.zarr.partial" in problem.message

    def test_what_cannot_be_looked_at(self, tmp_path, web):
        (tmp_path / "empty").mkdir()
        (tmp_path / "file.tif").write_text("no pyramid")
        for place, error in (
            (tmp_path / "gone", MissingImageError),
            (tmp_path / "gone.partial", MissingImageError),
            (tmp_path / "file.tif", MissingImageError),
            (tmp_path / "empty", NotAPyramidError),
            (f"{web.url}/empty", NotAPyramidError),
        ):
            with pytest.raises(error):
                validate(place)


class TestObjectStore:
    @pytest.fixture
    def url(self, s3, textured, small):
        pixels = textured((3, HEIGHT, WIDTH))
        pixels[:, :64, :64] = 0
        write_pyramid(f"{s3.url}/p.ome.zarr", pixels, options=small)
        return f"{s3.url}/p.ome.zarr"

    def test_sound(self, url, full):
        assert validate(url, full=full) == []

    def test_what_is_wrong_is_named(self, s3, url, full):
        s3.put("p.ome.zarr/notes.txt", b"mine")
        s3.put("p.ome.zarr/0/c/0/0/0", b"not zero")
        s3.direct.delete("p.ome.zarr/0/c/0/1/2")
        expected = [("stray", None, None), ("shard", 0, (0, 0)), ("shard", 0, (1, 2))]
        assert found(validate(url, full=full)) == expected

    def test_unfinished(self, s3, url):
        s3.direct.delete("p.ome.zarr/zarr.json")
        with pytest.raises(NotAPyramidError):
            validate(url)
        s3.put("p.ome.zarr.partial/journal-0", b"")
        assert found(validate(url)) == [("unfinished", None, None)]

    def test_a_store_that_fails_is_an_error_and_no_damage(self, s3, url):
        s3.fail("503", method="GET", path="0/c/0/1/2", times=99)
        with pytest.raises(TransferError, match="0/c/0/1/2"):
            validate(url)
