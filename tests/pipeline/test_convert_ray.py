"""Converting on Ray workers writes the very bytes that threads write."""

from __future__ import annotations

import json

import numpy as np
import pytest

import cluster
from pipeline.convert import convert_all, ray_executor
from pipeline.data.discovery import name_slides
from storage import ConversionError, ConvertOptions, write_tiff


def contents(folder):
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(files) > 20
    return files


@pytest.mark.ray
@pytest.mark.usefixtures("ray_head")
def test_the_pyramid_is_the_same(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    tiles = [pixels[y : y + 64, x : x + 64] for y in range(0, 300, 64) for x in range(0, 400, 64)]
    write_tiff(tmp_path / "a.tif", tiles, shape=pixels.shape, dtype="uint8", tile=64, compression="deflate")
    original, items = cluster.run_tasks, []

    def counted(make_worker, tasks, **settings):
        items.extend(tasks)
        return original(make_worker, tasks, **settings)

    monkeypatch.setattr(cluster, "run_tasks", counted)
    options = ConvertOptions(chunk=16, shard=64, min_level_size=16)
    for folder, address in (("threads", "none"), ("ray", "local")):
        entries = name_slides([str(tmp_path / "a.tif")])
        [conversion] = convert_all(entries, tmp_path / folder, options=options, address=address, workers=2)
        assert conversion.report, conversion.error
    assert len(items) > 4  # blocks went to the workers, and not all was done here
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")


def test_a_failed_task_is_an_error_of_its_slide(monkeypatch):
    def fails(make_worker, items, **_):
        yield cluster.Outcome(items[0], [], None, 1)
        yield cluster.Outcome(items[1], None, "its worker died (attempt 2)", 2)

    monkeypatch.setattr(cluster, "run_tasks", fails)
    answers = iter(ray_executor("local", 1)(json.loads, ["a", "b"]))
    assert next(answers) == []
    with pytest.raises(ConversionError, match=r"its worker died \(attempt 2\)"):
        next(answers)
