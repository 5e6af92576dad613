"""The Python of README and guides runs, and their commands are parsed as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from pipeline.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "nested_ats/README.md",
    "storage/README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall((ROOT / page).read_text())


def commands():
    for page in PAGES:
        for _, text in blocks(page):
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line.partition("  #")[0].partition(" # ")[0].partition(" > ")[0])
                words = words[1:] if words[:1] == ["PYTHONPATH=."] else words
                if words[:1] == ["nested-ats"]:
                    yield pytest.param(words[1:], id=f"{page}: {' '.join(words[1:4])}")


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_is_parsed(words):
    found, context = typer.main.get_command(app), None
    while hasattr(found, "commands"):
        context = typer.Context(found, info_name="nested-ats", parent=context)
        found = found.commands[words[0]]
        words = words[1:]
    found.make_context(found.name, list(words), parent=context)


def test_there_are_commands_to_parse():
    assert sum(1 for _ in commands()) > 10


@pytest.mark.parametrize(
    "text",
    [text for language, text in blocks("nested_ats/README.md") if language == "python"],
    ids=lambda text: text[:20],
)
def test_its_python_runs(text):
    exec(compile(text, "nested_ats/README.md", "exec"), {})


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md"])
def test_the_files_that_it_names_are_there(page):
    rooms = "storage|nested_ats|cluster|pipeline|tests|examples|benchmarks|docs"
    named = re.findall(rf"`((?:{rooms})/[\w./]*)`", (ROOT / page).read_text())
    assert named
    assert [each for each in named if not (ROOT / each).exists()] == []
