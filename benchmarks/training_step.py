"""A whole training step, split into its parts, and how much of its fetching is hidden behind its computing.

What runs is the ``Trainer`` of `pipeline.training.trainer`, as ``nested-ats train`` runs it, on 16 patches of each
slide. They lie on a disk and on a loopback server (a process of its own) that waits for a stated latency before it
answers a request.
Three runs take turns, all drawing the same patches: "step", the Trainer as it is; "compute", its reads answered from
memory; "fetch", its model replaced by one that reads the same pixels and computes nothing. Were nothing hidden a step
would take the sum of the last two; it cannot take less than the larger ("bound"). Nor less than the processors have
work for, the server's included: "busy" is what a step uses of them. The split is of "compute", as means over all its
steps.

Torch has --threads of the processors, reading and the server have what is left. Slides are opened, and their shards'
indexes read, in an epoch that is not measured. All else are medians over steps; an epoch's first step, for which no
view was read ahead, is left out.

    python benchmarks/training_step.py [--latency 20 50] [--parts 1 8 16] [--rounds 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast
from unittest.mock import patch
from urllib.request import urlopen

import psutil
import torch
from storage_convert import make_slide

import nested_ats.models.nested
from cluster import LocalContext
from nested_ats import Classes, LevelConfig, ModelConfig, Output
from nested_ats.reading import Reading
from pipeline.allocator import keep_freed_memory
from pipeline.config import Config
from pipeline.data.manifest import Entry
from pipeline.data.slides import SlideImage
from pipeline.interrupt import run_main
from pipeline.sections import TrainConfig
from pipeline.training.trainer import Trainer
from storage import Slide, convert, processors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

STEPS = 7  # of an epoch
COUNTED = "/counted"  # a path on the server
PARTS = ("attention", "draw", "encode", "backward", "optimizer")


class _Handler(BaseHTTPRequestHandler):
    """Ranges of files, each answered after the latency."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits up to 40 ms for the acknowledgement of its head
    answered: ClassVar = [0, 0]  # requests, and bytes of files, by all handlers of the process
    lock = threading.Lock()

    def __init__(self, *args: Any, root: Path, latency: float) -> None:
        self.root, self.latency = root, latency
        super().__init__(*args)

    def do_GET(self) -> None:
        """Answer a request for a file or for a range of it, or for the numbers of what was answered."""
        if self.path == COUNTED:
            self._send(200, json.dumps(self.answered).encode())
            return
        time.sleep(self.latency)
        wanted = self.headers.get("Range")
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self._count(0)
            self._send(404, b"")
            return
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first, last = 0, size - 1
            if wanted:
                first, last = (int(end) for end in wanted.removeprefix("bytes=").split("-"))
                last = min(last, size - 1)
            file.seek(first)
            data = file.read(last + 1 - first)
        self._count(len(data))
        self._send(206 if wanted else 200, data, f"bytes {first}-{last}/{size}" if wanted else "")

    def _count(self, nbytes: int) -> None:
        with self.lock:
            self.answered[0] += 1
            self.answered[1] += nbytes

    def _send(self, status: int, data: bytes, place: str = "") -> None:
        self.send_response(status)
        if place:
            self.send_header("Content-Range", place)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_HEAD(self) -> None:
        """Tell the length of a file."""
        time.sleep(self.latency)
        self._count(0)
        path = self.root / self.path.lstrip("/")
        self.send_response(200 if path.is_file() else 404)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Log nothing."""


def _serve(root: Path, latency: float, port: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the benchmark's, which closes the port
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, root=root, latency=latency))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port.send(server.server_address[1])
    with suppress(EOFError):
        port.recv()  # ends when the benchmark closes its end, or is killed


@contextmanager
def serving(root: Path, latency: float) -> Iterator[str]:
    """URL of a folder on a loopback server in another process, which waits `latency` seconds before each answer."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_serve, args=(root, latency, its), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{mine.recv()}"
    finally:
        mine.close()
        process.join()


def counted(url: str) -> tuple[int, int]:
    """Return how many requests a server of `serving` has answered, and how many bytes of files."""
    with urlopen(f"{url}{COUNTED}") as answer:
        requests, nbytes = json.load(answer)
    return requests, nbytes


