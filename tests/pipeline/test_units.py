"""A configuration may speak in micrometres; models know downsamples and pixels."""

from __future__ import annotations

import pytest

from pipeline.config import load_config, parse_config, plain
from pipeline.errors import UsageError

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
        ({"mpp": 0.5, "levels": [{"mpp": 0.25}]}, r"levels\[0\]\.mpp: 0\.25 is finer than model\.mpp"),
        (
            {"mpp": 0.5, "levels": [{"mpp": 2, "size": 4, "size_um": 8}]},
            r"levels\[0\]\.size: it is given in microm",
        ),
        ({"mpp": 0.5, "levels": [{"mpp": 2, "size_um": 5}]}, r"levels\[0\]\.size_um: 5 are 2\.50 pixels; give [46]"),
        ({"patch_size_um": 32}, "patch_size_um: give mpp"),
        ({"magnification": 0}, "magnification: must be a positive number"),
        ({"levels": [{"mpp": "8"}]}, r"levels\[0\]\.mpp: must be a positive number"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(model, match):
    with pytest.raises(UsageError, match=rf"test: model\.{match}"):
        parse_config({"model": model}, "test")
