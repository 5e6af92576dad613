"""The notebooks run from the first cell to the last, and what they show is there."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"


def shown(notebook) -> str:
    """All that the cells have shown, as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "\n".join(output.get("data", {}).get("text/plain", "") for output in outputs)


def run(name, folder, monkeypatch):
    for variable in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(folder / variable))
    notebook = nbformat.read(FOLDER / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit"
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "whole_slides.ipynb",
            ["24 slides of 24 cases", "site A", "site B", "accuracy", "Page("],
        ),
        ("scenes.ipynb", ["30 slides", "ats of 50, 80, 3 epochs", "9 slides, 0 failed"]),
        ("megapixel_folder.ipynb", ["24 slides", "prob_bar", "accuracy", "plots.html"]),
    ],
)
def test_it_runs(name, words, tmp_path, monkeypatch):
    notebook = run(name, tmp_path, monkeypatch)
    text = shown(notebook)
    assert [word for word in words if word not in text] == []
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("<table" in output.get("data", {}).get("text/html", "") for output in outputs)
