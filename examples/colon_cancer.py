"""Colon cancer (section 4.3 of the paper): table 1, figures 4 and 8, and the ablations of appendices E and F.

    python examples/colon_cancer.py --data CRCHistoPhenotypes_2016_04_28/Classification --out runs/colon
    python examples/colon_cancer.py --quick --out runs/colon-quick
    python examples/colon_cancer.py --quick --ablation entropy --out runs/colon-quick

--data is the published folder, to be downloaded by hand (`example_data.published`); without it --quick makes images of its
own in that layout. Without --quick it is the paper's experiment, for a GPU: 30,000 updates, 5 runs. What differs from
the paper, or is not in it:

- The attention sees the image at downsample 4, the level of a pyramid that is nearest to the paper's 5.
- A fifth of the images, drawn for each run by its seed, class by class, is the test set; the paper names no split.
- A step is one image: 30,000 updates are then 375 epochs, in keeping with the hundreds that appendices E and F show.
- Contrast by up to 20 % and brightness by up to 0.1, the ranges of the authors' published code; contrast there is about
  black, here about mid-grey, and one image in five is left as it is there.
- Patches are drawn by `pivotal`, not by the paper's sampling without replacement (``desraj`` in `nested_ats`);
  features are scaled before the head.
- Networks have group normalisation where the paper's have batch normalisation, and the network of Ilse et al. drops
  nothing (`nested_ats.networks.builtin`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conduct import command_line, conduct, convert_published, data_folder, with_attention
from example_data.published import EPITHELIAL, colon_cancer, colon_cancer_points
from experiment import Experiment, Method, Paper, Result, attention_maps
from figures import Box, attention_beside, attention_grid
from made import write_colon_cancer

from pipeline.data.manifest import Entry
from pipeline.data.splits import assign_splits
from pipeline.interrupt import RESUMABLE, run_main
from storage import Slide

PATCH = 27  # pixels, those of Ilse et al.
IMAGES = 100  # made for --quick; as many as were published
TEST = 0.2  # share of the images
WATCHED = 3  # test images whose attention is kept

PAPER = {
    "U-10": Paper("0.210 ± 0.031", "0.156 ± 0.006", "1.8 ms", "19 MB"),
    "U-50": Paper("0.075 ± 0.000", "0.124 ± 0.010", "4.6 ms", "24 MB"),
    "CNN 0.5": Paper("0.002 ± 0.000", "0.104 ± 0.009", "4.8 ms", "65 MB"),
    "CNN 1": Paper("0.002 ± 0.000", "0.092 ± 0.012", "18.7 ms", "250 MB"),
    "Deep MIL": Paper("0.007 ± 0.000", "0.093 ± 0.004", "48.5 ms", "644 MB"),
    "ATS-10": Paper("0.083 ± 0.019", "0.093 ± 0.014", "1.8 ms", "21 MB"),
    "ATS-50": Paper("0.028 ± 0.002", "0.093 ± 0.019", "4.5 ms", "26 MB"),
}


def build(*, quick: bool, made: bool) -> Experiment:
    """Return the experiment of table 1: the paper's, or the one that a CPU does in minutes."""
    patch = _patch(quick=quick)
    stride, channels = (25, 8) if quick else (10, 32)
    mil = {"kind": "deepmil", "stride": stride, **patch}
    pixels = {name: patch[name] for name in ("mean", "std")}
    # The paper regularises attention sampling alone. In the few large steps of --quick, 1e-3 stops Deep MIL dead.
    mil_training = {"entropy_weight": 0, **({"learning_rate": 3e-4} if quick else {})}

    def uniform(n: int) -> Method:
        return Method(f"U-{n}", "0.25/1", {"model": {"kind": "uniform", "samples": n, "cell": 4, **patch}})

    def cnn(downsample: int) -> Method:
        model = {"kind": "cnn", "encoder": "resnet8", "features": channels, "downsample": downsample, **pixels}
        return Method("CNN", f"{1 / downsample:g}", {"model": model})

    methods = [
        uniform(10),
        uniform(50),
        cnn(2),
        cnn(1),
        Method("Deep MIL", "1", {"model": mil, "train": mil_training}),
    ]
    methods += [_ats(10, quick=quick), _ats(50, quick=quick)]
    papers = [PAPER.get(method.name) or PAPER[method.key] for method in methods]
    return Experiment(
        name=f"colon_cancer{'-quick' if quick else ''}",
        title=_title(quick=quick, made=made, what=f"Deep MIL sees {(500 // stride) ** 2} patches"),
        base=_base(quick=quick),
        methods=tuple(replace(method, paper=paper) for method, paper in zip(methods, papers, strict=True)),
        runs=1 if quick else 5,
    )


