"""Slides to train on: all are looked at first, and the reasons come before what follows from them."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import parse_config, plain
from pipeline.data.manifest import Entry, read_manifest
from pipeline.data.selection import select
from pipeline.data.slides import check_slide
from pipeline.errors import DataError, UsageError
from storage import write_pyramid


@pytest.fixture
def entries(pyramids, tmp_path):
    """The first slide has four channels, the other thirteen have three."""
    write_pyramid(tmp_path / "odd.ome.zarr", np.zeros((4, 120, 150), np.uint8))
    first, *others = read_manifest(pyramids)
    return [replace(first, path=str(tmp_path / "odd.ome.zarr")), *others]


def test_a_first_slide_with_an_odd_number_of_channels_falls_out_alone(config, entries, capsys):
    chosen = select(entries, config, fail_fast=False)
    assert (chosen.channels, chosen.target.names, len(chosen.entries)) == (3, ("bar", "box"), 13)
    [failure] = chosen.failures
    assert failure.slide_id == "slide 0"
    assert "odd.ome.zarr: 4 channels, where 13 of 14 slides have 3; convert slides of one kind" in failure.error
    assert chosen.downsamples == [(4, 2, 1)] * 13
    with pytest.raises(DataError, match="slide slide 0: .*4 channels"):
        select(entries, config, fail_fast=True)


def test_reasons_come_before_what_follows_from_them(config, entries, capsys):
    four = parse_config({**plain(config), "data": {"channels": 4}}, "")
    with pytest.raises(UsageError, match=r"at least two different labels \(found: bar\)"):
        select(entries, four, fail_fast=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 13
    assert all("3 channels, where data.channels is 4" in line for line in lines)


def test_slides_are_opened_side_by_side(config, entries, monkeypatch):
    """Two that wait for each other would wait for ever one after the other."""
    together = threading.Barrier(2)

    def meet(*args, **options):
        together.wait(30)
        return check_slide(*args, **options)

    monkeypatch.setattr("pipeline.data.selection.check_slide", meet)
    assert len(select(entries, config, fail_fast=False).entries) == 13


def test_remarks_are_made_before_any_slide_is_opened(config, pyramids, capsys):
    rows = [replace(entry, path="gone", fold="1") for entry in read_manifest(pyramids)]
    rows[0] = replace(rows[0], label="Bar")
    with pytest.raises(DataError, match="no slide can be used"):
        select(rows, config, fail_fast=False)
    text = capsys.readouterr().err
    assert "warning: column fold: ignored without --fold" in text
    assert "warning: labels 'Bar' (1 slides) and 'bar' (6) are two classes that differ in case or blanks" in text


@pytest.mark.parametrize(
    ("model", "warned"),
    [
        ({"encoder": {"name": "mobilenet_v2"}, "trainable": "none"}, True),
        ({"encoder": "lenet", "trainable": 1}, True),
        ({"encoder": {"name": "timm/resnet18", "weights": "random"}, "trainable": "none"}, True),
        ({"encoder": {"name": "mobilenet_v2", "weights": "m.pth"}, "trainable": "none"}, False),
        ({"encoder": "timm/resnet18", "trainable": "none"}, False),
        ({"encoder": "lenet"}, False),
    ],
)
def test_random_weights_that_are_not_trained_are_remarked_on(config, capsys, model, warned):
    values = plain(config)
    values["model"] = {
        **{k: v for k, v in values["model"].items() if k not in ("encoder", "mean", "std")},
        "patch_size": 32,
        **model,
    }
    with pytest.raises(DataError, match="no slide can be used"):
        select([Entry(slide_id="a", path="gone", label="x")], parse_config(values, ""), fail_fast=False)
    found = "warning: model.trainable: " in capsys.readouterr().err
    assert found is warned
