"""The site's reference has every key of a configuration and every command, with what each is."""

from __future__ import annotations

import hashlib
import importlib
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
from pipeline.results import predictions

sys.path.append(str(Path(__file__).parents[2] / "docs"))

import drawings
import errors_page
import hooks

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("room", ["nested_ats", "storage", "cluster"])
def test_the_reference_has_every_public_name(room):
    page = hooks.on_page_markdown((ROOT / "docs" / "api" / f"{room}.md").read_text())
    assert re.findall(r"^::: (.*)$", page, re.MULTILINE) == [
        f"{room}.{name}" for name in importlib.import_module(room).__all__
    ]


def test_every_error_has_its_meaning_and_its_messages():
    page = "\n".join(errors_page.lines())
    for name, room, meaning in errors_page.error_types():
        kind = getattr(importlib.import_module(f"{room}.errors"), name)
        assert issubclass(kind, Exception)
        assert f"## {name}\n\n`{room}.errors.{name}`. {meaning}" in page
        roots = {"PipelineError", "StorageError", "ClusterError", "NestedATSError"}
        assert name in roots or len(meaning.split("\n\n")) > 1, f"{name}: say what to do, in a second paragraph"
    assert "| --set *setting*: *value* is not a YAML value |" in page
    assert "| *out*: is there already | give another --out, or --overwrite to replace it |" in page
    assert "copy or download it again |" in page  # what several messages share, from a constant
    assert sum(map(len, errors_page.messages().values())) > 400


def test_every_column_of_predictions_is_explained():
    page = (Path(hooks.__file__).parent / "predictions.md").read_text()
    columns = {*predictions.OWN_COLUMNS, *(f"{each}CLASS" for each in ("prob_", *predictions._ERRORS))}
    assert [each for each in columns if f"`{each}`" not in page] == []


def test_what_is_vendored_is_listed_as_it_is():
    table = (ROOT / "THIRD_PARTY.md").read_text()
    [vendored] = (ROOT / "pipeline").rglob("*.min.js")
    assert hashlib.sha256(vendored.read_bytes()).hexdigest() in table
    assert [each for each in (ROOT / "pipeline").rglob("*.LICENSE*") if each.name not in table] == []


def test_every_page_has_its_place_in_the_navigation():
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert [page for page in pages if page not in (ROOT / "mkdocs.yml").read_text()] == []


def test_what_somebody_who_knows_clam_looks_for_is_named_with_its_page():
    rows = re.findall(
        r"^\| \d+ \|.*\]\((\S+?)(?:#(\S+))?\) \|$", (ROOT / "docs/from-clam.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 10
    assert all((ROOT / "docs" / page).exists() for page, _ in rows)  # mkdocs checks the sections


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