class Stopwatch:
    """Seconds by name, summed over threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, keeping time."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                with self._lock:
                    self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

        return timed


class Reads:
    """What was read: the pixels of every box, and the boxes that each forward pass asked for."""

    def __init__(self) -> None:
        self.pixels: dict[tuple[int, bytes], torch.Tensor] = {}
        self.boxes: dict[tuple[int, ...], list[list[tuple[Any, ...]]]] = {}

    def remember(self, read: Callable[..., torch.Tensor], image: SlideImage, level: int, boxes: torch.Tensor) -> Any:
        """Read, and keep the pixels."""
        return self.pixels.setdefault((level, boxes.numpy().tobytes()), read(image, level, boxes))

    def recall(self, level: int, boxes: torch.Tensor) -> torch.Tensor:
        """Pixels that were read before; KeyError where the runs did not draw the same."""
        return self.pixels[level, boxes.numpy().tobytes()]

    def note(self, classify: Callable[..., Reading[Output]], images: Any, keys: torch.Tensor, **options: Any) -> Any:
        """Run the model, and keep what it asks for."""
        asked = self.boxes[tuple(keys.tolist())] = []
        reading = classify(images, keys, **options)
        wanted = next(reading)
        try:
            while True:
                asked.append([cast("partial[Any]", read).args for read in wanted])
                wanted = reading.send((yield wanted))
        except StopIteration as end:
            return end.value

    def fetch(self, bias: torch.Tensor, images: Any, keys: torch.Tensor, **_: Any) -> Reading[Output]:
        """In place of the model: read what it asked for, one phase after the other, and compute nothing."""
        for asked in self.boxes[tuple(keys.tolist())]:
            yield [partial(image.read, *rest) for image, rest in zip(images, asked, strict=True)]
        logits = bias.expand(len(images), -1)
        return Output(logits, logits.new_zeros(len(images)), logits, ())


def make_trainer(slides: Sequence[str], parts: int, folder: Path) -> Trainer:
    """Two levels: the image at downsample 16, regions of 64 x 64 at downsample 4; 16 patches a slide."""
    levels = (
        LevelConfig(downsample=16, stride=8, samples=8),
        LevelConfig(downsample=4, size=64, stride=8, samples=16),
    )
    config = Config(
        model=ModelConfig(levels=levels, patch_size=64),
        train=TrainConfig(epochs=2, batch_size=len(slides), parts=parts, early_samples=1),  # as most steps are
    )
    entries = [
        Entry(slide_id=f"{i} {j}", path=path, label="ab"[i % 2], split="train")
        for j in range(STEPS)
        for i, path in enumerate(slides)
    ]
    folder.mkdir()
    return Trainer(LocalContext(), config, entries, Classes(("a", "b")), 3, folder)


def run(trainer: Trainer) -> list[tuple[float, float]]:
    """Seconds, and processor seconds, of each step but the first epoch's and the first of every epoch."""
    done: list[tuple[float, float]] = []
    trainer.run(lambda *_: done.append((time.perf_counter(), processor_seconds())))
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(done)]
    return [step for i, step in enumerate(steps, 1) if i > STEPS and i % STEPS]


def processor_seconds() -> float:
    """What this process and the server have used of the processors."""
    servers = [child.cpu_times() for child in psutil.Process().children()]
    return time.process_time() + sum(times.user + times.system for times in servers)


def split(trainer: Trainer, watch: Stopwatch, stack: ExitStack) -> None:
    """Keep time of the parts of a step that compute; they take turns, so that no time is counted twice."""
    model: Any = trainer.model
    for owner, names, part in (
        (model, ("_look",), "attention"),
        (nested_ats.models.nested, ("draw_phase",), "draw"),
        (model, ("_embed", "_pool"), "encode"),
        (torch.autograd, ("backward",), "backward"),
        (trainer, ("_reduce",), "optimizer"),
        (trainer.optimizer, ("step",), "optimizer"),
    ):
        for name in names:
            stack.enter_context(patch.object(owner, name, watch.around(part, getattr(owner, name))))


