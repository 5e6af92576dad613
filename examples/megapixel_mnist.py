"""Megapixel MNIST (section 4.2 of the paper): attention sampling with several budgets, and a CNN; figures 2 and 3.

    python examples/megapixel_mnist.py --digits ../shared/data/mnist --out runs/mnist --quick
    python examples/megapixel_mnist.py --table examples/results/megapixel_mnist-quick.json --quick

Without --quick it is the paper's experiment, for a GPU: 1500 x 1500 pixels, 50 noise patches, 5,000 training and 1,000
test images, 500 epochs, 5 runs. --digits is a folder with MNIST's IDX files; where it has the test set alone, the
first 8,000 of its digits make the training images and the other 2,000 the test images. Without --digits they are
scikit-learn's. What the paper leaves open (batch size, strides of the CNN, noise) is as in the configuration, in
`nested_ats.networks.builtin` and in `example_data.mnist`. What differs from the paper:

- Patches are drawn by `pivotal`, not by the paper's sampling without replacement (``desraj`` in `nested_ats`);
  features are scaled before the head.
- The feature network ends with 32 channels and begins with 16; the authors' code has four convolutions of 32.
- Batches of 32 images, where the authors' code has 128 and an entropy weight of 1e-4 by default (0.01 here, as in H.1).
- The attention sees downsample 8 of a true pyramid, 188 x 188 pixels; --view pasted is the authors' 180 x 180.
- Networks have group normalisation where the paper's have batch normalisation.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from commands import run
from conduct import command_line, conduct, with_attention
from example_data.mnist import DIGIT, VIEW, load_pools, mnist_scene
from example_data.mnist_files import write_megapixel_mnist
from experiment import Experiment, Method, Paper, Result, attention_maps
from figures import attention_evolution, error_and_loss_against_time

from pipeline.data.manifest import Entry
from pipeline.errors import UsageError
from pipeline.interrupt import RESUMABLE, run_main
from pipeline.progress import progress
from storage import Slide

View = Literal["pyramid", "pasted"]


@dataclass(frozen=True)
class Data:
    """What the images are."""

    size: int  # side in pixels
    noise: int  # patches of noise to an image
    train: int  # images
    test: int
    view: View  # what the attention sees: a level of a true pyramid, or the authors' pasted view
    digits: str = ""  # where they are from, in words


FULL = Data(size=1500, noise=50, train=5000, test=1000, view="pyramid")
QUICK = Data(size=384, noise=8, train=2000, test=500, view="pyramid")


def build(data: Data, *, quick: bool) -> Experiment:
    """Return the experiment: the paper's, or the one that a CPU does in minutes."""
    config = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    model = config.pop("model")
    level = model["levels"][0] | _level(data, quick=quick)
    budgets = (5, 10, 25) if quick else (5, 10, 25, 50, 100)
    methods = [
        Method(
            f"ATS-{n}",
            _scale(data, level),
            {"model": model | {"levels": [level | {"samples": n}]}},
            Paper(test_error="about 0.2" if n == 5 else ""),  # section 4.2.2; there is no table
        )
        for n in budgets
    ]
    pixels = {"mean": model["mean"], "std": model["std"]}
    cnn: dict[str, Any] = {"model": {"kind": "cnn", "encoder": "resnet16", "features": 32, **pixels}}
    if quick:
        # A quarter of the width and few epochs: about the time that ATS-10 has.
        cnn = {"model": cnn["model"] | {"features": 8}, "train": {"epochs": 5}}
        config["train"] |= {"epochs": 28, "batch_size": 16}
    else:
        config["train"] |= {"epochs": 500}
    methods.append(Method("CNN", "1", cnn, Paper(test_error="about 0.4")))  # section 4.2.1
    return Experiment(
        name=f"megapixel_mnist{'-quick' if quick else ''}{'-pasted' if data.view == 'pasted' else ''}",
        title=_title(data, quick=quick),
        base=config,
        methods=tuple(methods),
        runs=1 if quick else 5,
        stages=(1, 2, 4, 8, 12, 20) if quick else (1, 2, 5, 10, 15, 25, 50, 100, 200, 300, 400),
    )


def _title(data: Data, *, quick: bool) -> str:
    images = f"{data.size} x {data.size} pixels, {data.noise} noise patches, {data.view} view"
    counts = f"{data.train} training and {data.test} test images" + (f" of {data.digits}" if data.digits else "")
    narrow = "; quick: CNN of 8 channels instead of 32" if quick else ""
    return f"Megapixel MNIST, {images}, {counts}{narrow}"


def _level(data: Data, *, quick: bool) -> dict[str, Any]:
    """What the attention sees: about 180 x 180 cells of 1500 x 1500 pixels, 48 x 48 of 384 x 384."""
    if data.view == "pasted":
        return {"downsample": data.size / round(VIEW * data.size), "stride": 1}
    return {"downsample": 4, "stride": 2} if quick else {"downsample": 8, "stride": 1}


