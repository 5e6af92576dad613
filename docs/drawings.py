"""Draw the six pictures of docs/concepts.md from a trained model and one image: what it sees, draws and answers.

Those that are committed are of the model that `make demo` trains, and of one of its test scenes:

    python docs/drawings.py demo/run/model demo/pyramids/signs-00702.ome.zarr

Nothing in them is made up: every share, weight and interval is what the model gave for that scene.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from nested_ats import Image, NestedATS, Output, load_model, predict
from nested_ats.images import find_level
from nested_ats.phases import Phase, take_all
from pipeline.data.slides import SlideImage
from pipeline.files import make_folder, write_atomic
from pipeline.interrupt import run_main
from pipeline.results.pictures import to_file
from storage import Slide

DRAWS = 4  # of a prediction, as `predict` has it unless it is told otherwise
INTERVALS = 50  # predictions of as many draws, on the last picture
ORANGE, BLUE, GREY = "#ea580c", "#1d4ed8", "#64748b"


class Scene(NamedTuple):
    """An image, as a model of two levels sees it.

    Attributes
    ----------
    pixels : (H, W, 3), the finest level
    coarse : (h, w, 3), what the first level looks at
    phases : of one draw: regions, then patches
    """

    pixels: NDArray[Any]
    coarse: NDArray[Any]
    phases: tuple[Phase, Phase]


def drawings(model: NestedATS, image: Image, classes: list[str]) -> Iterator[tuple[str, Figure]]:
    """Draw an image of some megapixels at most; yields the name of each picture, and the picture."""
    model.eval()
    with torch.no_grad():
        regions, patches = model([image], keys=torch.tensor([0])).phases
    coarse = find_level(image, model.config.levels[0].downsample)
    scene = Scene(look(image, 0), look(image, coarse), (regions, patches))
    yield "1-coarse", draw_coarse(scene)
    yield "2-attention", draw_attention(scene)
    yield "3-regions", draw_regions(scene)
    yield "4-closer", draw_closer(scene)
    yield "5-patches", draw_patches(scene, model.config.patch_size)
    yield "6-answers", draw_answers(model, image, classes)


def look(image: Image, level: int) -> NDArray[Any]:
    """Read a whole level to show, (H, W, 3)."""
    height, width = image.shapes[level]
    pixels = image.read(level, torch.tensor([[0, 0, height, width]]))[0]
    return np.moveaxis(pixels.numpy(), 0, -1)


def draw_coarse(scene: Scene) -> Figure:
    """Show the image, and the few pixels that the first level sees of it."""
    figure, (left, right) = panels(2)
    for axes, pixels, words in (
        (left, scene.pixels, "the image"),
        (right, scene.coarse, "what the first level sees"),
    ):
        axes.imshow(pixels, interpolation="nearest")
        axes.set_title(f"{words}: {pixels.shape[0]} x {pixels.shape[1]} pixels", fontsize=9)
    return figure


def draw_attention(scene: Scene) -> Figure:
    """Show the attention of the first level: a share for each region, all shares together one."""
    figure, (axes,) = panels(1)
    axes.imshow(scene.pixels, alpha=0.5)
    population = scene.phases[0].population
    shares = population.log_attention[0, 0].exp()
    for share, center in zip(shares.tolist(), population.centers_l0[0, 0].tolist(), strict=True):
        box(axes, center, population.extent_l0, facecolor=(*rgb(ORANGE), 0.75 * share**0.5), edgecolor="white")
        label(axes, center, population.extent_l0, f"{share:.1%}")
    return figure


def draw_regions(scene: Scene) -> Figure:
    """Show which regions were drawn, each with its z; the others are dark, and will not be read."""
    figure, (axes,) = panels(1)
    axes.imshow(darker(scene.pixels))
    phase = scene.phases[0]
    for center, z in zip(phase.centers_l0[0].tolist(), phase.z[0].tolist(), strict=True):
        reveal(axes, scene.pixels, center, phase.population.extent_l0)
        box(axes, center, phase.population.extent_l0, edgecolor=ORANGE, linewidth=2)
        label(axes, center, phase.population.extent_l0, f"z = {z:.1f}")
    return figure


def draw_closer(scene: Scene) -> Figure:
    """Show the cells in the opened regions, by their weight among all from which patches are drawn."""
    figure, (axes,) = panels(1)
    axes.imshow(darker(scene.pixels))
    phase = scene.phases[0]
    for center in phase.centers_l0[0].tolist():
        reveal(axes, scene.pixels, center, phase.population.extent_l0)
    below = scene.phases[1]
    weights = below.carry[0][:, None] * below.population.log_attention[0].exp()
    top = float(weights.max())
    centers = below.population.centers_l0[0].flatten(0, 1).tolist()
    for weight, center in zip(weights.flatten().tolist(), centers, strict=True):
        if weight:
            strength = 0.85 * (weight / top) ** 0.5
            box(axes, center, below.population.extent_l0, facecolor=(*rgb(ORANGE), strength), edgecolor="#ffffff40")
    return figure


def draw_patches(scene: Scene, side: int) -> Figure:
    """Show the patches at full size, the heaviest first, with what they count."""
    phase = scene.phases[1]
    weights = (phase.z * phase.attention)[0]
    figure, row = panels(len(weights), width=1.2)
    padded = np.pad(scene.pixels, ((side, side), (side, side), (0, 0)))
    for axes, unit in zip(row, weights.argsort(descending=True).tolist(), strict=True):
        y, x = (round(place + side / 2) for place in phase.centers_l0[0, unit].tolist())
        axes.imshow(padded[y : y + side, x : x + side])
        axes.set_title(f"{float(weights[unit]):.1%}", fontsize=9)
    return figure


def draw_answers(model: NestedATS, image: Image, classes: list[str]) -> Figure:
    """Show how answers scatter over draws around that of the model that draws nothing, and what intervals say."""
    truth = everything(model, image).logits[0]
    answer = int(truth.argmax())
    found = [
        predict(model, [image], torch.arange(start, start + DRAWS)[None])
        for start in range(0, INTERVALS * DRAWS, DRAWS)
    ]
    figure, (left, right) = panels(2, bare=False)
    logits = torch.cat([output.logits[:, answer] for each in found for output in each.outputs])
    left.hist(logits.numpy(), bins=30, color=GREY)
    left.axvline(float(logits.mean()), color=BLUE, label="their mean")
    left.axvline(float(truth[answer]), color=ORANGE, linestyle="--", label="nothing drawn: all patches")
    left.set(xlabel=f"logit of {classes[answer]!r}", ylabel=f"single draws, of {len(logits)}")
    left.margins(y=0.3)
    left.legend(loc="upper left", fontsize=7)
    exact = float(truth.softmax(-1)[answer])
    low, high = (torch.stack([getattr(each, end)[0, answer] for each in found]) for end in ("low", "high"))
    hit = (low <= exact) & (exact <= high)
    for number, (start, end) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        right.plot([start, end], [number, number], color=GREY if hit[number] else "#dc2626", linewidth=1.5)
    right.axvline(exact, color=ORANGE, linestyle="--")
    right.set(xlabel=f"probability of {classes[answer]!r}", ylabel=f"predictions of {DRAWS} draws each", yticks=[])
    right.set_title(f"{int(hit.sum())} of {len(hit)} intervals hold the dashed line", fontsize=9)
    right.locator_params(axis="x", nbins=4)
    return figure


@torch.no_grad()
def everything(model: NestedATS, image: Image) -> Output:
    """The model that draws nothing: every region is opened, every patch encoded."""
    return model.forward([image], torch.tensor([0]), sampler=take_all)


def panels(count: int, *, width: float = 3.6, bare: bool = True) -> tuple[Figure, list[Axes]]:
    """Make a figure of so many panels side by side, in inches."""
    figure = Figure(figsize=(count * width, width + 0.3), dpi=100, layout="constrained")
    row = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in row if bare else []:
        axes.set_axis_off()
    return figure, row


def box(axes: Axes, center: list[float], side: float, **style: Any) -> None:
    """Add a square to an image of the finest level."""
    y, x = (place - side / 2 - 0.5 for place in center)
    axes.add_patch(Rectangle((x, y), side, side, **{"facecolor": "none", **style}))


def reveal(axes: Axes, pixels: NDArray[Any], center: list[float], side: float) -> None:
    """Show a square of the image as bright as it is."""
    y, x = (max(0, round(place - side / 2)) for place in center)
    part = pixels[y : y + round(side), x : x + round(side)]
    axes.imshow(part, extent=(x - 0.5, x + part.shape[1] - 0.5, y + part.shape[0] - 0.5, y - 0.5))
    axes.set(xlim=(-0.5, pixels.shape[1] - 0.5), ylim=(pixels.shape[0] - 0.5, -0.5))


def label(axes: Axes, center: list[float], side: float, words: str) -> None:
    """Write words into the corner of a square, to be read over any image."""
    y, x = (place - 0.44 * side for place in center)
    axes.text(x, y, words, va="top", fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})


def darker(pixels: NDArray[Any]) -> NDArray[Any]:
    """Show a quarter of the light."""
    return (pixels * 0.25).astype(pixels.dtype)


def rendered(figure: Figure) -> NDArray[Any]:
    """Turn a figure into pixels, (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def rgb(color: str) -> tuple[float, float, float]:
    """Split #rrggbb into three numbers from 0 to 1."""
    red, green, blue = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return red, green, blue


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model of two levels, as demo/run/model")
    parser.add_argument("slide", help="image or pyramid, of some megapixels at most")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "concepts")
    args = parser.parse_args()
    model, classes = load_model(args.model)
    make_folder(args.out)
    with Slide(args.slide) as slide:
        for name, figure in drawings(model, SlideImage(slide), classes):
            write_atomic(args.out / f"{name}.jpg", to_file(rendered(figure), "JPEG"))


if __name__ == "__main__":
    run_main(main)
