"""Tiles of a viewer: their pixels are the slide's, whatever levels it has, in the colours that are asked for."""

from __future__ import annotations

import io
import math

import matplotlib as mpl
import numpy as np
import pytest
import zarr
from PIL import Image

from pipeline.errors import UsageError
from pipeline.view import paint, tiles
from pipeline.view.paint import Heat, Look, Shown
from pipeline.view.tiles import TILE, Tile
from storage import Slide, write_pyramid


def nothing():
    """Nobody gives up."""


def colours(pixels):
    """(H, W, 3) of (3, H, W)."""
    return np.ascontiguousarray(np.moveaxis(pixels, 0, -1))


def pattern(height, width):
    """Colours that change slowly and differ everywhere, with some noise: (3, height, width)."""
    y, x = np.mgrid[0:height, 0:width]
    slow = np.stack([y * 200 / height, x * 200 / width, (y + x) * 200 / (height + width)])
    return (slow + np.random.default_rng(0).integers(0, 40, slow.shape)).astype(np.uint8)


@pytest.fixture
def pyramid(tmp_path):
    """Make a pyramid of odd sides, of which the pixels are given as well."""
    pixels = pattern(1037, 1403)
    write_pyramid(tmp_path / "odd.ome.zarr", pixels, mpp=0.5)
    with Slide(tmp_path / "odd.ome.zarr") as slide:
        yield slide, pixels


