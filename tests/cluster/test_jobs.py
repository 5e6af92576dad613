"""Jobs: what is refused before anything runs, and a real head with token authentication that runs them."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cluster import ClusterError
from cluster.jobs import client as jobs
from cluster.jobs import dashboard, nodes, working_dir
from cluster.jobs.client import Jobs, connect, derived_id
from cluster.jobs.working_dir import check_size, files_to_upload, pack

TOKEN = secrets.token_hex(32)
# A shell that began the tests in the background has had SIGINT ignored, which children inherit.
COMMAND = """
import signal
from pipeline.cli.app import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


@pytest.fixture(autouse=True)
def no_token(monkeypatch, tmp_path):
    """Neither the user's token nor the user's cluster."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


class TestWorkingDir:
    def names(self, folder):
        return [file.as_posix() for file in files_to_upload(folder)]

    def write(self, folder, files):
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    def test_gitignore_is_obeyed_as_git_does(self, tmp_path):
        files = {
            ".gitignore": "*.log\n/data/\n",
            "a.log": "",
            "b.py": "",
            "data/slide.tif": "",
            "sub/data/kept.csv": "",
            "sub/.gitignore": "!kept.log\n*.bin\n",
            "sub/kept.log": "",
            "sub/c.bin": "",
            "d.bin": "",
            ".git/config": "",
        }
        self.write(tmp_path, files)
        kept = [".gitignore", "b.py", "d.bin", "sub/.gitignore", "sub/data/kept.csv", "sub/kept.log"]
        assert sorted(self.names(tmp_path)) == sorted(kept)
        git = shutil.which("git")
        if git:  # the oracle
            shutil.rmtree(tmp_path / ".git")
            subprocess.run([git, "init", "-q", str(tmp_path)], check=True)
            command = [git, "-C", str(tmp_path), "ls-files", "--others", "--exclude-standard"]
            listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            assert sorted(listed) == sorted(kept)

    def test_links_to_folders_are_left_out(self, tmp_path):
        self.write(tmp_path, {"a.py": "1"})
        (tmp_path / "loop").symlink_to(tmp_path)
        (tmp_path / "b.py").symlink_to(tmp_path / "a.py")
        assert self.names(tmp_path) == ["a.py", "b.py"]

    def test_link_to_itself(self, tmp_path):
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(ClusterError, match="cannot be read .*loop"):
            files_to_upload(tmp_path)

    @pytest.mark.parametrize("target", ["../shadow", "/etc", "../gone"])
    def test_links_that_lead_out_are_refused(self, tmp_path, target):
        (tmp_path / "shadow").write_text("root:$6$")
        self.write(tmp_path / "sent", {"sub/a.yaml": "", ".gitignore": "ignored"})
        (tmp_path / "sent" / "ignored").symlink_to(target)
        files_to_upload(tmp_path / "sent")
        (tmp_path / "sent" / "sub" / "notes.txt").symlink_to(f"../{target}" if target[0] == "." else target)
        with pytest.raises(ClusterError, match=r"links lead out of it: sub/notes.txt\. .*\.gitignore"):
            files_to_upload(tmp_path / "sent")

    @pytest.mark.parametrize(
        "name",
        [
            *(".env", ".env.production", "id_rsa", "sub/id_ed25519", "server.PEM", "tls.key", ".netrc", ".npmrc"),
            *(".aws/credentials", "sub/.kube/config", ".ssh/config", ".pypirc", ".git-credentials"),
            *(".ray/auth_token", "secrets.yaml", "gcp/service-account-1.json", "credentials.json"),
        ],
    )
    def test_secrets_stop_the_submission_unless_asked_for(self, tmp_path, name):
        fine = [".env.example", "id_rsa.pub", "ids.csv", "keys.py", "train.yaml"]
        self.write(tmp_path, dict.fromkeys([name, *fine], "x"))
        with pytest.raises(ClusterError, match=rf"secrets are.*read them: {re.escape(name)}\. .*--send-secrets"):
            files_to_upload(tmp_path)
        assert set(map(str, files_to_upload(tmp_path, secrets=True))) == {name, *fine}
        self.write(tmp_path, {".gitignore": name})
        assert name not in self.names(tmp_path)

    def test_a_secret_behind_another_name_stops_it_too(self, tmp_path):
        self.write(tmp_path, {".env": "x", ".gitignore": ".env"})
        (tmp_path / "notes.txt").symlink_to(".env")
        with pytest.raises(ClusterError, match=r"read them: notes.txt\."):
            files_to_upload(tmp_path)

    def test_what_is_sent_is_said_and_is_for_its_owner_only(self, tmp_path):
        self.write(tmp_path / "sent", {f"{i}.yaml": "x" * 1000 for i in range(7)})
        files = files_to_upload(tmp_path / "sent")
        said = working_dir.describe(tmp_path / "sent", files)
        assert said.startswith("7 files, 7,000 bytes, of ")
        assert said.endswith("/sent: 0.yaml, 1.yaml, 2.yaml, 3.yaml, 4.yaml, ... (7 in all)")
        pack(tmp_path / "sent", files, tmp_path / "a.zip")
        with zipfile.ZipFile(tmp_path / "a.zip") as archive:
            assert {entry.external_attr >> 16 & 0o077 for entry in archive.infolist()} == {0}

    def test_too_large_names_the_largest(self, tmp_path, monkeypatch):
        monkeypatch.setattr(working_dir, "UPLOAD_BYTES", 1000)
        self.write(tmp_path, {"small.py": "x" * 10, "sub/weights.bin": "x" * 900})
        check_size(tmp_path, files_to_upload(tmp_path))
        self.write(tmp_path, {"more.bin": "x" * 91})
        with pytest.raises(ClusterError, match=r"3 files.*largest: sub/weights.bin .*more.bin .*\.gitignore"):
            check_size(tmp_path, files_to_upload(tmp_path))

    @pytest.mark.parametrize("content", [b"!\n", b"[z-a]\n", b"\xff\n"])
    def test_gitignore_that_is_none(self, tmp_path, content):
        (tmp_path / ".gitignore").write_bytes(content)
        with pytest.raises(ClusterError, match=r"\.gitignore: not as git reads it"):
            files_to_upload(tmp_path)

    def test_name_that_is_no_utf_8(self, tmp_path):
        (tmp_path / "sent").mkdir()
        (tmp_path / "sent" / os.fsdecode(b"\xff")).touch()
        with pytest.raises(ClusterError, match="cannot be packed"):
            pack(tmp_path / "sent", files_to_upload(tmp_path / "sent"), tmp_path / "a.zip")

    def test_missing_folder(self, tmp_path):
        with pytest.raises(ClusterError, match="no such folder"):
            files_to_upload(tmp_path / "gone")

    def test_equal_content_gives_equal_archives(self, tmp_path):
        digests = []
        for name in ("one", "two"):
            self.write(tmp_path / name, {"b.py": "2", "a.sh": "1"})
            (tmp_path / name / "a.sh").chmod(0o755)
            os.utime(tmp_path / name / "a.sh", (len(digests), len(digests)))
            digests.append(pack(tmp_path / name, files_to_upload(tmp_path / name), tmp_path / f"{name}.zip"))
        assert digests[0] == digests[1]
        with zipfile.ZipFile(tmp_path / "one.zip") as archive:
            assert archive.namelist() == ["a.sh", "b.py"]
            assert archive.getinfo("a.sh").external_attr >> 16 & 0o100
        self.write(tmp_path / "two", {"b.py": "3"})
        assert pack(tmp_path / "two", files_to_upload(tmp_path / "two"), tmp_path / "two.zip") != digests[0]

    def test_id_follows_command_and_content(self):
        ids = {derived_id(["a", "b"], ""), derived_id(["a b"], ""), derived_id(["a", "b"], "x")}
        assert len(ids) == 3
        assert derived_id(["a", "b"], "") in ids


class TestToken:
    def test_is_found_where_ray_looks_in_its_order(self, tmp_path, monkeypatch):
        assert dashboard.find_token() == ""
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("default\n")
        assert dashboard.find_token() == "default"
        (tmp_path / "file").write_text("file\n")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
        assert dashboard.find_token() == "file"
        monkeypatch.setenv("RAY_AUTH_TOKEN", "variable")
        assert dashboard.find_token() == "variable"
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        assert dashboard.find_token() == ""

    @pytest.mark.parametrize("content", [None, " \n"])
    def test_named_file_must_hold_one(self, tmp_path, monkeypatch, content):
        if content is not None:
            (tmp_path / "file").write_text(content)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
        with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN_PATH"):
            dashboard.find_token()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status, body = self.server.answers.get(self.path, (404, "no"))  # type: ignore[attr-defined]
        self.server.tokens.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
        self.send_response(status)
        self.end_headers()
        self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A dashboard's answers, by path, and the tokens that it was sent."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.answers = {  # type: ignore[attr-defined]
            "/api/authentication_mode": (200, {"authentication_mode": "disabled"}),
            "/api/version": (200, {"ray_version": "2.60.0"}),
        }
        server.tokens = []  # type: ignore[attr-defined]
        server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class TestDashboard:
    def test_on_this_machine_needs_no_token(self, server, monkeypatch):
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
        assert dashboard.find_dashboard(server.url + "/").headers == {}
        assert set(server.tokens) == {None}  # it did not ask for one, so it gets none

    def test_that_wants_a_token_gets_it(self, server, monkeypatch):
        server.answers["/api/authentication_mode"] = (200, {"authentication_mode": "token"})
        with pytest.raises(ClusterError, match="wants a token and none was found; set RAY_AUTH_TOKEN"):
            dashboard.find_dashboard(server.url)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
        assert dashboard.find_dashboard(server.url).headers == {"Authorization": "Bearer secret"}
        server.answers["/api/version"] = (403, "Forbidden")
        with pytest.raises(ClusterError, match="refuses the token"):
            dashboard.find_dashboard(server.url)

    def test_elsewhere_needs_a_token_or_consent(self, monkeypatch):
        with pytest.raises(ClusterError, match="no token was found.*--insecure"):
            dashboard.find_dashboard("http://192.0.2.9:8265")  # nothing is asked there: it would take seconds
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
        asked = []

        def ask(url, path, headers=None):
            asked.append(headers)
            return {"ray_version": "2.60.0"}  # and no authentication mode, as before Ray 2.52

        monkeypatch.setattr(dashboard, "_ask", ask)
        with pytest.raises(ClusterError, match="has no token authentication.*--insecure"):
            dashboard.find_dashboard("192.0.2.9:8265")
        assert dashboard.find_dashboard("192.0.2.9:8265", insecure=True).url == "http://192.0.2.9:8265"
        assert not any(asked)  # the token is not told to a cluster that does not want it

    @pytest.mark.parametrize("url", ["http://localhost:1", "http://127.1.2.3:1", "https://[::1]:1"])
    def test_this_machine(self, url):
        assert dashboard._is_loopback(url)

    @pytest.mark.parametrize("url", ["http://127.0.0.1.example.org:1", "http://10.0.0.1:1", "http://head:1"])
    def test_not_this_machine(self, url):
        assert not dashboard._is_loopback(url)

    @pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://", "file:///etc/passwd", "http://[::1"])
    def test_address_must_be_one(self, address):
        with pytest.raises(ClusterError, match="give the dashboard's address"):
            dashboard.find_dashboard(address)

    def test_unreachable(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            with pytest.raises(ClusterError, match="no Ray dashboard answers"):
                connect(f"http://127.0.0.1:{taken.getsockname()[1]}")

    def test_that_never_answers(self, monkeypatch):
        monkeypatch.setattr(dashboard, "CONNECT_TIMEOUT_S", 0.2)
        with (
            socket.create_server(("127.0.0.1", 0)) as silent,
            pytest.raises(ClusterError, match="no Ray dashboard answers"),
        ):
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}")

    def test_other_server(self, server):
        server.answers["/api/authentication_mode"] = (200, "<html>")
        with pytest.raises(ClusterError, match="is no Ray dashboard"):
            connect(server.url)
        server.answers["/api/authentication_mode"] = (500, "oops")
        with pytest.raises(ClusterError, match="error of its own"):
            connect(server.url)

    @pytest.mark.parametrize("theirs", ["2.59.1", "1.13.0"])
    def test_too_old(self, server, theirs):
        server.answers["/api/version"] = (200, {"ray_version": theirs})
        with pytest.raises(ClusterError, match=f"runs Ray {theirs}, nested-ats needs 2.60"):
            connect(server.url)

    def test_other_version_is_a_warning(self):
        assert dashboard.check_version("2.61.0", "2.60.0") == "the cluster runs Ray 2.61.0, here is 2.60.0"
        assert dashboard.check_version("3.0.0.dev0", "3.0.0.dev0") == ""

    def test_oldest_version_is_that_of_the_extra(self):
        text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
        assert f"default]>={dashboard.OLDEST_RAY[0]}.{dashboard.OLDEST_RAY[1]}" in text


class _Client:
    """Stands in for Ray's: states by call of get_job_info, and what each connection to the log brings."""

    def __init__(self, states, logs=()):
        self.states, self.logs = list(states), list(logs)

    def get_job_info(self, job_id):
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return SimpleNamespace(
            submission_id=job_id, status=state, entrypoint="x", driver_exit_code=None, message="m", start_time=0
        )

    async def tail_job_logs(self, job_id):
        for piece in self.logs.pop(0):
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                await asyncio.sleep(60)
            yield piece


