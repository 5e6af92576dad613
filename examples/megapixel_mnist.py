"""Megapixel MNIST (section 4.2 of the paper) through the whole product: TIFFs, pyramids, training, test error.

    python examples/megapixel_mnist.py --digits ../shared/data/mnist --out runs/mnist

There are as many images as in the paper, but smaller by default, so that a CPU does it in minutes: --size 1500
--noise 50 is the paper's set. Without --digits the digits are scikit-learn's.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from commands import run

from pipeline.runs import read_metrics
from pipeline.train import versions


def main() -> None:
    """Make the set, train, test, and print one row of the README's table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"))
    parser.add_argument("--digits", type=Path, help="folder of t10k-images-idx3-ubyte.gz and its labels")
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--noise", type=int, default=8)
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--set", action="append", default=[], help="override the configuration")
    chosen = parser.parse_args()
    out = chosen.out
    digits: list[str | Path] = []
    if chosen.digits:
        digits = ["--images", chosen.digits / "t10k-images-idx3-ubyte.gz"]
        digits += ["--labels", chosen.digits / "t10k-labels-idx1-ubyte.gz"]
    overrides = [word for setting in chosen.set for word in ("--set", setting)]
    run(
        "synth",
        "mnist",
        "--out",
        out / "images",
        "--size",
        chosen.size,
        "--noise",
        chosen.noise,
        "--train",
        chosen.train,
        "--test",
        chosen.test,
        *digits,
    )
    run("convert", out / "images" / "manifest.csv", "--out", out / "pyramids")
    manifest = out / "pyramids" / "manifest.csv"
    config = Path(__file__).with_suffix(".yaml")
    seconds, _ = run("train", "--manifest", manifest, "--config", config, "--out", out / "run", *overrides)
    run("predict", out / "run", manifest, "--split", "test", "--out", out / "predictions", "--overwrite")
    run("evaluate", out / "predictions")
    metrics = json.loads((out / "predictions" / "metrics.json").read_text())
    last = read_metrics(out / "run")[-1]
    low, high = metrics["accuracy"]["interval_95"]
    print(
        f"\n{chosen.size}x{chosen.size}, {chosen.noise} noise patches, {chosen.train} training images, "
        f"{last['epoch']} epochs in {seconds / 60:.1f} minutes on {os.cpu_count()} cores: "
        f"training cross-entropy {last['cross_entropy']:.3f}, test error {1 - metrics['accuracy']['value']:.1%} "
        f"[{1 - high:.1%}, {1 - low:.1%}] on {metrics['slides']} images\n"
        f"{', '.join(f'{name} {version}' for name, version in versions().items())}"
    )


if __name__ == "__main__":
    main()