def build_ablation(what: str, *, quick: bool, made: bool) -> Experiment:
    """Return the experiment of appendix E (`what` is "entropy") or F ("patches")."""
    if what == "entropy":
        methods = [
            replace(_ats(10, quick=quick, entropy=weight), name=f"ATS-10, lambda {weight:g}")
            for weight in (0, 0.01, 0.1, 1)
        ]
        epochs, stages = (12, (1, 3, 6, 9)) if quick else (60, (1, 5, 10, 20, 40))
    else:
        methods = [replace(_ats(n, quick=quick), name=f"ATS, {n} patches") for n in (5, 10, 25, 50)]
        epochs, stages = (12, (1, 3, 6, 9)) if quick else (150, (1, 10, 30, 60, 100))
    base = _base(quick=quick)
    base["train"]["epochs"] = epochs
    return Experiment(
        name=f"colon_cancer-{what}{'-quick' if quick else ''}",
        title=_title(quick=quick, made=made, what=f"appendix {'E' if what == 'entropy' else 'F'}"),
        base=base,
        methods=tuple(methods),
        runs=1,
        stages=stages,
    )


def _base(*, quick: bool) -> dict[str, Any]:
    train: dict[str, Any] = {"epochs": 375, "batch_size": 1, "learning_rate": 1e-3, "entropy_weight": 0.01}
    train["augment"] = {"brightness": 0.1, "contrast": 0.2}
    if quick:
        train |= {"epochs": 20, "batch_size": 4}
    return {"train": train, "data": {"background": 1.0, "test": TEST}, "predict": {"draws": 1}}


def _patch(*, quick: bool) -> dict[str, Any]:
    """What all models share that see patches; means and spreads are those of stained tissue on white."""
    encoder = {"name": "ilse", "features": 64} if quick else "ilse"
    return {"patch_size": PATCH, "encoder": encoder, "mean": 0.7, "std": 0.2}


def _ats(samples: int, *, quick: bool, entropy: float | None = None) -> Method:
    """Attention sampling: three convolutions, 8 channels, one cell for each pixel of the view."""
    level = {"downsample": 4, "samples": samples, "stride": 1, "channels": [8, 8]}
    settings: dict[str, Any] = {"model": {"levels": [level], **_patch(quick=quick)}}
    if entropy is not None:
        settings["train"] = {"entropy_weight": entropy}
    return Method(f"ATS-{samples}", "0.25/1", settings)


def _title(*, quick: bool, made: bool, what: str) -> str:
    data = f"{IMAGES} made images in the layout of the published ones" if made else "the published images"
    width = (
        "; quick: 64 features instead of 512, CNN of 8 channels instead of 32, Deep MIL's rate 3e-4" if quick else ""
    )
    return f"Colon cancer, {data}, 500 x 500 pixels, a fifth of them to test; {what}{width}"


def draw(experiment: Experiment, watched: Sequence[Entry], data: Path, out: Path, folder: Path) -> None:
    """Draw each watched image beside its epithelial cells and the attention of each method (figures 4 and 8)."""
    points = colon_cancer_points(data)
    methods = with_attention(experiment, out)
    for number, entry in enumerate(watched if methods else ()):
        maps = {m.name: list(attention_maps(out, m.key, entry.slide_id).values())[-1] for m in methods}
        boxes: list[Box] = [(y - PATCH / 2, x - PATCH / 2, PATCH, PATCH) for y, x in points[entry.slide_id]]
        with Slide(entry.path) as slide:
            image = slide.read(0, (0, 0, *slide.shape_yx)).transpose(1, 2, 0)
        attention_beside(image, maps, boxes, folder / f"{experiment.name}-figure8-{number}.png")


def draw_ablation(experiment: Experiment, watched: Sequence[Entry], out: Path, folder: Path) -> None:
    """Draw the attention of one image as training goes on, a row for each method (figures 6 and 7)."""
    methods = with_attention(experiment, out)
    if not (methods and watched):
        return
    rows = {method.name: attention_maps(out, method.key, watched[0].slide_id) for method in methods}
    epochs = [f"epoch {epoch}" for epoch in next(iter(rows.values()))]
    grid = {name: list(maps.values()) for name, maps in rows.items()}
    attention_grid(grid, folder / f"{experiment.name}.png", columns=epochs)


def watch(entries: Sequence[Entry]) -> list[Entry]:
    """Images with epithelial cells that the runs of seed 0 test."""
    entries = assign_splits(entries, validation=0, test=TEST, seed=0)
    return [entry for entry in entries if entry.split == "test" and entry.label == EPITHELIAL][:WATCHED]


def main() -> None:
    """Get the data, run the experiment, print its table and draw its figures."""
    parser = command_line(
        (__doc__ or "").splitlines()[0], out="runs/colon", data="the published folder, with img1, img2, ..."
    )
    parser.add_argument("--ablation", choices=["entropy", "patches"], help="appendix E or F instead of table 1")
    chosen = parser.parse_args()
    what = {"quick": chosen.quick, "made": chosen.data is None}
    experiment = build_ablation(chosen.ablation, **what) if chosen.ablation else build(**what)

    def figures(_: Sequence[Result], watched: Sequence[Entry], folder: Path) -> None:
        if chosen.ablation:
            draw_ablation(experiment, watched, chosen.out, folder)
        else:
            draw(experiment, watched, data_folder(chosen), chosen.out, folder)

    def make(folder: Path) -> Path:
        return write_colon_cancer(folder, images=IMAGES)

    conduct(experiment, chosen, lambda: convert_published(chosen, make, colon_cancer), watch, figures)


if __name__ == "__main__":
    run_main(main, RESUMABLE)
