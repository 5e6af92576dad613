"""What a user's own sixty slides teach: AUC pooled over three folds, by the README's commands and by the usual way.

The slides are those of `examples/sixty_slides.py`; the configuration is `examples/histology.yaml` with what the arm's
name says. *attention over all tiles* is what one does without us: the same frozen network encodes every tile with
tissue, and gated attention pools them (Ilse et al. 2018), in plain torch. Nothing is chosen by a test fold: all train
for a fixed number of epochs.

A fold's scores are written to the result file when it is done, and a rerun does only what is missing. Seconds are of
training, with features of tiles kept by nothing that ran before: each arm of each seed has a store of its own for the
three folds, and the time of encoding all tiles is shared by the three folds likewise.

    python benchmarks/sixty_slides_auc.py --svs CMU-1-Small-Region.svs --weights mobilenet_v2-b0353104.pth
                                          --work FOLDER [--arms ...] [--seeds 0 1 2] [--results FILE] [--show]
                                          [--quick]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from made_with import made_with, print_versions
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from nested_ats import Mask
from nested_ats.networks.encoders import build_encoder
from nested_ats.networks.presets import IMAGENET_MEAN, IMAGENET_STD
from pipeline.data.manifest import Entry
from pipeline.data.slides import SlideImage
from pipeline.data.tissue import find_mask
from pipeline.files import write_json
from pipeline.interrupt import RESUMABLE, run_main
from storage import Slide

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sixty_slides_cpu.json"
CONFIG = HERE.parent / "examples" / "histology.yaml"
FOLDS = 3
TILE = 64  # pixels
ONE_LEVEL = "model.levels=[{downsample: 8, stride: 8, samples: 32, channels: [16, 16]}]"
ALL_TILES = "attention over all tiles"
ARMS: dict[str, list[str]] = {
    "two levels": ["model.prior=tissue", "train.early_samples=1"],
    "one level": [ONE_LEVEL, "model.prior=tissue", "train.early_samples=1"],
    "two levels, four times the samples early": ["model.prior=tissue", "train.early_samples=4"],
    "two levels, no tissue prior": ["model.prior=none", "train.early_samples=4"],
    "one level, no tissue prior": [ONE_LEVEL, "model.prior=none", "train.early_samples=4"],
    "two levels, no tissue prior, bfloat16": [
        "model.prior=none",
        "train.early_samples=4",
        "train.precision=bfloat16",
        "predict.precision=bfloat16",
    ],
    "two levels, features as they are": ["model.prior=tissue", "train.early_samples=1", "model.standardise=false"],
    ALL_TILES: [],
}


def command(*words: object) -> None:
    """Run nested-ats as a user does; what it says is shown where it fails."""
    words = (Path(sys.executable).with_name("nested-ats"), *words)
    done = subprocess.run([*map(str, words)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: {done.stderr}")


def make_slides(svs: Path, work: Path, count: int, size: int) -> list[dict[str, str]]:
    """Make the slides and their pyramids where they are not there; return the rows of their table."""
    if not (work / "tif" / "labels.csv").exists():
        script = HERE.parent / "examples" / "sixty_slides.py"
        words = ["--svs", svs, "--out", work / "tif", "--count", count, "--size", size]
        words += ["--workers", os.cpu_count() or 1]
        subprocess.run([sys.executable, script, *map(str, words)], check=True)
    command("convert", work / "tif", "--out", work / "pyramids")
    with (work / "tif" / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for fold in range(FOLDS):
        with (work / "pyramids" / f"fold-{fold}.csv").open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["slide_id", "path", "label", "split"])
            for row in rows:
                split = "test" if int(row["fold"]) == fold else "train"
                table.writerow([row["slide_id"], f"{row['slide_id']}.ome.zarr", row["label"], split])
    return rows


def by_command(arm: str, seed: int, fold: int, work: Path, weights: Path, settings: list[str]) -> dict[str, Any]:
    """Train and predict one fold by the commands of the README."""
    manifest = work / "pyramids" / f"fold-{fold}.csv"
    with tempfile.TemporaryDirectory(dir=work) as folder:
        run = Path(folder) / "run"
        store = work / "features" / f"{arm}, seed {seed}"
        chosen = [*settings, f"model.encoder.weights={weights}", f"data.features.folder={store}", f"seed={seed}"]
        began = time.monotonic()
        command(
            *("train", "--manifest", manifest, "--out", run, "--config", CONFIG),
            *(word for setting in [*ARMS[arm], *chosen] for word in ("--set", setting)),
        )
        seconds = time.monotonic() - began
        command("predict", run, manifest, "--split", "test", "--out", run / "test")
        with (run / "test" / "predictions.csv").open(newline="") as file:
            scores = {row["slide_id"]: float(row["prob_nests"]) for row in csv.DictReader(file)}
        with (run / "metrics.jsonl").open() as file:
            last = json.loads(file.readlines()[-1])
    return {"scores": scores, "seconds": round(seconds, 1), "cross_entropy": round(last["cross_entropy"], 4)}


class AttentionPool(nn.Module):
    """Gated attention over a bag of features, as it is usually set up: (K, D) -> (Q,) logits."""

    def __init__(self, features: int, hidden: int = 256, width: int = 128) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(0.25))
        self.value, self.gate = nn.Linear(hidden, width), nn.Linear(hidden, width)
        self.weight, self.head = nn.Linear(width, 1), nn.Linear(hidden, 2)

    def forward(self, bag: Tensor) -> Tensor:
        """Classify a bag."""
        projected = self.project(bag)
        attention = self.weight(self.value(projected).tanh() * self.gate(projected).sigmoid()).softmax(0)
        logits: Tensor = self.head((attention * projected).sum(0))
        return logits


@torch.no_grad()
def encode_tiles(slides: list[Path], weights: Path) -> tuple[list[Tensor], float]:
    """Features (K, D) of all tiles with tissue of each slide, and the seconds that it took."""
    began = time.monotonic()
    built = build_encoder({"name": "mobilenet_v2", "weights": str(weights)}, in_channels=3, patch_size=TILE)
    encoder = built.module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    bags = []
    for path in slides:
        image = SlideImage(Slide(path), background=1.0)
        corners = torch.cartesian_prod(*(torch.arange(0, side, TILE) for side in image.shapes[0]))
        found = find_mask(image.slide, Entry(slide_id="", path=str(path)), "tissue")
        covered = Mask(torch.from_numpy(found.pixels), found.pitch_yx).area(torch.cat([corners, corners + TILE], -1))
        corners = corners[covered > 0.05 * TILE**2]
        boxes = torch.cat([corners, torch.full_like(corners, TILE)], -1)
        parts = [(image.read(0, part) / 255 - mean) / std for part in boxes.split(128)]
        bags.append(torch.cat([encoder(part.contiguous(memory_format=torch.channels_last)) for part in parts]))
    return bags, time.monotonic() - began


def over_all_tiles(bags: list[Tensor], labels: Tensor, train: Tensor, seed: int) -> tuple[Tensor, float]:
    """Scores (N,) of all slides by attention over their tiles, learned from some; and the last cross-entropy."""
    torch.manual_seed(seed)
    model = AttentionPool(bags[0].shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, weight_decay=1e-5)
    total = 0.0
    for _ in range(30):
        total = 0.0
        for row in train[torch.randperm(len(train))].tolist():
            loss = functional.cross_entropy(model(bags[row])[None], labels[row : row + 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
    with torch.no_grad():
        logits = torch.stack([model.eval()(bag) for bag in bags])
    return logits.softmax(-1)[:, 1], total / len(train)


def by_attention(
    rows: list[dict[str, str]], seed: int, fold: int, encoded: tuple[list[Tensor], float]
) -> dict[str, Any]:
    """Train and score one fold the usual way."""
    bags, seconds = encoded
    began = time.monotonic()
    folds = torch.tensor([int(row["fold"]) for row in rows])
    labels = torch.tensor([int(row["label"] == "nests") for row in rows])
    found, cross_entropy = over_all_tiles(bags, labels, (folds != fold).nonzero().flatten(), seed)
    held = (folds == fold).nonzero().flatten().tolist()
    return {
        "scores": {rows[row]["slide_id"]: round(found[row].item(), 6) for row in held},
        "seconds": round(time.monotonic() - began + seconds / FOLDS, 1),
        "cross_entropy": round(cross_entropy, 4),
    }


def show(results: dict[str, Any]) -> None:
    """Print the table: pooled AUC of each seed, seconds of a fold."""
    labels = results["labels"]
    print(f"\n{len(labels)} slides, {FOLDS} folds")
    print(f"{'arm':42}{'seeds':>6}{'pooled AUC':>24}{'seconds a fold':>18}{'training cross-entropy':>26}")
    for arm in ARMS:
        runs = [each for each in results["runs"] if each["arm"] == arm]
        aucs = []
        for seed in sorted({each["seed"] for each in runs}):
            scores: dict[str, float] = {}
            own = [each for each in runs if each["seed"] == seed]
            for each in own:
                scores |= each["scores"]
            if len(own) == FOLDS:
                aucs.append(roc_auc_score([labels[name] == "nests" for name in scores], list(scores.values())))
        if aucs:
            middle = f"{statistics.median(aucs):.3f} [{min(aucs):.3f}, {max(aucs):.3f}]"
            seconds = statistics.median(each["seconds"] for each in runs if each["seconds"])  # none: it was paused
            losses = [each["cross_entropy"] for each in runs]
            print(f"{arm:42}{len(aucs):6}{middle:>24}{seconds:18.0f}{f'{min(losses):.3f} to {max(losses):.3f}':>26}")
    print("\nmedian [range] over seeds")
    print_versions(results["runs"])


def main() -> None:
    """Do the folds that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svs", type=Path, help="a real slide whose tissue is used")
    parser.add_argument("--weights", type=Path, help="of torchvision's MobileNetV2")
    parser.add_argument("--work", type=Path, help="folder for slides, pyramids and features: 3 GB")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--show", action="store_true", help="print what there is and run nothing")
    parser.add_argument("--quick", action="store_true", help="see that it works: twelve small slides, two epochs")
    chosen = parser.parse_args()
    if chosen.show:
        show(json.loads(chosen.results.read_text()))
        return
    if not (chosen.svs and chosen.weights and chosen.work):
        parser.error("--svs, --weights and --work are needed")
    chosen.work.mkdir(parents=True, exist_ok=True)
    path = chosen.work / "quick.json" if chosen.quick else chosen.results
    rows = make_slides(chosen.svs, chosen.work, *((12, 2048) if chosen.quick else (60, 4096)))
    labels = {row["slide_id"]: row["label"] for row in rows}
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"labels": labels, "runs": []}
    pyramids = [chosen.work / "pyramids" / f"{name}.ome.zarr" for name in labels]
    encoded = cache(lambda: encode_tiles(pyramids, chosen.weights))
    done = {(each["arm"], each["seed"], each["fold"]) for each in results["runs"]}
    for seed, arm, fold in [(s, a, f) for s in chosen.seeds for a in chosen.arms for f in range(FOLDS)]:
        if (arm, seed, fold) in done:
            continue
        if arm == ALL_TILES:
            found = by_attention(rows, seed, fold, encoded())
        else:
            few = ["train.epochs=2"] if chosen.quick else []
            found = by_command(arm, seed, fold, chosen.work, chosen.weights, few)
        print(f"{arm}, seed {seed}, fold {fold}: {found['seconds']:.0f} s", flush=True)
        about = made_with("cpu" if arm == ALL_TILES else "auto")
        results["runs"].append({"arm": arm, "seed": seed, "fold": fold, **found, "versions": about})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, results)
    print(f"\npython {' '.join(sys.argv)}")
    show(results)


if __name__ == "__main__":
    run_main(main, RESUMABLE)