class TestFollow:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        monkeypatch.setattr(jobs, "_POLL_S", 0.001)
        monkeypatch.setattr(jobs, "_QUIET_S", 0.05)

    def made(self, *arguments):
        return Jobs(_Client(*arguments), dashboard.Dashboard("http://head:8265", {}, ""))

    def test_lost_and_silent_connections_neither_lose_nor_repeat_a_character(self):
        connections = [["ab", RuntimeError("closed")], ["a", RuntimeError("closed")], ["a", "bc", None], ["abcdef"]]
        pieces = []
        states = ["PENDING", *["RUNNING"] * 4, "SUCCEEDED"]
        job = self.made(states, connections).follow("j", pieces.append)
        assert "".join(pieces) == "abcdef"
        assert job.exit_status == 0

    def test_rest_of_the_log_is_read_after_the_end(self):
        pieces = []
        self.made(["RUNNING", "FAILED"], [["ab", RuntimeError("closed")], ["abc"]]).follow("j", pieces.append)
        assert "".join(pieces) == "abc"

    def test_pending_for_ever(self):
        with pytest.raises(ClusterError, match=r"still PENDING after 0 s \(m\); follow it with .* end it with"):
            self.made(["PENDING"]).follow("j", print, pending_s=0.01)

    def test_dashboard_gone(self, monkeypatch):
        monkeypatch.setattr(jobs, "_GONE_S", 0.0)
        with pytest.raises(ClusterError, match="refuses: gone.*The job may go on; follow it with"):
            self.made(["RUNNING", RuntimeError("gone")], [[]] * 9).follow("j", print)

    def test_reader_that_is_gone_ends_it(self):
        def closed(_):
            raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            self.made(["RUNNING"], [["a"]]).follow("j", closed)

    def test_second_try_of_a_job_gets_the_next_number(self):
        made = self.made([])
        names = ["j", "j-2", "k-1234"]
        made.all = lambda: [jobs.Job(name, "FAILED", "x", 1, "") for name in names]
        for name, free in (("j", "j-3"), ("j-2", "j-3"), ("k-1234", "k-1234-2")):
            with pytest.raises(ClusterError, match=f"add --id {free}$"):
                made.submit(["x"], job_id=name)

    @pytest.mark.parametrize(
        ("state", "code", "status"),
        [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 130)],
    )
    def test_exit_status(self, state, code, status):
        assert jobs.Job("j", state, "x", code, "").exit_status == status


