"""``nested-ats job``: commands are checked before they leave, and docs/cluster.md names only commands that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from cluster.jobs.nodes import Node
from pipeline.cli.app import app

GUIDE = Path(__file__).parents[2] / "docs" / "cluster.md"
TRAIN = "train --manifest /data/m.csv --out /data/run --cluster auto"
CONVERT = "convert s3://b/x --cluster auto"


@pytest.fixture
def cli(monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def run(words):
        result = CliRunner().invoke(app, ["job", *shlex.split(words)], catch_exceptions=False)
        assert "Traceback" not in result.output
        return result

    return run


# (words of the message, what stands after submit --)
MISTAKES = [
    ("No such option", "train --manifst /data/m.csv"),
    ("Missing option '--out'", "train --manifest /data/m.csv"),
    ("not a command that a job can run", "trian"),
    ("not a command that a job can run", "job list"),
    ("not a command that a job can run", "synth"),
    ("add --cluster auto", "train --manifest /data/m.csv --out /data/run"),
    ("add --cluster auto", "predict /data/run /data/m.csv --out /data/p --cluster local"),
    ("--out runs: a job ends in a folder that is deleted", "train --manifest /data/m.csv --out runs --cluster auto"),
    ("m.csv: relative to no working folder", "train --manifest m.csv --out /data/run --cluster auto"),
    ("run: relative to no working folder", "predict run /data/m.csv --out /data/p --cluster auto"),
    ("no working folder", "convert slides --out /data/p --cluster auto"),
    ("--manifest manifest.csv: a job ends in", f"{CONVERT} --out s3://b/y"),
]


@pytest.mark.parametrize(
    "command",
    ["", "submit", "status", "list", "logs", "stop", "nodes", "manifest", "manifest kuberay", "manifest slurm"],
)
def test_help(cli, command):
    result = cli(f"{command} --help")
    assert result.exit_code == 0
    assert f"Usage: root job {command}".rstrip() in result.stdout


class TestChecks:
    @pytest.mark.parametrize(("message", "words"), MISTAKES)
    def test_mistakes_are_found_before_anything_is_sent(self, cli, message, words):
        result = cli(f"submit --address http://127.0.0.1:1 -- {words}")
        assert result.exit_code == 2
        assert message in result.stderr

    @pytest.mark.parametrize(
        "words",
        [
            TRAIN,
            "train --manifest /data/m.csv --out run --mirror s3://b/run --cluster auto",  # the folder may vanish
            "evaluate /data/p",
            f"{CONVERT} --out s3://b/y --manifest /data/m.csv",
            "synth signs --out /data/s",
        ],
    )
    def test_what_is_right_goes_on_to_the_dashboard(self, cli, words):
        result = cli(f"submit --address http://127.0.0.1:1 -- {words}")
        assert result.exit_code == 2
        assert "no Ray dashboard answers at http://127.0.0.1:1" in result.stderr

    def test_relative_paths_are_looked_for_in_the_working_folder(self, cli, tmp_path):
        (tmp_path / "m.csv").write_text("")
        words = f"submit --address http://127.0.0.1:1 --working-dir {tmp_path} -- train --out /run --cluster auto"
        assert "no Ray dashboard answers" in cli(f"{words} --manifest m.csv").stderr
        assert "gone.csv: relative to" in cli(f"{words} --manifest gone.csv").stderr

    def test_elsewhere_without_a_token(self, cli, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        result = cli(f"submit --address http://192.0.2.9:8265 -- {TRAIN}")
        assert result.exit_code == 2
        assert "no token was found" in result.stderr
        assert result.stderr.count("\n") == 1


def test_nodes_that_are_too_few_are_an_error_of_one_line(cli, monkeypatch):
    monkeypatch.setattr("cluster.jobs.nodes.session", nullcontext)
    monkeypatch.setattr("cluster.jobs.nodes._alive", lambda: [Node("10.0.0.1", 1, 0)])
    result = cli("nodes --wait 3")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: 1 of 3 nodes have joined (10.0.0.1); ")


SLURM = "manifest slurm --storage /data"
KUBERAY = "manifest kuberay --image registry/ats:1 --storage shared"


class TestManifests:
    def test_kuberay(self, cli):
        result = cli(f"{KUBERAY} --workers 4 --gpus-per-worker 1 -- {TRAIN} --workers 4 --device cuda")
        assert result.exit_code == 0
        spec = yaml.safe_load(result.stdout)["spec"]
        assert spec["entrypoint"] == f"nested-ats {TRAIN} --workers 4 --device cuda"
        assert spec["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 4

    def test_slurm(self, cli):
        result = cli(f"manifest slurm --storage /data --workers 2 -- {TRAIN} --set 'a=$b c'")
        assert result.exit_code == 0
        assert f"\nnested-ats {TRAIN} --set 'a=$b c' &\n" in result.stdout
        subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=True)

    @pytest.mark.parametrize(
        ("message", "words"),
        [
            ("not in /mnt", f"{KUBERAY} --mount /mnt -- {TRAIN}"),
            ("not in /scratch", f"manifest slurm --storage /scratch -- {TRAIN}"),
            ("--manifest /tmp/m.csv: not in", f"{KUBERAY} -- {CONVERT} --out /data/b --manifest /tmp/m.csv"),
            ("add --device cuda", f"{KUBERAY} --gpus-per-worker 1 -- {TRAIN}"),
            ("--gpus-per-worker", f"manifest slurm --storage /data -- {TRAIN} --device cuda"),
            ("--name 'A'", f"{KUBERAY} --name A -- {TRAIN}"),
            ("--image ''", f"manifest kuberay --image '' --storage shared -- {TRAIN}"),
            ("--storage 'Slides_X y'", f"manifest kuberay --image a --storage 'Slides_X y' -- {TRAIN}"),
            ("--namespace 'Bad_NS'", f"{KUBERAY} --namespace Bad_NS -- {TRAIN}"),
            ("--workers 9: 1 machines with 4 proc", f"{KUBERAY} -- {TRAIN} --workers 9"),
            ("--workers 9-12: 2 machines with 3 proc", f"{SLURM} --workers 2 --cpus 3 -- {TRAIN} --workers 9-12"),
            (
                "--workers 9: 2 machines with 1 GPUs",
                f"{KUBERAY} --workers 2 --gpus-per-worker 1 -- {TRAIN} --workers 9 --device cuda",
            ),
            (
                "/data/../r: give a path without ..",
                f"{KUBERAY} -- train --manifest /data/m.csv --cluster auto --out /data/../r",
            ),
            ("Missing option '--image'", f"manifest kuberay --storage shared -- {TRAIN}"),
        ],
    )
    def test_mistakes(self, cli, message, words):
        result = cli(words)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stdout == ""


def commands():
    """Lines of the guide's shell blocks, continuations joined."""
    blocks = re.findall("(?ms)^```(?:sh|bash)\n(.*?)^```", GUIDE.read_text())
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def parse(words):
    """Read a command of ours with our parser, and what stands behind its -- likewise."""
    found, context = typer.main.get_command(app), None
    while hasattr(found, "commands"):
        context = typer.Context(found, parent=context)
        found = found.commands[words[0]]
        words = words[1:]
    values = found.make_context("", list(words), parent=context).params
    if "command" in values:
        parse(values["command"])


