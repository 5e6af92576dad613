"""What README, tutorials and how-to pages tell people to type is typed here, on images that are small enough.

Each tutorial is followed from its first line to its last in a folder of its own. The other pages are read by somebody
who has followed the README, so their commands run where it was followed. What is not run, and why, is in `NOT_RUN`.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from typer.testing import CliRunner

from nested_ats.networks.mobilenet import MobileNetV2Encoder
from pipeline.cli.app import app
from pipeline.config import parse_config
from pipeline.data.bags import Bag, bag_path, write_bag
from pipeline.results.predictions import read_predictions
from storage import Slide

from ..storage.s3 import moto_port, s3  # noqa: F401  fixtures

ROOT = Path(__file__).parents[2]
WEIGHTS = "mobilenet_v2-b0353104.pth"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HOW_TO = ["images", "levels", "encoders", "predictions", "speed", "memory", "guide", "from-clam", "folds", "viewer"]
# By a command's name, or the beginning of one of its words.
NOT_RUN = {
    "calibrate": "it wants validation slides with mistakes: tests/pipeline/test_calibrate.py runs it",
    "view": "it serves until it is stopped: tests/browser runs it",
    "job": "it wants a cluster: tests/cluster and tests/pipeline/test_cli_job.py run it",
    "--cluster": "Ray takes its time: tests/pipeline/test_cli.py and others run these options",
    "s3://": "it wants an object store: below, the slides' tutorial has one",
}
# What makes a command take seconds; the rest of it runs as it stands on the page.
QUICKLY = {
    "train": ["--set", "train.epochs=1", "--set", "train.batch_size=4"],
    "examples/sixty_slides.py": ["--count", "12", "--size", "1024", "--workers", "1"],
    "examples/port_scenes.py": ["--count", "12", "--size", "1024"],
    "synth": ["--count", "24", "--size", "512"],
}


def blocks(page: str, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall((ROOT / page).read_text()) if language in languages]


def commands(text: str) -> list[list[str]]:
    """Words of each command of a block, without the name of the program."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.partition("  #")[0].partition(" # ")[0])
        words = words[1:] if words[:1] == ["PYTHONPATH=."] else words
        if words[:1] == ["nested-ats"] or words[:2] in (["python", each] for each in QUICKLY):
            found.append(words[1:])
    return found


def runs_here(words: list[str]) -> bool:
    return not any(words[0] == name or any(word.startswith(name) for word in words) for name in NOT_RUN)


def follow(page: str) -> None:
    """Type what a page says in the working directory, from its first line to its last."""
    for language, text in BLOCK.findall((ROOT / page).read_text()):
        if language == "python":
            if named := re.match(r"# (\w+\.py),", text):
                Path(named[1]).write_text(text)
            exec(compile(text, page, "exec"), {})
        for words in filter(runs_here, commands(text) if language in ("", "sh") else []):
            typed(words, page)