class TestNodes:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        monkeypatch.setattr(nodes, "_POLL_S", 0.001)

    def test_head_that_comes_later_is_waited_for(self, monkeypatch):
        tries = iter([ClusterError("not yet"), ClusterError("not yet"), None])

        @contextmanager
        def session(address):
            error = next(tries)
            if error:
                raise error
            yield

        counts = iter([1, 1, 2])
        monkeypatch.setattr(nodes, "session", session)
        monkeypatch.setattr(nodes, "_alive", lambda: [nodes.Node("a", 1, 0)] * next(counts))
        assert len(nodes.wait_for_nodes("head:6379", 2, timeout_s=60)) == 2
        assert next(tries, "all used") == "all used"

    def test_too_few(self, monkeypatch):
        monkeypatch.setattr(nodes, "session", nullcontext)
        monkeypatch.setattr(nodes, "_alive", lambda: [nodes.Node("10.0.0.1", 1, 0)])
        with pytest.raises(ClusterError, match=r"1 of 3 nodes have joined \(10.0.0.1\)"):
            nodes.wait_for_nodes("head:6379", 3, timeout_s=0.01)

    def test_nobody_there(self):
        with pytest.raises(ClusterError, match="no Ray cluster answers"):
            nodes.wait_for_nodes("127.0.0.1:1")


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def head():
    """A head of two CPUs with token authentication; its dashboard's address. Nothing of it outlives the module."""
    home = tempfile.mkdtemp(prefix="j", dir="/tmp")  # Ray's socket paths must stay short
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = {name: _free_port() for name in names}
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0", "--object-store-memory=200000000"]
    command += ["--dashboard-host=127.0.0.1", *(f"--{name}={port}" for name, port in ports.items())]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": home, "RAY_TMPDIR": home, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    with (Path(home) / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 120
            while not _answers(address):
                assert process.poll() is None, (Path(home) / "log").read_text()
                assert time.monotonic() < end, "the head did not start"
                time.sleep(0.5)
            yield address
        finally:
            processes = [*psutil.Process(process.pid).children(recursive=True), process]
            for one in processes:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
            psutil.wait_procs(processes[:-1], timeout=10)
    shutil.rmtree(home, ignore_errors=True)


