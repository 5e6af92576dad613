"""A configuration may speak in micrometres; models know downsamples and pixels."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from pipeline.config import load_config, parse_config, plain
from pipeline.data.manifest import Entry
from pipeline.data.slides import open_image
from pipeline.errors import DataError, UsageError

PIXELS = {
    "mpp": 0.5,
    "levels": [
        {"downsample": 16.0, "stride": 4, "group": 4, "samples": 16},
        {"downsample": 4.0, "size": 64, "stride": 16, "samples": 32},
    ],
    "patch_downsample": 1.0,
    "patch_size": 64,
}


@pytest.mark.parametrize(
    "model",
    [
        {
            "mpp": 0.5,
            "levels": [
                {"mpp": 8, "stride_um": 32, "group": 4, "samples": 16},
                {"mpp": 2, "size_um": 128, "stride_um": 32, "samples": 32},
            ],
            "patch_size_um": 32,
        },
        {
            "magnification": 20,
            "levels": [
                {"magnification": 1.25, "stride": 4, "group": 4, "samples": 16},
                {"magnification": 5, "size_um": 128.5, "stride": 16, "samples": 32},
            ],
            "patch_size": 64,
        },
        {
            "levels": [
                {"mpp": 8, "stride": 4, "group": 4, "samples": 16},
                {"mpp": 2, "size": 64, "stride": 16, "samples": 32},
            ],
            "patch_magnification": 20,
            "patch_size_um": 32,
        },
    ],
    ids=["micrometres", "magnifications", "the finest that is named"],
)
def test_lengths_become_downsamples_and_pixels(model):
    assert parse_config({"model": model}, "test") == parse_config({"model": PIXELS}, "test")


def test_metres_are_a_million_micrometres():
    scene = {
        "m": 10,
        "levels": [
            {"m": 160, "stride_m": 640, "group": 4, "samples": 16},
            {"m": 40, "size_m": 2560, "stride_m": 640, "samples": 32},
        ],
        "patch_m": 10,
        "patch_size_m": 640,
    }
    config = parse_config({"model": scene}, "test")
    assert config == parse_config({"model": PIXELS | {"mpp": 1e7}}, "test")
    assert parse_config(plain(config), "again") == config


def test_what_is_overridden_counts_before_lengths_are_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {mpp: 0.5, levels: [{mpp: 8, stride: 4, samples: 4}], patch_size: 64}\n")
    config = load_config(path, ["model.mpp=1.0"])
    assert [level.downsample for level in config.model.levels] == [8.0]
    assert parse_config(plain(config), "again") == config


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"mpp": 0.5, "magnification": 20}, "magnification: mpp is given too"),
        (
            {"levels": [{"mpp": 8, "downsample": 16}]},
            r"levels\[0\]\.downsample: its scale is given in microm",
        ),
        ({"levels": [{"mpp": 8, "magnification": 1}]}, r"levels\[0\]\.magnification: mpp is given too"),
        ({"mpp": 0.5, "levels": [{"mpp": 0.25}]}, r"levels\[0\]\.mpp: 0\.25 microm.* finer than model\.mpp"),
        (
            {"mpp": 0.5, "levels": [{"mpp": 2, "size": 4, "size_um": 8}]},
            r"levels\[0\]\.size: it is given in microm",
        ),
        ({"mpp": 0.5, "levels": [{"mpp": 2, "size_um": 5}]}, r"levels\[0\]\.size_um: 5 are 2\.50 pixels; give [46]"),
        ({"patch_size_um": 32}, "patch_size_um: give mpp"),
        ({"magnification": 0}, "magnification: must be a positive number"),
        ({"mpp": 0.5, "m": 10}, "m: mpp is given too"),
        ({"m": 10, "levels": [{"m": 5}]}, r"levels\[0\]\.mpp: 5 m is finer than model\.mpp, 10 m"),
        (
            {"m": 10, "levels": [{"m": 40, "size_m": 100}]},
            r"levels\[0\]\.size_m: 100 are 2\.50 pixels; give",
        ),
        ({"m": 10, "levels": [{"m": 40, "size": 4, "size_m": 160}]}, r"levels\[0\]\.size: it is given in metres too"),
        ({"patch_size_m": 640}, "patch_size_m: give m, the metres per pixel, too"),
        ({"levels": [{"mpp": "8"}]}, r"levels\[0\]\.mpp: must be a positive number"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(model, match):
    with pytest.raises(UsageError, match=rf"test: model\.{match}"):
        parse_config({"model": model}, "test")


class TestScenes:
    """Scenes of two sensors at one scale in metres, by the CRS."""

    @pytest.fixture
    def write(self, tmp_path):
        rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed: pip install '.[geo]'")

        def make(name, metres, crs="EPSG:32633", high=1.0):
            side = 5120 // (metres if crs != "EPSG:4326" else 10)
            place = rasterio.Affine(metres, 0, 10, 0, -metres * high, 20) if crs else None
            shape = {"driver": "GTiff", "count": 1, "height": side, "width": side, "dtype": "uint8"}
            context = contextlib.nullcontext() if crs else pytest.warns(rasterio.errors.NotGeoreferencedWarning)
            with context, rasterio.open(tmp_path / name, "w", transform=place, crs=crs, **shape) as file:
                coarse = np.random.default_rng(0).integers(0, 255, (128, 128), dtype=np.uint8)
                file.write(np.kron(coarse, np.ones((side // 128, side // 128), np.uint8)), 1)
            return Entry(slide_id=name, path=str(tmp_path / name))

        return make

    LEVEL = {"m": 40, "stride": 4, "samples": 4}  # noqa: RUF012
    CONFIG = parse_config({"model": {"m": 20, "levels": [LEVEL], "patch_size": 32}}, "")

    def test_sensors_of_two_resolutions_are_seen_alike(self, write):
        images = [open_image(write(f"{metres}.tif", metres), self.CONFIG.model) for metres in (10, 20)]
        assert [image.own_mpp for image in images] == [1e7, 2e7]
        assert [image.scale for image in images] == [2, 1]
        box = torch.tensor([[16, 32, 64, 64]])
        torch.testing.assert_close(images[0].read(1, box), images[1].read(1, box))

    @pytest.mark.parametrize(
        ("how", "match"),
        [
            ({"metres": 1e-4, "crs": "EPSG:4326"}, r"x.tif: its CRS \(EPSG:4326\) is in degrees, .* warp it"),
            ({"metres": 40}, r"x.tif: recorded at 40 m per pixel, coarser than the model's 20 m"),
            ({"metres": 10, "high": 2.0}, r"x.tif: its pixels are 20 m high and 10 m wide, .* resample it"),
            ({"metres": 10, "crs": None}, r"x.tif: .* the model looks at 20 m; give it a place .* gdal_edit"),
        ],
    )
    def test_what_has_no_such_scale_is_refused(self, write, how, match):
        with pytest.raises(DataError, match=match):
            open_image(write("x.tif", **how), self.CONFIG.model)
