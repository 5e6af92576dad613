"""A cluster of several nodes, on this machine, that loses workers, drivers and nodes: nothing lost, nothing twice.

Every driver is a process of its own, as a user's is. A node is one raylet with its workers, killed all at once. Waits
last as long as anything goes on, since a machine may be busy with other things; what was started is ended.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import parse_config, plain
from pipeline.convert import convert_all
from pipeline.data.discovery import name_slides
from pipeline.data.manifest import read_manifest
from pipeline.results.predict import predict
from pipeline.runs import read_metrics
from pipeline.training.course import PAPERS_COURSE
from pipeline.training.train import train
from storage import ConvertOptions, write_tiff

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

EPOCHS = 24
STALLED_S = 240.0  # so long nothing may happen: longer than Ray takes to start beside other work, or to miss a node

NODES = """
import sys
from ray.cluster_utils import Cluster

# Not 127.0.0.1, for which a driver takes an outer address of this machine.
here = {"node_ip_address": "127.0.0.2", "include_dashboard": False}
# A node that does not answer is given up after 5 s instead of 15.
fast = {"health_check_period_ms": 1000}
nodes = Cluster(initialize_head=True, head_node_args={**here, "num_cpus": 0, "_system_config": fast})
print(nodes.address, flush=True)
for line in sys.stdin:
    node = nodes.add_node(**here, num_cpus=int(line), num_gpus=1)
    print(node.all_processes["raylet"][0].process.pid, flush=True)
"""

# Workers leave a file for each item that they begin, named by the processes of node and worker, and the GPU.
COMMAND = """
import os, signal, sys, time
from pathlib import Path
import cluster
from pipeline.cli.app import main

original, marks = cluster.run_tasks, Path(sys.argv.pop(1))

def run_tasks(make_worker, items, **settings):
    def make():
        work = make_worker()

        def slowly(item):
            gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            (marks / f"{os.getppid()}-{os.getpid()}-{gpu}-{time.time_ns()}").touch()
            time.sleep(0.3)
            if getattr(item, "slide_id", "") == "slide 5":
                os.kill(os.getpid(), signal.SIGKILL)
            return work(item)

        return slowly

    return original(make, items, **settings)

cluster.run_tasks = run_tasks
main()
"""


class Nodes:
    """A head without CPUs, and nodes that can be added and killed."""

    def __init__(self, environment):
        self.environment = environment
        command = [sys.executable, "-c", NODES]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address = self.process.stdout.readline().strip()

    def add(self, cpus):
        """Add a node with so many CPUs and one GPU, of which Ray only believes that it is there."""
        print(cpus, file=self.process.stdin, flush=True)
        return psutil.Process(int(self.process.stdout.readline()))


class Drivers:
    """Commands on the nodes, and the folder below which all that they do shows."""

    def __init__(self, nodes, folder):
        self.nodes, self.folder, self.started = nodes, folder, []

    def run(self, marks, *arguments):
        command = [sys.executable, "-c", COMMAND, marks, *arguments, "--cluster", self.nodes.address]
        with (self.folder / f"driver-{len(self.started)}.log").open("w") as log:
            words = [str(part) for part in command]
            self.started.append(subprocess.Popen(words, env=self.nodes.environment, stderr=log))
        return self.started[-1]

    def wait(self, condition):
        """Wait while the driver runs, and while files change."""
        seen, since = None, time.monotonic()
        while not condition():
            assert self.started[-1].poll() is None, self.messages()
            now = stamps(self.folder)
            if now != seen:
                seen, since = now, time.monotonic()
            assert time.monotonic() - since < STALLED_S, f"nothing happens: {self.messages()}"
            time.sleep(0.05)

    def end(self):
        """Exit code and messages of the driver that is to end by itself."""
        driver = self.started[-1]
        self.wait(lambda: driver.poll() is not None)
        return driver.returncode, self.messages()

    def messages(self):
        return (self.folder / f"driver-{len(self.started) - 1}.log").read_text()


def stamps(folder):
    """Times of all files below a folder."""
    found = {}
    for place, _, names in os.walk(folder):
        for path in (os.path.join(place, name) for name in names):
            with suppress(FileNotFoundError):
                found[path] = os.stat(path).st_mtime_ns
    return found


def kill(node):
    """End a node and all that runs on it, without warning."""
    with suppress(psutil.NoSuchProcess):
        for process in [node, *node.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="module")
def nodes():
    home = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's socket paths must stay short
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    nodes = Nodes({**os.environ, "HOME": home, "RAY_TMPDIR": home, **settings})
    nodes.stays = nodes.add(2)  # type: ignore[attr-defined]
    yield nodes
    kill(psutil.Process(nodes.process.pid))
    nodes.process.communicate()
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def victim(nodes):
    node = nodes.add(1)
    yield node
    kill(node)


@pytest.fixture
def drivers(nodes, tmp_path):
    drivers = Drivers(nodes, tmp_path)
    yield drivers
    for one in drivers.started:
        one.kill()
        one.wait()


def trainers(node):
    return [child for child in node.children(recursive=True) if "_TrainingWorker" in command_line(child)]


def command_line(process):
    """Command line of a process; nothing where it has ended."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def test_training_survives_the_loss_of_a_worker_a_driver_and_a_node(
    nodes, victim, drivers, config, pyramids, tmp_path
):
    """Ten slides in batches of four over three workers: the last of them has none in every third step."""
    values = plain(config)
    # Gradients well above rounding in every network from the first step on, which Adam would scale up otherwise.
    values["model"] |= {"attention": "independent", "scale": 1.0, "method": "systematic"}
    values["train"] |= PAPERS_COURSE | {"epochs": EPOCHS}
    longer = parse_config(values, "test")
    train(read_manifest(pyramids), longer, tmp_path / "alone", device="cpu")
    (tmp_path / "config.yaml").write_text(json.dumps(plain(longer)))
    folder = tmp_path / "run"
    command = ["train", "--manifest", pyramids, "--config", tmp_path / "config.yaml", "--out", folder]
    command += ["--workers", "1-3", "--device", "cpu"]

    def epochs(number):
        return lambda: len(read_metrics(folder)) >= number

    driver = drivers.run(tmp_path, *command)
    drivers.wait(epochs(2))
    assert (len(trainers(nodes.stays)), len(trainers(victim))) == (2, 1)
    trainers(nodes.stays)[0].kill()
    done = len(read_metrics(folder))
    drivers.wait(epochs(done + 2))
    driver.kill()
    driver.wait()
    drivers.run(tmp_path, *command)
    done = len(read_metrics(folder))
    drivers.wait(epochs(done + 2))
    assert done + 2 < EPOCHS, "it was over before a node could be lost"
    kill(victim)
    drivers.wait(lambda: trainers(nodes.stays))
    code, errors = drivers.end()
    assert code == 0, errors
    assert "workers were lost" in errors
    assert [line["epoch"] for line in read_metrics(folder)] == list(range(1, EPOCHS + 1))
    alone, survived = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "alone", folder))
    for name, value in alone.items():
        if not ("attention" in name and "bias" in name):  # whose gradient here is rounding, which Adam scales up
            torch.testing.assert_close(survived[name], value, atol=1e-4, rtol=0, msg=name)  # a step is 1e-3
    for one, other in zip(read_metrics(folder), read_metrics(tmp_path / "alone"), strict=True):
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=1e-5)


