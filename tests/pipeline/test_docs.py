"""The site's reference has every key of a configuration and every command, with what each is."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import typer

from nested_ats import ArrayImage, LevelConfig, ModelConfig, NestedATS
from nested_ats.config import AnyConfig
from pipeline.cli.app import app
from pipeline.config import Config

sys.path.append(str(Path(__file__).parents[2] / "docs"))

import drawings
import hooks


def keys(section):
    """Names of a section's keys and of those below it."""
    for name, field in section.model_fields.items():
        yield name
        for kind in (field.annotation, *get_args(field.annotation)):
            if hasattr(kind, "model_fields"):
                yield from keys(kind)


def test_every_key_is_explained():
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", "\n".join(hooks._keys()), re.MULTILINE))
    models = {field.name for model in (*get_args(AnyConfig), LevelConfig) for field in fields(model)}
    assert rows.keys() == {*keys(Config), *models}
    sections = {"model", "target", "train", "data", "predict", "kind"}
    assert [name for name, row in rows.items() if not row.split("|")[-1].strip() and name not in sections] == []


def test_every_command_has_its_place():
    text = "\n".join(hooks._commands())
    root = typer.main.get_command(app)
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        assert f"## `nested-ats {name}`" in text
        assert all(f"`{option}`" in text for each in command.params for option in each.opts if option[:2] == "--")


def test_the_layers_of_every_room_are_drawn():
    text = "\n".join(hooks._layers())
    assert text.count("```text") == 6
    assert re.search(r"validation.*▼.*conversion │ read.*▼.*images.*▼.*format.*▼.*place", text, re.DOTALL)


@pytest.mark.parametrize(
    ("link", "there"),
    [
        ("[a](../docs/cluster.md)", "[a](cluster.md)"),
        ("[a](README.md)", "[a](workers.md)"),
        ("[a](../docs/guide.md#limits-today)", "[a](guide.md#limits-today)"),
        ("[a](context.py)", "a"),
        ("[a](https://b.org/c)", "[a](https://b.org/c)"),
    ],
)
def test_links_lead_to_pages(link, there):
    assert hooks._relink(link, Path("cluster")) == there


def test_the_pictures_of_the_concepts_can_be_drawn(monkeypatch):
    monkeypatch.setattr(drawings, "INTERVALS", 2)
    torch.manual_seed(0)
    levels = (LevelConfig(downsample=8, samples=3, stride=2, group=4), LevelConfig(downsample=4, size=32, samples=4))
    model = NestedATS(ModelConfig(levels=levels, patch_size=32), in_channels=3, classes=2)
    pixels = torch.randint(256, (3, 128, 128), dtype=torch.uint8)
    figures = drawings.drawings(model, ArrayImage(pixels, levels=5), ["a", "b"])
    drawn = {name: drawings.rendered(figure) for name, figure in figures}
    page = (Path(drawings.__file__).parent / "concepts.md").read_text()
    assert list(drawn) == re.findall(r"\]\(concepts/(.*?)\.jpg\)", page)
    assert all(len(np.unique(picture)) > 50 for picture in drawn.values())
