"""In every command an unforeseen error of one slide fails that slide alone."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from cluster import ClusterError
from pipeline.cli.app import app
from pipeline.config import plain
from pipeline.data.unreadable import Unreadable, WatchedImage
from pipeline.errors import DataError
from pipeline.net import Net
from storage import write_tiff


@pytest.fixture
def bad(monkeypatch):
    """Make opening of slides named ``slide 1`` raise, wherever a command opens slides."""

    def install(error):
        def spoil(name):
            module, _, attribute = name.rpartition(".")
            real = getattr(importlib.import_module(module), attribute)

            def opening(place, *args, **kwargs):
                if Path(place).name.startswith("slide 1."):
                    raise error
                return real(place, *args, **kwargs)

            monkeypatch.setattr(name, opening)

        for name in ("data.slides.Slide", "info.Slide", "validate.validate", "convert.convert", "convert.open_image"):
            spoil(f"pipeline.{name}")

    return install


@pytest.fixture
def places(config, finished, pyramids, tmp_path, monkeypatch):
    """A finished run, pyramids of which slide 1 goes wrong, images of which slide 1 goes wrong, a configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    pixels = np.zeros((64, 64, 3), np.uint8)
    for i in range(2):
        write_tiff(tmp_path / "in" / f"slide {i}.tif", [pixels], shape=pixels.shape, dtype="uint8", tile=64)
    values = plain(config)
    values["train"]["epochs"] = 1
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    two = [pyramids.parent / f"slide {i}.ome.zarr" for i in range(2)]
    return {"run": [finished], "two": two, "manifest": [pyramids]}


COMMANDS = [
    "info {two}",
    "validate {two}",
    "convert in --out out",
    "convert in --out out --dry-run",
    "train --manifest {manifest} --config small.yaml --out out",
    "predict {run} {two} --out out",
    "heatmap {run} {two} --out out",
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("error", [ZeroDivisionError("a\nbug"), RecursionError("deep"), MemoryError()], ids=repr)
def test_what_nobody_foresaw_costs_its_slide(places, bad, command, error):
    bad(error)
    words = [str(part) for word in command.split() for part in places.get(word.strip("{}"), [word])]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 3, result.output
    lines = result.stderr.splitlines()
    assert f"1 of {14 if 'manifest' in command else 2} failed:" in lines
    assert "slide 1" in lines[-1]
    kind = type(error).__name__
    internal = f"internal error: {kind}: {' '.join(str(error).split())}; please report it"
    assert ("not enough memory (MemoryError)" if isinstance(error, MemoryError) else internal) in lines[-1]
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_ends_every_command(places, bad, command):
    bad(KeyboardInterrupt())
    words = [str(part) for word in command.split() for part in places.get(word.strip("{}"), [word])]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 130


def test_a_slide_that_goes_wrong_while_it_is_read_costs_itself(monkeypatch):
    class Image:
        def read(self, level, boxes):
            raise OverflowError("too large")

    unreadable = Unreadable()
    with pytest.raises(Exception, match="a"):
        WatchedImage(Image(), "a", unreadable).read(0, None)
    assert unreadable.reasons["a"].startswith("internal error: OverflowError: too large; please report it")


def test_tracebacks_are_for_those_who_ask(monkeypatch, capsys):
    def fail():
        with Net() as net:
            raise KeyError("a")
        return net.error

    assert "internal error: KeyError: 'a'" in fail()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("NESTED_ATS_DEBUG", "1")
    fail()
    assert "Traceback" in capsys.readouterr().err


def test_what_is_of_no_slide_goes_through():
    panic = type("PanicException", (BaseException,), {})("index out of bounds")
    with Net() as net:
        raise panic
    assert "PanicException: index out of bounds" in net.error
    with pytest.raises(DataError, match="slide a: internal error: ValueError"), Net("a", fail_fast=True):
        raise ValueError
    for error in (ClusterError("gone"), KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises(type(error)), Net():
            raise error