def test_prediction_survives_the_loss_of_workers_a_driver_and_a_node(
    nodes, victim, drivers, finished, pyramids, tmp_path
):
    """Slide 5 kills its worker whenever it is tried. Two workers share the GPU of the node that has two CPUs."""
    folder, marks = tmp_path / "out", tmp_path / "marks"
    marks.mkdir()
    command = ["predict", finished, pyramids, "--out", folder, "--workers", "3"]

    def begun():
        return [mark.name.split("-") for mark in marks.iterdir()]

    def results():
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("parts/*.parquet")}

    driver = drivers.run(marks, *command)
    drivers.wait(lambda: any(int(node) == victim.pid for node, *_ in begun()))
    kill(victim)
    before = len(results())
    drivers.wait(lambda: len(results()) >= before + 4)
    driver.kill()
    driver.wait()
    early = results()
    drivers.run(marks, *command)
    code, errors = drivers.end()
    assert code == 3, errors
    assert len({worker for node, worker, *_ in begun() if int(node) == nodes.stays.pid}) > 2
    assert {gpu for _, _, gpu, *_ in begun()} == {"0"}
    assert early.items() <= results().items()  # what was done was not done again
    rows = list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
    entries = read_manifest(pyramids)
    assert [row["slide_id"] for row in rows] == [entry.slide_id for entry in entries]
    [failed] = [row for row in rows if row["status"] != "ok"]
    assert (failed["slide_id"], failed["error"]) == ("slide 5", "slide 5: its worker died (attempt 2)")
    for row, here in zip(rows, predict(entries, finished, tmp_path / "here", device="cpu"), strict=True):
        if row is not failed:
            assert float(row["prob_bar"]) == pytest.approx(here["prob_bar"], abs=1e-4)


def test_conversion_survives_the_loss_of_a_node(victim, drivers, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    tiles = [pixels[y : y + 64, x : x + 64] for y in range(0, 300, 64) for x in range(0, 400, 64)]
    source, marks, out = tmp_path / "a.tif", tmp_path / "marks", tmp_path / "out"
    write_tiff(source, tiles, shape=pixels.shape, dtype="uint8", tile=64, compression="deflate")
    marks.mkdir()
    options = ["--chunk", "16", "--shard", "64", "--min-level-size", "16"]
    drivers.run(marks, "convert", source, "--out", out, "--workers", "3", *options)
    drivers.wait(lambda: any(mark.name.startswith(f"{victim.pid}-") for mark in marks.iterdir()))
    kill(victim)
    code, errors = drivers.end()
    assert code == 0, errors
    alone = ConvertOptions(chunk=16, shard=64, min_level_size=16)
    convert_all(name_slides([str(source)]), tmp_path / "alone", options=alone)
    there, here = (contents(folder / "a.ome.zarr") for folder in (out, tmp_path / "alone"))
    assert there == here


def contents(folder: Path):
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(files) > 20
    return files
