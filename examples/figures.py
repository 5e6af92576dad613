"""The paper's figures, drawn from results and attention maps; each is one PNG.

Images are (H, W) grey or (H, W, 3) colour, with values in [0, 1] or uint8. Maps are those of
`experiment.attention_maps`: their cells lie over the image by their pitch, which need not divide it.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from pipeline.files import make_folder, write_atomic

Image = NDArray[Any]
Box = tuple[float, float, float, float]  # y, x, height, width in pixels of the image

_DPI = 100
_COLUMNS = 5  # panels to a line of an evolution


class AttentionMap(NamedTuple):
    """Attention over a whole image.

    Attributes
    ----------
    weights
        (rows, columns), >= 0, summing to one.
    pitch
        Side of a cell in level-0 pixels; cell (i, j) begins at pixel (i, j) times the pitch.
    """

    weights: NDArray[np.float64]
    pitch: float


def normalise(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Stretch attention to [0, 1]: w_i = (a_i - min a) / (max a - min a) (section 4.3.2); zeros where it is flat."""
    low, high = float(weights.min()), float(weights.max())
    return (weights - low) / (high - low) if high > low else np.zeros_like(weights)


def over_image(attention: AttentionMap, shape: tuple[int, int]) -> NDArray[np.float64]:
    """(H, W): for every pixel of an image of this shape, the weight of the cell that its centre lies in."""
    places = [((np.arange(side) + 0.5) / attention.pitch).astype(int) for side in shape]
    rows, columns = (np.minimum(p, n - 1) for p, n in zip(places, attention.weights.shape, strict=True))
    return attention.weights[np.ix_(rows, columns)]


def weigh(image: Image, attention: AttentionMap) -> NDArray[np.float64]:
    """(H, W, 3) in [0, 1]: every cell's patch of the image multiplied by its normalised weight."""
    weights = normalise(over_image(attention, (image.shape[0], image.shape[1])))
    return colours(image) * weights[..., None]


def colours(image: Image) -> NDArray[np.float64]:
    """(H, W, 3) in [0, 1] of an image, grey or in colour, uint8 or in [0, 1]."""
    values = image / 255 if image.dtype == np.uint8 else image.astype(float)
    return np.repeat(values[..., None], 3, -1) if values.ndim == 2 else values[..., :3]