def _scale(data: Data, level: dict[str, Any]) -> str:
    return f"{VIEW if data.view == 'pasted' else 1 / level['downsample']:.3g}/1"


def make_data(data: Data, digits: Path | None, out: Path) -> Path:
    """Make the images, and for a true pyramid convert them; return the manifest."""
    folder = out / "images"
    with progress("synth") as update:
        manifest = write_megapixel_mnist(
            folder,
            **digit_files(digits),
            size=data.size,
            train=data.train,
            test=data.test,
            noise=data.noise,
            view=data.view,
            progress=lambda done, total: update(done, total, ""),
        )
    if data.view == "pasted":
        return manifest
    run("convert", manifest, "--out", out / "pyramids")
    return out / "pyramids" / "manifest.csv"


def digit_files(folder: Path | None) -> dict[str, Any]:
    """The arguments that name the digits: MNIST's two pairs of files, or its test pair alone.

    Raises
    ------
    UsageError
        The folder has no test images.
    """
    if folder is None:
        return {}
    files: dict[str, Path] = {}
    for part, names in {"train": ("images", "labels"), "t10k": ("test_images", "test_labels")}.items():
        for name, kind in zip(names, ("images-idx3", "labels-idx1"), strict=True):
            found = sorted(folder.glob(f"{part}-{kind}-ubyte*"))
            files |= {name: found[0]} if found else {}
    if "test_images" not in files:
        raise UsageError(f"{folder}: no t10k-images-idx3-ubyte.gz; give the folder of MNIST's files")
    if "images" in files:
        return files
    return {name.removeprefix("test_"): path for name, path in files.items()}


def name_digits(files: Mapping[str, Path]) -> str:
    """Say where the digits of `digit_files` are from."""
    if not files:
        return "scikit-learn's digits"
    return "MNIST's digits" if "test_images" in files else "MNIST's test digits (8,000 to train, 2,000 to test)"


def draw(
    experiment: Experiment,
    results: Sequence[Result],
    watched: Entry,
    data: Data,
    digits: Path | None,
    out: Path,
    folder: Path,
) -> None:
    """Draw figures 2 and 3; the latter for ATS-10, or for the first ATS method where that was not run."""
    error_and_loss_against_time(results, folder / f"{experiment.name}-figure2.png")
    methods = with_attention(experiment, out)
    if not methods:
        return
    method = next((method for method in methods if method.name == "ATS-10"), methods[0])
    test = load_pools(**digit_files(digits))[1]
    index = int(watched.slide_id.rpartition("-")[2])
    scene = mnist_scene(index, seed=0, pool=test, size=data.size, noise=data.noise)
    marks = [(digit.y + DIGIT / 2, digit.x + DIGIT / 2) for digit in scene.digits]
    maps = attention_maps(out, method.key, watched.slide_id)
    with Slide(watched.path) as slide:
        image = slide.read(0, (0, 0, *slide.shape_yx))[0]
    attention_evolution(image, maps, folder / f"{experiment.name}-figure3.png", marks=marks)


def main() -> None:
    """Make the set, run the experiment, print its table and draw its figures."""
    parser = command_line((__doc__ or "").splitlines()[0], out="runs/mnist")
    parser.add_argument("--digits", type=Path, help="folder of MNIST's IDX files")
    parser.add_argument("--view", choices=["pyramid", "pasted"], default="pyramid", help="what the attention sees")
    parser.add_argument("--size", type=int, help="side of an image in pixels")
    parser.add_argument("--noise", type=int, help="noise patches to an image")
    parser.add_argument("--train", type=int, help="training images")
    parser.add_argument("--test", type=int, help="test images")
    chosen = parser.parse_args()
    data = _data(chosen)
    experiment = build(data, quick=chosen.quick)

    def watch(entries: Sequence[Entry]) -> list[Entry]:
        return [entry for entry in entries if entry.split == "test"][:1]

    def figures(results: Sequence[Result], watched: Sequence[Entry], folder: Path) -> None:
        draw(experiment, results, watched[0], data, chosen.digits, chosen.out, folder)

    conduct(experiment, chosen, lambda: make_data(data, chosen.digits, chosen.out), watch, figures)


def _data(chosen: argparse.Namespace) -> Data:
    """Resolve the options."""
    given = {name: getattr(chosen, name) for name in ("size", "noise", "train", "test", "view")}
    data = replace(
        QUICK if chosen.quick else FULL, **{name: value for name, value in given.items() if value is not None}
    )
    return replace(data, digits=name_digits(digit_files(chosen.digits)))


if __name__ == "__main__":
    run_main(main, RESUMABLE)