def typed(words: list[str], page: str) -> None:
    words = [*words, *QUICKLY.get(words[0], [])]  # of an option that is given twice the last one counts
    if words[0].endswith(".py"):
        subprocess.run([sys.executable, ROOT / words[0], *words[1:]], check=True)
        return
    names = [name for word in words for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    result = CliRunner().invoke(app, names, catch_exceptions=False)
    assert result.exit_code == 0, f"{page}: nested-ats {shlex.join(names)}\n{result.output}"


def folder_with_weights(folder: Path) -> Path:
    torch.manual_seed(0)
    torch.save(MobileNetV2Encoder(in_channels=3).state_dict(), folder / WEIGHTS)
    return folder


def tissue(seed: int, *, nests: bool, side: int = 1024) -> np.ndarray:
    """Pixels of a stained slide: a pink disc on glass, with dark specks where there are nests."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    pixels = np.full((side, side, 3), 240.0) + rng.normal(0, 2, (side, side, 1))
    pixels[np.hypot(y - side / 2, x - side / 2) < side * 0.42] = (215, 130, 170)
    for center in rng.uniform(side * 0.3, side * 0.7, (3 if nests else 0, 2)):
        near = np.hypot(y - center[0], x - center[1]) < 30
        pixels[near & ((y // 4 + x // 4) % 2 == 0)] = (90, 50, 130)
    return (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)


def write_features(folder: Path) -> None:
    """Files of features of twelve slides, as somebody else has extracted them, and their table."""
    rng = np.random.default_rng(0)
    rows = ["slide_id,path,label"]
    coords = np.stack(np.meshgrid(range(0, 2048, 256), range(0, 2048, 256)), -1).reshape(-1, 2)
    for number in range(12):
        bag = Bag(rng.normal(number % 2, 1, (len(coords), 16)).astype(np.float32), coords)
        write_bag(folder / "extracted", "trident", f"e{number}", bag, "")
        place = bag_path(folder / "extracted", "trident", f"e{number}").relative_to(folder)
        rows.append(f"e{number},{place},{('normal', 'tumour')[number % 2]}")
    (folder / "features.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Working directory in which the README has been followed, with two slides and ten more."""
    folder = folder_with_weights(tmp_path_factory.mktemp("bench"))
    (folder / "slides").mkdir()
    rows = ["slide_id,path,label,case_id"]
    for number in range(7, 19):
        pixels = tissue(number, nests=number % 2 == 1)
        tifffile.imwrite(folder / f"slides/{number:03d}.svs", pixels, tile=(256, 256), photometric="rgb")
        rows.append(f"{number:03d},slides/{number:03d}.svs,{('normal', 'tumour')[number % 2]},p{number}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        follow("README.md")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_leads_to_answers(bench):
    rows = read_predictions(bench / "runs/first/test")
    assert {row["status"] for row in rows} == {"ok"}
    assert (bench / "runs/first/report.html").stat().st_size > 100_000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", HOW_TO)
def test_a_page_can_be_followed(name, bench, monkeypatch):
    monkeypatch.chdir(bench)
    monkeypatch.syspath_prepend(bench)
    if name == "folds":
        table = (bench / "labels.csv").read_text()
        (bench / "slides.csv").write_text(table.replace(",label,", ",stain,"))
        pytest.importorskip("pandas").read_csv(bench / "labels.csv", dtype=str)[["slide_id", "label"]].rename(
            columns={"label": "grade"}
        ).to_excel(bench / "clinical.xlsx", index=False)
    if name == "encoders":
        write_features(bench)
    follow(f"docs/{name}.md")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("page", "last"),
    [
        ("tutorial-slides", "runs/first/report.html"),
        ("tutorial-scenes", "runs/first/heatmaps/*/attention.tif"),
        ("tutorial-megapixel", "answers/predictions.csv"),
    ],
)
def test_a_tutorial_can_be_followed(page, last, tmp_path, monkeypatch):
    pytest.importorskip("rasterio")
    monkeypatch.chdir(folder_with_weights(tmp_path))
    tifffile.imwrite(
        "CMU-1-Small-Region.svs", np.tile(tissue(1, nests=False), (2, 2, 1)), tile=(256, 256), photometric="rgb"
    )
    follow(f"docs/{page}.md")
    assert list(tmp_path.glob(last))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_bucket_of_the_slides_tutorial(bench, s3, monkeypatch):  # noqa: F811
    monkeypatch.chdir(bench)
    for slide in Path("slides").glob("*.svs"):
        s3.put(f"slides/{slide.name}", slide.read_bytes())
    table = Path("labels.csv").read_text()
    Path("cloud.csv").write_text(table.replace(",slides/", f",{s3.url}/slides/"))
    pages = "\n".join(blocks("docs/tutorial-slides.md", "", "sh"))
    told = [words for words in commands(pages) if "s3://" in " ".join(words)]
    assert [words[0] for words in told] == ["doctor", "convert", "train"]
    for words in told:
        typed([word.replace("s3://bucket", s3.url) for word in words], "the bucket")
    assert any(key.startswith("model/") for key in s3.objects("runs/cloud"))


def test_what_the_conversion_of_scenes_keeps(tmp_path, monkeypatch):
    """Tutorial of scenes: transform, CRS, names of channels and nodata go along."""
    pytest.importorskip("rasterio")
    monkeypatch.chdir(tmp_path)
    script = [sys.executable, ROOT / "examples/port_scenes.py", "--out", "scenes", "--count", "1", "--size", "256"]
    subprocess.run(script, check=True)
    assert CliRunner().invoke(app, ["convert", "scenes/labels.csv", "--out", "pyramids"]).exit_code == 0
    with Slide("scenes/scene-00.tif") as before, Slide("pyramids/scene-00.ome.zarr") as after:
        assert after.channels == before.channels == ("B02", "B03", "B04", "B08")
        assert after.nodata == before.nodata == 0
        assert after.georeference == before.georeference


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_configurations_on_a_page_are_read(page):
    for text in blocks(f"docs/{page}", "yaml"):
        if text[:1].isspace():
            continue  # a piece of a section, shown by itself
        section = yaml.safe_load(text)
        if isinstance(section, dict) and set(section) <= {"model", "target", "train", "data", "predict"}:
            model = section.get("model", {"kind": "none"})
            if model.get("kind", "ats") == "ats":  # a page may leave out what it does not speak of
                model.setdefault("levels", [{"downsample": 8, "samples": 8}])
            parse_config(section, page)