def measure(slides: Sequence[str], parts: int, rounds: int, folder: Path) -> dict[str, float]:
    """Seconds of a step, of its parts, and of its fetching and computing alone."""
    reads, watch = Reads(), Stopwatch()
    read = SlideImage.read
    make = partial(make_trainer, slides, parts)
    first = make(folder / "first")
    with (
        patch.object(SlideImage, "read", lambda *args: reads.remember(read, *args)),
        patch.object(first.model, "classify", partial(reads.note, first.model.classify)),
    ):
        run(first)
    found: dict[str, list[tuple[float, float]]] = {"step": [], "compute": [], "fetch": []}
    for number in range(rounds):
        found["step"] += run(make(folder / f"step {number}"))
        trainer = make(folder / f"compute {number}")
        with ExitStack() as stack:
            stack.enter_context(patch.object(SlideImage, "read", reads.recall))
            split(trainer, watch, stack)
            found["compute"] += run(trainer)
        trainer = make(folder / f"fetch {number}")
        with patch.object(trainer.model, "classify", partial(reads.fetch, trainer.model.head.bias)):
            found["fetch"] += run(trainer)
    medians = {name: statistics.median(seconds for seconds, _ in each) for name, each in found.items()}
    wall, used = (sum(column) for column in zip(*found["step"], strict=True))
    steps = rounds * STEPS * trainer.config.train.epochs
    return {
        **medians,
        **{part: watch.seconds[part] / steps for part in PARTS},
        "busy": used / wall / processors(),
    }


def show(where: str, parts: int, found: dict[str, float]) -> dict[str, Any]:
    """Print a line of the table, and return it with what it is about."""
    bound = max(found["fetch"], found["compute"])
    shares = "".join(f"{found[part]:10.3f}" for part in PARTS)
    print(
        f"{where:>12}{parts:6}{found['fetch']:8.3f}{shares}{found['compute']:9.3f}{found['step']:8.3f}"
        f"{found['fetch'] + found['compute']:8.3f}{found['step'] / bound:13.2f}{found['busy']:6.0%}",
        flush=True,
    )
    return {"where": where, "parts": parts, **found, "step_of_bound": found["step"] / bound}


def main() -> None:
    """Make a pyramid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192, help="side of the slide, pixels")
    parser.add_argument("--slides", type=int, default=16, help="slides of a step")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 8, 16], help="train.parts to try")
    parser.add_argument("--latency", type=float, nargs="+", default=[20, 50], help="of the server, milliseconds")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="file to write what was found to")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    about = {
        "machine": f"{platform.machine()}, {processors()} processors",
        "versions": {name: version(name) for name in ("torch", "numcodecs", "obstore", "numpy")},
        **{name: getattr(args, name) for name in ("size", "slides", "threads", "rounds")},
    }
    print(", ".join([about["machine"], *(f"{name} {v}" for name, v in about["versions"].items())]))
    print(f"{args.slides} slides of {args.size} x {args.size} a step, torch on {args.threads} of the processors")
    heads = "".join(f"{part:>10}" for part in PARTS)
    rest = f"{'compute':>9}{'step':>8}{'sum':>8}{'step / bound':>13}{'busy':>6}"
    print(f"{'slides on':>12}{'parts':>6}{'fetch':>8}{heads}{rest}")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        path = Path(name, "slide.ome.zarr")
        make_slide(Path(name, "slide.tif"), args.size)
        convert(Path(name, "slide.tif"), path)
        with ExitStack() as stack:
            places = {"disk": str(path)}
            for latency in args.latency:
                url = stack.enter_context(serving(path.parent, latency / 1e3))
                places[f"{latency:g} ms"] = f"{url}/{path.name}"
            lines = []
            for where, location in places.items():
                with Slide(location):
                    pass
                for parts in args.parts:
                    with tempfile.TemporaryDirectory(dir=name) as runs:
                        found = measure([location] * args.slides, parts, args.rounds, Path(runs))
                    lines.append(show(where, parts, found))
    if args.json:
        args.json.write_text(json.dumps({**about, "lines": lines}, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