def _answers(address):
    try:
        dashboard._ask(address, "/api/version", {"Authorization": f"Bearer {TOKEN}"})
    except ClusterError:
        return False
    return True


@pytest.fixture
def there(head, monkeypatch):
    """The jobs of the head; a RAY_ADDRESS that leads elsewhere does not matter."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    found = connect(head)
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:1"
    return found


@pytest.fixture
def cli(head):
    """Start ``nested-ats job`` in a process of its own."""

    def start(*words, **options):
        command = [sys.executable, "-c", COMMAND, "job", words[0], "--address", head, *words[1:]]
        environment = os.environ | {"RAY_AUTH_TOKEN": TOKEN}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([str(word) for word in command], env=environment, text=True, **pipes, **options)

    def run(*words):
        process = start(*words)
        out, err = process.communicate(timeout=240)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    run.start = start  # type: ignore[attr-defined]
    return run


SMALL = """
model:
  levels:
    - {downsample: 4, samples: 3, stride: 4, channels: [4]}
    - {downsample: 2, samples: 3, size: 16, stride: 4, channels: [4]}
  patch_size: 24
  features: 8
train: {epochs: 1, batch_size: 4}
predict: {draws: 1}
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # aiohttp 3.14, in Ray's own client
class TestHead:
    def test_trains_and_predicts(self, cli, tmp_path):
        scenes, pyramids = tmp_path / "scenes", tmp_path / "pyramids"
        made = [["synth", "signs", "--count", "12", "--size", "256", "--out", scenes]]
        made += [["convert", scenes / "manifest.csv", "--out", pyramids]]
        for words in made:
            subprocess.run([sys.executable, "-m", "pipeline.cli", *words], check=True, capture_output=True)
        (tmp_path / "sent").mkdir()
        (tmp_path / "sent" / "small.yaml").write_text(SMALL)
        manifest, run = pyramids / "manifest.csv", tmp_path / "runs" / "first"
        common = ["--out", run, "--cluster", "auto", "--device", "cpu"]
        train = ["train", "--manifest", manifest, "--config", "small.yaml", *common]
        done = cli("submit", "--working-dir", tmp_path / "sent", "--id", "first", "--", *train)
        assert done.code == 0, done
        assert f"sending 1 files, {len(SMALL)} bytes, of {tmp_path / 'sent'}: small.yaml\n" in done.err
        assert "first" in done.out.splitlines()
        assert "epoch 1" in done.out
        assert (run / "model" / "model.safetensors").exists()
        predict = ["predict", run, manifest, "--out", run / "test", *common[2:]]
        done = cli("submit", "--", *predict)
        assert done.code == 0, done
        assert str(run / "test" / "predictions.csv") in done.out.splitlines()
        assert len((run / "test" / "predictions.csv").read_text().splitlines()) == 13

    def test_failing_job_gives_its_exit_code_and_is_no_second_time_submitted(self, cli):
        words = ["submit", "--", "info", "/gone/slide.tif"]
        done = cli(*words)
        assert done.code == 4
        assert "error: /gone/slide.tif: does not exist; check the path\n" in done.out
        job_id = done.out.splitlines()[0]
        again = cli(*words)
        assert again.code == 2
        assert again.err.startswith(f"error: job {job_id} was submitted before and has FAILED (exit code 4); see ")
        assert f"add --id {job_id}-2\n" in again.err
        assert cli("status", job_id).out.startswith(f"{job_id}  FAILED  exit code 4  nested-ats info /gone/slide.tif")

    def test_arguments_arrive_as_they_are(self, there):
        words = ["a b", "$HOME", "'", '"', "; exit 9", "`id`", "*", "~", "line\nline", "", "é"]
        job_id = there.submit([sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))", *words])
        pieces = []
        assert there.follow(job_id, pieces.append).exit_status == 0
        assert ascii(words) in "".join(pieces)

    def test_working_folder_arrives_without_what_is_ignored(self, there, tmp_path):
        for name in (".gitignore", "kept.txt", "big.bin", "sub/kept.sh"):
            (tmp_path / "sent" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "sent" / name).write_text("*.bin\n")
        (tmp_path / "sent" / "sub" / "kept.sh").chmod(0o755)
        code = "import os; print(sorted(os.listdir()), os.access('sub/kept.sh', os.X_OK))"
        job_id = there.submit([sys.executable, "-c", code], working_dir=tmp_path / "sent")
        there.follow(job_id, lambda _: None)
        assert "['.gitignore', 'kept.txt', 'sub'] True\n" in there.logs(job_id)

    def test_ctrl_c_ends_following_and_stop_ends_the_job(self, there, cli):
        command = [sys.executable, "-c", "import time; print('started'); time.sleep(300)"]
        job_id = there.submit(command)
        follower = cli.start("logs", "--follow", job_id)
        assert any("started" in line for line in follower.stdout)
        with pytest.raises(ClusterError, match=f"{job_id} was submitted before and is RUNNING; follow it with"):
            there.submit(command)
        follower.send_signal(signal.SIGINT)
        _, err = follower.communicate(timeout=30)
        assert follower.returncode == 130
        assert f"the job goes on: follow it with `nested-ats job logs --follow {job_id} --address" in err
        assert there.info(job_id).state == "RUNNING"
        assert there.stop(job_id).exit_status == 130
        assert job_id in {job.id for job in there.all() if job.state == "STOPPED"}
        assert there.submit(["true"], job_id=f"{job_id}-2") == f"{job_id}-2"
        with pytest.raises(ClusterError, match=f"STOPPED; see .* add --id {job_id}-3"):
            there.submit(command)

    def test_unknown_job(self, there):
        with pytest.raises(ClusterError, match="no job nobody at .*; `nested-ats job list"):
            there.info("nobody")

    def test_missing_and_wrong_token(self, head, monkeypatch):
        with pytest.raises(ClusterError, match="wants a token and none was found"):
            connect(head)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        with pytest.raises(ClusterError, match="refuses the token"):
            connect(head)