class TestGuide:
    def test_our_commands_exist_with_their_options(self):
        ours = [line for line in commands() if re.search(r"\bnested-ats (?!:)", line) and "docker" not in line]
        assert len(ours) > 10
        for line in ours:
            words = shlex.split(
                line.partition("nested-ats ")[2].partition(" | ")[0].partition(" > ")[0], comments=True
            )
            parse(words)

    def test_rays_commands_exist_with_their_options(self):
        ray = pytest.importorskip("ray.scripts.scripts")
        lines = [line for line in commands() if re.search(r"(^|[ ;])ray ", line)]
        assert lines
        for line in lines:
            words = shlex.split(re.split(r"(?:^|[ ;])ray ", line)[1].partition(" > ")[0], comments=True)
            command = ray.cli.commands[words[0]]
            assert {word.partition("=")[0] for word in words[1:] if word.startswith("--")} <= {
                option for parameter in command.params for option in parameter.opts
            }, line

    def test_errors_of_the_table_are_ours(self):
        """Every message that the guide explains stands in the code."""
        folders = [Path(GUIDE.parents[1], name) for name in ("cluster", "pipeline")]
        sources = [path for folder in folders for path in folder.rglob("*.py")]
        code = re.sub(r'"\n\s*f?"', "", "\n".join(source.read_text() for source in sources))
        rows = re.findall(r"(?m)^\| `([^`]+)` \|", (GUIDE.parent / "cluster-operation.md").read_text())
        assert len(rows) > 8
        for row in rows:
            for part in row.split("..."):
                assert part.strip() in code, row
