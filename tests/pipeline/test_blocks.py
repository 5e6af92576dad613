"""``split``: the splits that a training would draw, and blocks of the Earth whose scenes stay together."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.data.blocks import block_of, spatial_groups
from pipeline.data.manifest import Entry, read_manifest, write_manifest
from pipeline.data.splits import assign_splits, count_splits
from pipeline.errors import DataError, UsageError
from storage import write_pyramid
from storage.format.georeference import Georeference


def scenes(folder, places, crs=4326, cases=()):
    """Entries of pyramids of 10 x 20 pixels with their centres at such longitudes and latitudes."""
    entries = []
    for i, (x, y) in enumerate(places):
        place = Georeference((1e-4, 0, x - 1e-3, 0, -1e-4, y + 5e-4), crs)
        path = folder / f"{i}.ome.zarr"
        write_pyramid(path, np.full((1, 10, 20), i, np.uint8), georeference=place)
        case_id = cases[i] if cases else ""
        entries.append(Entry(slide_id=f"s{i:03}", path=str(path), label="ab"[i % 2], case_id=case_id))
    return entries


def distance_km(one, other):
    (a, b), (c, d) = (np.radians(point) for point in (one, other))
    cosine = math.sin(b) * math.sin(d) + math.cos(b) * math.cos(d) * math.cos(a - c)
    return 6371.0088 * math.acos(min(1, max(-1, cosine)))


class TestBlocks:
    @pytest.mark.parametrize("latitude", [-89.9, -60, -33.3, 0.01, 47, 70, 89.9])
    @pytest.mark.parametrize("kilometres", [1, 25, 300])
    def test_are_of_their_size_wherever_they_lie(self, latitude, kilometres):
        degrees = kilometres / 111.195
        across = degrees / max(math.cos(math.radians(latitude)), 1e-9)
        rng = np.random.default_rng(0)
        inside = {}
        for _ in range(300):
            x = 11 + rng.uniform(-1, 1) * min(3 * across, 160)
            y = np.clip(latitude + rng.uniform(-3, 3) * degrees, -90, 90)
            inside.setdefault(block_of(x, y, kilometres), []).append((x, y))
        for points in inside.values():
            ys = [y for _, y in points]
            assert max(ys) - min(ys) <= degrees + 1e-9
            assert max(distance_km(points[0], point) for point in points) <= 1.6 * kilometres
        if abs(latitude) < 75:
            assert len(inside) >= 25

    def test_end_at_the_antimeridian_and_the_poles(self):
        assert block_of(180, 10, 50) == block_of(-180, 10, 50)
        assert block_of(179.99, 10, 50) != block_of(-179.99, 10, 50)
        assert block_of(0, 90, 5000) == block_of(0, 89.9999, 5000)

    def test_scenes_of_a_block_or_a_case_are_one_group(self, tmp_path):
        places = [(11.00, 47.0), (11.01, 47.01), (14.0, 47.0), (14.01, 47.01), (18.0, 47.0), (22.0, 47.0)]
        entries = scenes(tmp_path, places, cases=["", "p", "p", "", "q", ""])
        groups = spatial_groups(entries, 40)
        assert groups == {
            "s000": "s000",
            "s001": "s000",
            "s002": "s000",
            "s003": "s000",
            "s004": "s004",
            "s005": "s005",
        }
        assert spatial_groups(entries[::-1], 40) == groups

    def test_what_has_no_place_is_named(self, tmp_path):
        entries = scenes(tmp_path, [(11, 47), (12, 47)])
        write_pyramid(tmp_path / "plain.ome.zarr", np.zeros((1, 10, 20), np.uint8))
        entries += [
            Entry(slide_id="plain", path=str(tmp_path / "plain.ome.zarr")),
            Entry(slide_id="gone", path=str(tmp_path / "gone.ome.zarr")),
            *scenes(tmp_path / "more", [(5, 5)], crs=None),
        ]
        with pytest.raises(DataError, match="3 of 5 scenes have no place on the Earth") as caught:
            spatial_groups(entries, 10)
        for words in ("plain: ", "no georeference", "gone: ", "s000: ", "without a coordinate reference system"):
            assert words in str(caught.value)

    def test_without_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyproj", None)
        with pytest.raises(UsageError, match=r"--spatial-block needs pyproj, .*'nested-ats\[geo\]'"):
            spatial_groups([], 10)


@pytest.fixture
def split(tmp_path):
    """Run the command on entries; return what it wrote, and what it printed."""

    def run(entries, *options):
        write_manifest(tmp_path / "all.csv", entries)
        out = tmp_path / "split.csv"
        words = ["split", str(tmp_path / "all.csv"), "--out", str(out), "--overwrite", *map(str, options)]
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return read_manifest(out), result.stdout

    return run


class TestCommand:
    @pytest.mark.parametrize("seed", [0, 5])
    def test_draws_as_train_does(self, split, tmp_path, seed):
        entries = [
            Entry(
                slide_id=f"s{i}", path=f"/data/{i}.tif", label="ab"[i % 2], case_id=f"c{i // 2}", extra={"site": "x"}
            )
            for i in range(60)
        ]
        written, printed = split(entries, "--validation", 0.1, "--test", 0.3, "--seed", seed)
        assert written == assign_splits(entries, validation=0.1, test=0.3, seed=seed)
        counts = count_splits(written)
        assert list(counts) == ["train", "val", "test"]
        assert counts.keys() == {line.partition(":")[0] for line in printed.splitlines() if ": " in line}

    def test_defaults_are_those_of_a_configuration(self, split, config):
        entries = [Entry(slide_id=f"s{i}", path=f"/data/{i}.tif", label="ab"[i % 2]) for i in range(30)]
        default = type(config)()
        data = default.data
        written, _ = split(entries)
        assert written == assign_splits(entries, validation=data.validation, test=data.test, seed=default.seed)

    def test_blocks_do_not_part(self, split, tmp_path):
        pytest.importorskip("pyproj", reason="pyproj is not installed: pip install '.[geo]'")
        rng = np.random.default_rng(0)
        places = [(10 + 2 * (i % 12) + rng.uniform(0, 0.05), 47.05 + rng.uniform(0, 0.05)) for i in range(48)]
        entries = scenes(tmp_path, places)
        written, printed = split(entries, "--spatial-block", 100, "--test", 0.4)
        groups = spatial_groups(entries, 100)
        assert f"{len(set(groups.values()))} groups of blocks of 100 km" in printed
        assert len(set(groups.values())) <= 24
        splits = {(groups[entry.slide_id], entry.split) for entry in written}
        assert len(splits) == len(set(groups.values()))
        assert {entry.split for entry in written} == {"train", "test"}
        plain, _ = split(entries, "--test", 0.4)
        assert len({(groups[entry.slide_id], entry.split) for entry in plain}) > len(splits)
