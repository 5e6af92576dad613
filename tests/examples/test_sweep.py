"""Settings are swept by Ray Tune over the Python API."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import yaml

from pipeline.data.manifest import Entry, write_manifest
from pipeline.errors import UsageError
from pipeline.results.listing import list_runs
from storage import write_pyramid


@pytest.fixture
def sweep_module():
    """The example, whose functions travel to Ray's workers by value, as those of a script do."""
    import sweep
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sweep)
    yield sweep
    cloudpickle.unregister_pickle_by_value(sys.modules["sweep"])


def test_combinations_are_all_or_so_many(sweep_module):
    tried = ["train.learning_rate=1e-3,3e-3", "model.scale=4,8,16"]
    every = sweep_module.combinations(tried, None, 0)
    assert len(every) == 6
    assert every[0] == ["train.learning_rate=1e-3", "model.scale=4"]
    some = sweep_module.combinations(tried, 4, 1)
    assert len({tuple(each) for each in some}) == 4
    assert sweep_module.trial_name(every[0]) == "learning_rate=1e-3,scale=4"
    with pytest.raises(UsageError, match="write it as key=value,value"):
        sweep_module.combinations(["train.epochs"], None, 0)


@pytest.mark.ray
@pytest.mark.slow
def test_trials_are_runs_that_are_compared(sweep_module, tmp_path):
    rng = np.random.default_rng(0)
    entries = []
    for number in range(12):
        pixels = rng.integers(0, 60, (3, 96, 96), dtype=np.uint8)
        if number % 2:
            pixels[:, 30:60, 30:60] = 220
        path = tmp_path / f"{number}.ome.zarr"
        write_pyramid(path, pixels)
        split = "val" if number >= 8 else "train"
        entries.append(Entry(slide_id=str(number), path=str(path), label=("no", "yes")[number % 2], split=split))
    write_manifest(tmp_path / "manifest.csv", entries)
    model = {
        "levels": [{"downsample": 2, "samples": 3, "stride": 4, "channels": [4]}],
        "patch_size": 24,
        "features": 8,
    }
    settings = {"model": model, "train": {"epochs": 2, "batch_size": 4}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    tried = sweep_module.combinations(["train.learning_rate=1e-3,1e-30"], None, 0)
    out = tmp_path / "sweep"
    rows = sweep_module.sweep(
        tmp_path / "manifest.csv", tmp_path / "config.yaml", out, tried, metric="val_cross_entropy", at_once=1
    )
    assert {name for name, _, _ in rows} == {"learning_rate=1e-3", "learning_rate=1e-30"}
    values = [value for _, value, _ in rows]
    assert values == sorted(values)
    listed = list_runs(out)["runs"]
    assert {run["settings"]["train.learning_rate"] for run in listed} == {1e-3, 1e-30}
