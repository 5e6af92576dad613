"""A data set small enough to train on in a second: bright spots of two shapes on dark slides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import Config, parse_config
from pipeline.data.manifest import Entry, read_manifest, write_manifest
from pipeline.training.train import train
from storage import write_pyramid

from ..storage.s3 import moto_port, s3  # noqa: F401  fixtures

SMALL = {
    "seed": 3,
    "model": {
        "levels": [
            {"downsample": 4, "samples": 3, "stride": 4, "channels": [4]},
            {"downsample": 2, "samples": 3, "size": 16, "stride": 4, "channels": [4]},
        ],
        "patch_size": 24,
        "features": 8,
    },
    "train": {"epochs": 3, "batch_size": 4},
    "predict": {"draws": 2},
}


@pytest.fixture(scope="session")
def config() -> Config:
    return parse_config(SMALL, "test")


@pytest.fixture(scope="session")
def pyramids(tmp_path_factory) -> Path:
    """Manifest of 14 slides: 10 to train on (a step short of whole batches), 4 to test."""
    folder = tmp_path_factory.mktemp("pyramids")
    rng = np.random.default_rng(0)
    entries = []
    for i in range(14):
        label = ("bar", "box")[i % 2]
        pixels = rng.integers(0, 60, (3, 120 + 8 * (i % 3), 150), dtype=np.uint8)
        y, x = rng.integers(20, 80, 2)
        height, width = (20, 6) if label == "bar" else (12, 12)
        pixels[:, y : y + height, x : x + width] = 230
        path = folder / f"slide {i}.ome.zarr"
        write_pyramid(path, pixels, mpp=0.5)
        split = "train" if i < 10 else "test"
        entries.append(Entry(slide_id=f"slide {i}", path=str(path), label=label, split=split))
    write_manifest(folder / "manifest.csv", entries)
    return folder / "manifest.csv"


@pytest.fixture(scope="session")
def finished(config, pyramids, tmp_path_factory) -> Path:
    """Folder of a run that has finished; nothing may change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(read_manifest(pyramids), config, folder)
    return folder