def foreign(folder, pixels, scales):
    """An OME-Zarr of another writer, with levels at these whole scales."""
    root = zarr.open_group(folder, mode="w", zarr_format=3)
    datasets = []
    for number, scale in enumerate(scales):
        height, width = (side // scale for side in pixels.shape[1:])
        blocks = pixels[:, : height * scale, : width * scale].reshape(3, height, scale, width, scale)
        root.create_array(str(number), data=blocks.mean((2, 4)).round().astype(np.uint8), chunks=(3, 128, 128))
        transform = {"type": "scale", "scale": [1.0, float(scale), float(scale)]}
        datasets.append({"path": str(number), "coordinateTransformations": [transform]})
    axes = [{"name": "c", "type": "channel"}, *({"name": name, "type": "space"} for name in "yx")]
    root.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    return Slide(folder)


def all_tiles(shape_yx, halvings):
    rows, columns = (math.ceil(side / 2**halvings / TILE) for side in shape_yx)
    return [[Tile(halvings, row, column) for column in range(columns)] for row in range(rows)]


def whole(slide, halvings, how=colours):
    """A slide put together from its tiles."""
    rows = all_tiles(slide.shape_yx, halvings)
    drawn = [[np.asarray(tiles.draw_tile(slide, tile, how, nothing)) for tile in row] for row in rows]
    return np.concatenate([np.concatenate(row, 1) for row in drawn], 0)


def mean(pixels, scale):
    """(H, W, 3) means of blocks, over what there is of them at the edge."""
    height, width = (math.ceil(side / scale) for side in pixels.shape[1:])
    held = np.full((3, height * scale, width * scale), np.nan)
    held[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return np.moveaxis(np.nanmean(held.reshape(3, height, scale, width, scale), (2, 4)), 0, -1)


class TestPixels:
    @pytest.mark.parametrize("halvings", range(4))
    def test_are_those_of_the_level(self, pyramid, halvings):
        slide, _ = pyramid
        level = slide.levels[halvings]
        assert level.downsample == 2**halvings
        expected = colours(slide.read(halvings, (0, 0, *level.shape_yx)))
        assert np.array_equal(whole(slide, halvings), expected)

    def test_the_coarsest_tile_is_the_whole_slide(self, pyramid):
        slide, _ = pyramid
        tile = tiles.whole(slide.shape_yx)
        assert max(tiles.draw_tile(slide, tile, colours, nothing).size) <= TILE
        assert not tiles.is_there(Tile(tile.halvings + 1, 0, 0), slide.shape_yx)
        assert not tiles.is_there(Tile(tile.halvings, 0, 1), slide.shape_yx)
        assert not tiles.is_there(Tile(-1, 0, 0), slide.shape_yx)
        assert all(tiles.is_there(each, slide.shape_yx) for row in all_tiles(slide.shape_yx, 0) for each in row)

    @pytest.mark.parametrize("scales", [(1,), (1, 3), (1, 4, 12)])
    @pytest.mark.parametrize("halvings", [0, 1, 2, 3])
    def test_are_means_where_there_is_no_such_level(self, tmp_path, scales, halvings):
        pixels = pattern(1100, 1300)
        with foreign(tmp_path / "foreign.zarr", pixels, scales) as slide:
            drawn = whole(slide, halvings).astype(float)
        expected = mean(pixels, 2**halvings)
        assert drawn.shape == expected.shape
        inner = np.abs(drawn - expected)[
            :-2, :-2
        ]  # the levels of the file are rounded down, and lack some at the edge
        assert inner.max() <= (1 if scales == (1,) or 2**halvings in scales else 40)
        assert inner.mean() < (0.5 if scales == (1,) or 2**halvings in scales else 6)

    def test_do_not_depend_on_the_pieces_that_are_read(self, tmp_path, monkeypatch):
        pixels = pattern(1100, 1300)
        with foreign(tmp_path / "foreign.zarr", pixels, (1,)) as slide:
            expected = whole(slide, 3)
            reads = []
            read = slide.read
            slide.read = lambda level, box, **settings: reads.append(box) or read(level, box, **settings)
            monkeypatch.setattr(tiles, "_PIECE_PIXELS", 200**2)
            assert np.array_equal(whole(slide, 3), expected)
        assert len(reads) > 30
        assert max(max(box[2:]) for box in reads) <= 200

    def test_a_drawing_ends_where_nobody_waits(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tiles, "_PIECE_PIXELS", 200**2)
        checks = []

        def check():
            checks.append(None)
            if len(checks) == 3:
                raise KeyboardInterrupt

        with foreign(tmp_path / "foreign.zarr", pattern(1100, 1300), (1,)) as slide:
            before = slide.statistics.chunks_decoded
            with pytest.raises(KeyboardInterrupt):
                tiles.draw_tile(slide, Tile(3, 0, 0), colours, check)
            assert slide.statistics.chunks_decoded - before <= 2 * 9

    def test_what_a_tile_costs(self, tmp_path, pyramid):
        assert tiles.cost(pyramid[0], Tile(2, 0, 0)) == 256 * 256
        with foreign(tmp_path / "foreign.zarr", pattern(1100, 1300), (1,)) as slide:
            assert tiles.cost(slide, Tile(2, 0, 0)) == 1024 * 1024

    def test_samples_come_from_all_over(self, pyramid):
        slide, pixels = pyramid
        found = tiles.sample(slide)
        assert found.shape[0] == 3
        assert found.shape[1] <= 2**20
        assert np.abs(found.mean(1) - pixels.mean((1, 2))).max() < 8


class TestLook:
    def test_colours_are_as_they_are(self, pyramid):
        slide, pixels = pyramid
        look = paint.default_look(slide, paint.find_ranges(slide))
        assert np.array_equal(whole(slide, 0, paint.painter(slide, look)), colours(pixels))

    def test_each_channel_adds_its_light(self, pyramid):
        slide, pixels = pyramid
        look = Look((Shown(0, (255, 0, 0), 50, 150), Shown(2, (0, 128, 255), 0, 255)), gamma=2.0)
        red = ((pixels[0].astype(float) - 50) / 100).clip(0, 1) ** 2
        blue = (pixels[2] / 255) ** 2
        expected = np.stack([255 * red, 128 * blue, 255 * blue], -1)
        drawn = whole(slide, 0, paint.painter(slide, look))
        assert np.abs(drawn - expected).max() <= 0.51

    @pytest.mark.parametrize(("channels", "kinds"), [(1, 1), (2, 2), (3, 3), (5, 3)])
    def test_16_bits_are_stretched_over_what_is_there(self, tmp_path, channels, kinds):
        values = np.random.default_rng(0).uniform(
            1000, 1000 + 2000 * (1 + np.arange(channels)[:, None, None]), (channels, 300, 300)
        )
        write_pyramid(tmp_path / "a.ome.zarr", values.astype(np.uint16))
        with Slide(tmp_path / "a.ome.zarr") as slide:
            look = paint.default_look(slide, paint.find_ranges(slide))
            drawn = whole(slide, 0, paint.painter(slide, look))
        assert len(look.channels) == kinds
        for number, shown in enumerate(look.channels):
            assert shown.low == pytest.approx(1000, abs=0.02 * 2000 * (1 + number))
            assert shown.high == pytest.approx(1000 + 2000 * (1 + number), rel=0.02)
        assert drawn.min() == 0
        assert drawn.max() == 255

    def test_what_holds_no_data_is_transparent(self, tmp_path):
        values = np.random.default_rng(0).uniform(5, 9, (1, 300, 300)).astype(np.float32)
        values[:, :100] = np.nan
        write_pyramid(tmp_path / "a.ome.zarr", values)
        with Slide(tmp_path / "a.ome.zarr") as slide:
            look = paint.default_look(slide, paint.find_ranges(slide))
            assert 4.9 < look.channels[0].low < look.channels[0].high < 9.1
            drawn = tiles.draw_tile(slide, Tile(0, 0, 0), paint.painter(slide, look), nothing)
            lower = tiles.draw_tile(slide, Tile(0, 1, 0), paint.painter(slide, look), nothing)
        assert np.array_equal(np.asarray(drawn)[..., 3] == 0, np.arange(256)[:, None].repeat(256, 1) < 100)
        assert paint.encode(drawn)[0] == "image/png"
        assert lower.mode == "RGB"
        assert paint.encode(lower)[0] == "image/jpeg"

    def test_nothing_but_gaps_is_shown_too(self, tmp_path):
        write_pyramid(tmp_path / "a.ome.zarr", np.full((1, 300, 300), np.nan, np.float32))
        with Slide(tmp_path / "a.ome.zarr") as slide:
            drawn = whole(slide, 0, paint.painter(slide, paint.default_look(slide, paint.find_ranges(slide))))
        assert not drawn[..., 3].any()

    def test_is_read_from_an_address(self, pyramid):
        slide, usual = pyramid[0], paint.default_look(pyramid[0], paint.find_ranges(pyramid[0]))
        assert paint.read_look({}, slide, usual) == usual
        query = {"channels": "2~00ff80~1.5~200,0~ffffff~-3~1e2", "gamma": "0.5"}
        assert paint.read_look(query, slide, usual) == Look(
            (Shown(2, (0, 255, 128), 1.5, 200), Shown(0, (255, 255, 255), -3, 100)), 0.5
        )

    @pytest.mark.parametrize(
        "query",
        [
            {"channels": "3~ff0000~0~1"},
            {"channels": "0~ff0000~0"},
            {"channels": "0~red~0~1"},
            {"channels": "0~ff0000~nan~1"},
            {"channels": "0~ff0000~0~inf"},
            {"channels": "0~ff0000~0~x"},
            {"channels": ",".join(["0~ff0000~0~1"] * 13)},
            {"gamma": "0"},
            {"gamma": "nan"},
            {"gamma": "x"},
        ],
    )
    def test_what_is_no_look_is_refused(self, pyramid, query):
        with pytest.raises(UsageError, match="not how this slide can be shown"):
            paint.read_look(query, pyramid[0], paint.default_look(pyramid[0], paint.find_ranges(pyramid[0])))


class TestHeat:
    def test_is_coloured_by_its_logarithm(self):
        values = np.array([[[0.0, 0.99, 1.01, 10, 100, 1000, np.nan]]], np.float32)
        drawn = paint.heat_painter(Heat("viridis", 1, 100))(values)[0]
        table = (np.array(mpl.colormaps["viridis"](np.arange(256))[:, :3]) * 255).round()
        assert drawn[[0, 1, 6], 3].tolist() == [0, 0, 0]
        for place, share in ((2, 0), (3, 0.5), (4, 1), (5, 1)):
            assert np.abs(drawn[place, :3] - table[round(share * 255)]).max() <= 3
        opacity = drawn[2:6, 3].tolist()
        assert opacity == sorted(opacity)
        assert opacity[-1] == 255

    @pytest.mark.parametrize(
        "query", [{"colours": "jet"}, {"low": "0"}, {"low": "7"}, {"high": "nan"}, {"high": "x"}]
    )
    def test_what_is_none_is_refused(self, query):
        with pytest.raises(UsageError, match="not how attention can be shown"):
            paint.read_heat(query, Heat("inferno", 1, 5))

    def test_the_legend_has_its_colours(self):
        for name in paint.COLOUR_MAPS:
            row = np.asarray(Image.open(io.BytesIO(paint.legend(name))))[0, :, :3]
            assert np.array_equal(row, paint.colour_table(name))
