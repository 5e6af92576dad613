"""The main job end to end, offline: `make demo`.

Sign scenes become pyramids, a model learns from one label per scene, and the same model classifies a scene of more
than a gigapixel. Every stage is a command of the command line, printed before it runs; run again, the demo goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from commands import run

from pipeline.interrupt import RESUMABLE, run_main
from pipeline.results.predictions import read_predictions
from pipeline.training.train import versions

GIGAPIXEL_SIDE = 32768
SCENES, TEST_SHARE = 850, 0.1765  # 700 scenes to train on, 150 to test
SCENE_SIDE = 512  # pixels; attention that finds discs in small scenes finds them in large ones
# Twice the samples for five epochs of eight: in these the attention finds the discs, and a few more make the rest certain.
COURSE = ["train.epochs=8", "train.batch_size=8", "train.early_samples=2", "train.early_share=0.625"]


def main() -> None:
    """Run all stages and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--side", type=int, default=GIGAPIXEL_SIDE, help="of the large scene, in pixels")
    parser.add_argument("--set", action="append", default=[], help="override the configuration")
    chosen = parser.parse_args()
    out, side = chosen.out, chosen.side
    overrides = [word for setting in COURSE + chosen.set for word in ("--set", setting)]
    began = time.monotonic()
    stages = {
        "scenes: synth": run(
            "synth",
            "signs",
            "--out",
            out / "scenes",
            "--count",
            chosen.scenes,
            "--size",
            SCENE_SIDE,
            "--test",
            TEST_SHARE,
            "--compression",
            "jpeg",
        ),
        "scenes: convert": run(
            "convert",
            out / "scenes" / "manifest.csv",
            "--out",
            out / "pyramids",
            "--min-level-size",
            SCENE_SIDE // 16,  # the coarse view is a level of small scenes too
        ),
        "scenes: train": run(
            "train",
            "--manifest",
            out / "pyramids" / "manifest.csv",
            "--config",
            Path(__file__).parent / "signs.yaml",
            "--out",
            out / "run",
            *overrides,
        ),
        "scenes: predict": run(
            "predict", out / "run", out / "pyramids" / "manifest.csv", "--split", "test", "--out", out / "predictions"
        ),
        "scenes: evaluate": run("evaluate", out / "predictions"),
        "gigapixel: synth": run(
            "synth",
            "signs",
            "--out",
            out / "gigapixel" / "scene",
            "--count",
            1,
            "--size",
            side,
            "--signs",
            24,
            "--label",
            "70",
            "--test",
            1,
            "--compression",
            "jpeg",
            "--seed",
            1,
        ),
        "gigapixel: convert": run(
            "convert", out / "gigapixel" / "scene" / "manifest.csv", "--out", out / "gigapixel" / "pyramids"
        ),
        "gigapixel: predict": run(
            "predict",
            out / "run",
            out / "gigapixel" / "pyramids" / "manifest.csv",
            "--out",
            out / "gigapixel" / "predictions",
        ),
        "gigapixel: heatmap": run(
            "heatmap", out / "run", out / "gigapixel" / "pyramids" / "manifest.csv", "--out", out / "heatmaps"
        ),
    }
    run(
        "heatmap",
        out / "run",
        out / "pyramids" / "manifest.csv",
        "--split",
        "test",
        "--limit",
        3,
        "--out",
        out / "heatmaps",
    )
    run("report", out / "run", out / "predictions", "--heatmaps", out / "heatmaps", "--out", out / "report.html")
    summarise(out, side, stages, time.monotonic() - began)


def summarise(out: Path, side: int, stages: dict[str, tuple[float, float]], seconds: float) -> None:
    """Print the table that the README quotes."""
    print("\nstage                 seconds  peak memory")
    for name, (took, memory) in stages.items():
        print(f"{name:20} {took:8.1f}  {memory:8.0f} MB")
    accuracy = json.loads((out / "predictions" / "metrics.json").read_text())["accuracy"]
    low, high = accuracy["interval_95"] or (0.0, 1.0)
    scene = read_predictions(out / "gigapixel" / "predictions")[0]
    pyramid = next((out / "gigapixel" / "pyramids").glob("*.ome.zarr"))
    stored = sum(path.stat().st_size for path in pyramid.rglob("*") if path.is_file())
    sure = scene[f"prob_{scene['prediction']}"]
    raw = side * side * 3
    print(f"""
test accuracy         {accuracy["value"]:.3f} [{low:.3f}, {high:.3f}] on scenes it has not seen, from image labels alone
gigapixel scene       {side * side / 1e9:.2f} gigapixels; label {scene["label"]}, predicted {scene["prediction"]} ({sure:.0%})
read to classify it   {scene["bytes_read"] / 1e6:.1f} MB in {scene["requests"]} requests, {scene["seconds"]:.1f} s:
                      {scene["bytes_read"] / stored:.2%} of the pyramid as stored, {scene["bytes_read"] / raw:.2%} of the raw pixels
peak memory           {max(memory for _, memory in stages.values()):.0f} MB over all stages
in all                {seconds / 60:.1f} minutes on {os.cpu_count()} cores; {", ".join(f"{k} {v}" for k, v in versions().items())}

predictions           {out / "predictions" / "predictions.csv"}
                      {out / "gigapixel" / "predictions" / "predictions.csv"}
heatmap               {out / "heatmaps" / scene["slide_id"] / "overlay.png"}
report                {out / "report.html"}""")


if __name__ == "__main__":
    run_main(main, RESUMABLE)
