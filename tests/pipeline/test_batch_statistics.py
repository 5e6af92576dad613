"""Encoders with batch normalisation on several workers: right, or refused with what to do."""

from __future__ import annotations

import pytest

from cluster import LocalContext
from nested_ats import Classes
from pipeline.config import load_config
from pipeline.data.manifest import Entry
from pipeline.errors import UsageError
from pipeline.training.trainer import Trainer

ENTRIES = [Entry(slide_id=label, path=f"{label}.ome.zarr", label=label, split="train") for label in "ab"]


def make(tmp_path, workers: int, *settings: str) -> Trainer:
    context = LocalContext()
    context.world_size = workers
    return Trainer(
        context,
        load_config(None, ["model.encoder=mobilenet_v2", *settings]),
        ENTRIES,
        Classes(("a", "b")),
        3,
        tmp_path,
    )


@pytest.mark.parametrize(
    ("workers", "trainable"), [(1, "all"), (1, "3"), (2, "none"), (2, "3"), (2, "all --set model.encoder=lenet")]
)
def test_what_every_worker_computes_alike(tmp_path, workers, trainable):
    make(tmp_path, workers, *f"model.trainable={trainable}".split(" --set "))


def test_statistics_of_each_workers_own_patches_are_refused(tmp_path):
    with pytest.raises(
        UsageError, match=r"^model\.trainable: .*52 layers of batch normalisation.*2 workers.*none or"
    ):
        make(tmp_path, 2)