def error_and_loss_against_time(results: Sequence[Any], path: Path) -> None:
    """Training loss and test error against the seconds of training (figure 2), means over the runs of a method.

    Parameters
    ----------
    results
        Of `experiment.run_experiment`.
    path
        PNG to write.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for method in dict.fromkeys(result.method for result in results):
        runs = [{p.epoch: p for p in result.points} for result in results if result.method == method]
        epochs = sorted(set.intersection(*(set(run) for run in runs)))
        seconds = [statistics.fmean(run[epoch].seconds for run in runs) for epoch in epochs]
        for panel, name in zip(panels, ("train_loss", "test_error"), strict=True):
            values = [[getattr(run[epoch], name) for run in runs] for epoch in epochs]
            panel.plot(seconds, [statistics.fmean(v) for v in values], marker=".", label=method)
            panel.fill_between(seconds, [min(v) for v in values], [max(v) for v in values], alpha=0.15)
    for panel, title in zip(panels, ("Training loss", "Test error"), strict=True):
        panel.set(xlabel="seconds of training", title=title, xscale="log")
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=0)
    panels[1].legend()
    _write(figure, path)


def attention_evolution(
    image: Image,
    maps: Mapping[int, AttentionMap],
    path: Path,
    *,
    marks: Sequence[tuple[float, float]] = (),
    box: Box | None = None,
) -> None:
    """The attention of one image as training goes on (figure 3).

    Parameters
    ----------
    image
        Whole, at full resolution.
    maps
        By epoch.
    path
        PNG to write.
    marks
        y and x of what should be found, dotted red in the image.
    box
        Part to show; the whole image by default.
    """
    y, x, height, width = box or (0, 0, *image.shape[:2])
    lines = math.ceil((len(maps) + 1) / _COLUMNS)
    size = (2 * _COLUMNS, (2 * height / width + 0.3) * lines)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, _COLUMNS, squeeze=False).flatten()
    panels[0].imshow(colours(image), interpolation="nearest")
    panels[0].set_title("image", fontsize=9)
    panels[0].scatter([m[1] for m in marks], [m[0] for m in marks], s=8, c="red")
    for panel, (epoch, attention) in zip(panels[1:], maps.items(), strict=False):
        shown = over_image(attention, (image.shape[0], image.shape[1]))
        part = shown[int(y) : math.ceil(y + height), int(x) : math.ceil(x + width)]
        panel.imshow(shown, cmap="viridis", vmin=part.min(), vmax=part.max(), interpolation="nearest")
        panel.set_title(f"epoch {epoch}", fontsize=9)
    for panel in panels[: len(maps) + 1]:
        panel.set(xlim=(x, x + width), ylim=(y + height, y), xticks=[], yticks=[])
    for panel in panels[len(maps) + 1 :]:
        panel.axis("off")
    _write(figure, path)


def attention_beside(
    image: Image,
    maps: Mapping[str, AttentionMap],
    boxes: Sequence[Box],
    path: Path,
    *,
    patches: Sequence[Image] = (),
) -> None:
    """The image, its ground truth, and it times the attention of each method (figures 4, 5, 8 and 9).

    Parameters
    ----------
    image
        Whole, at full resolution.
    maps
        By method.
    boxes
        Of the objects that were to be found; all else is black in the second panel. No such panel where there are
        none.
    path
        PNG to write.
    patches
        Shown in a row below.
    """
    panels: dict[str, NDArray[np.float64]] = {"image": colours(image)}
    if boxes:
        inside = np.zeros(image.shape[:2], bool)
        for y, x, height, width in boxes:
            inside[max(int(y), 0) : math.ceil(y + height), max(int(x), 0) : math.ceil(x + width)] = True
        panels["ground truth"] = colours(image) * inside[..., None]
    panels |= {name: weigh(image, attention) for name, attention in maps.items()}
    tall = 3 * image.shape[0] / image.shape[1] + 0.4
    figure = Figure(figsize=(3 * len(panels), tall + (1.5 if patches else 0)), layout="constrained")
    parts = figure.subfigures(1 + bool(patches), 1, squeeze=False, height_ratios=[tall, *[1.5] * bool(patches)])[:, 0]
    for panel, (name, pixels) in zip(
        parts[0].subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        panel.imshow(pixels, interpolation="nearest")
        panel.set_title(name, fontsize=9)
        panel.set(xticks=[], yticks=[])
    for y, x, height, width in boxes:
        parts[0].axes[0].add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="red", linewidth=1))
    if patches:
        for panel, patch in zip(parts[1].subplots(1, len(patches), squeeze=False)[0], patches, strict=True):
            panel.imshow(colours(patch), interpolation="nearest")
            panel.axis("off")
    _write(figure, path)


def attention_grid(rows: Mapping[str, Sequence[AttentionMap]], path: Path, *, columns: Sequence[str] = ()) -> None:
    """Maps in a grid, a row for each label, each stretched to its own range (figures 6 and 7).

    Parameters
    ----------
    rows
        Maps by label, such as an entropy weight or a number of patches; as many in each row.
    path
        PNG to write.
    columns
        Heads of the columns, such as epochs.
    """
    width = max(len(maps) for maps in rows.values())
    figure = Figure(figsize=(1.6 * width + 0.6, 1.7 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), width, squeeze=False)
    for line, (label, maps) in zip(panels, rows.items(), strict=True):
        line[0].set_ylabel(label, fontsize=9)
        for panel, attention in zip(line, maps, strict=True):
            panel.imshow(attention.weights, cmap="viridis", interpolation="nearest")
            panel.set(xticks=[], yticks=[])
    for panel, head in zip(panels[0], columns, strict=False):
        panel.set_title(head, fontsize=9)
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    figure.set_dpi(_DPI)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    make_folder(path.parent)
    write_atomic(path, buffer.getvalue())
