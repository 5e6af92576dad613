import os
import socket
import subprocess
import sys
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import torch

from cluster import ClusterError, fit, run_tasks, session

WITHOUT_RAY = """
import sys, tempfile, cluster
with cluster.session("none"):
    outcomes = list(cluster.run_tasks(lambda: str, [1, 2]))
    folder = tempfile.gettempdir()
    value = cluster.fit(lambda context, arguments: context.world_size, {}, device="cpu")
assert [o.result for o in outcomes] == ["1", "2"] and value == 1
assert not any(name == "ray" or name.startswith("ray.") for name in sys.modules)
"""
RAY_MISSING = """
import sys, cluster
sys.modules["ray"] = None
try:
    with cluster.session("local"): pass
except cluster.ClusterError as error:
    assert "pip install 'nested-ats[cluster]'" in str(error), error
else:
    raise AssertionError
"""
UNREACHABLE = """
import sys, cluster
try:
    with cluster.session(sys.argv[1]): pass
except cluster.ClusterError as error:
    assert sys.argv[1] in str(error), error
else:
    raise AssertionError
"""
LATE = """
import os, sys, time, ray, cluster
from pathlib import Path
starts, init = [], ray.init
def servers_speak(folder):
    until = time.monotonic() + 100
    while not any(log.stat().st_size for log in Path(folder).glob("session_[0-9]*/logs/gcs_server.out")):
        assert time.monotonic() < until
        time.sleep(0.1)
def late(**options):
    starts.append(options)
    os.environ["RAY_gcs_server_port_wait_time_s"] = "0" if len(starts) <= int(sys.argv[1]) else "60"
    try:
        return init(**options)
    except RuntimeError:
        servers_speak(options["_temp_dir"])
        raise
ray.init = late
try:
    with cluster.session("local", num_cpus=1):
        assert [outcome.result for outcome in cluster.run_tasks(lambda: str, [1])] == ["1"]
except cluster.ClusterError as error:
    assert sys.argv[1] == "2" and "Timed out" in str(error) and "last words: [" in str(error), error
else:
    assert sys.argv[1] == "1"
assert len(starts) == 2
"""

HOMES = """
import os, sys, cluster
for os.environ["HOME"] in sys.argv[1:]:
    with cluster.session("local", num_cpus=1):
        assert [outcome.result for outcome in cluster.run_tasks(lambda: str, [1])] == ["1"]
"""


def run_python(code, *arguments):
    """Run in a fresh process; its standard error is the assertion's message."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_ray_is_not_imported_without_an_address():
    run_python(WITHOUT_RAY)


def test_missing_ray_is_named_with_the_fix():
    run_python(RAY_MISSING)


@pytest.mark.ray
@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_unreachable_cluster_is_refused_at_once(form):
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        run_python(UNREACHABLE, form.format(unused.getsockname()[1]))


@pytest.mark.ray
@pytest.mark.parametrize("late", [1, 2])
def test_a_local_instance_that_does_not_come_up_is_started_once_more(late, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    run_python(LATE, str(late))


@pytest.mark.ray
def test_a_process_that_knows_the_token_of_another_home_starts_a_local_instance(tmp_path_factory):
    run_python(HOMES, *(str(tmp_path_factory.mktemp("home")) for _ in range(2)))


@pytest.mark.parametrize("address", ["head:port", "head:99999", "[::1"])
def test_address_that_is_none_is_refused(address):
    with pytest.raises(ClusterError, match="is no address of a Ray cluster"), session(address):
        pass


@pytest.mark.ray
def test_nested_session_is_the_same_one(head):
    import ray

    before = ray.get_runtime_context().get_job_id()
    with session("local"):
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized()


@pytest.mark.ray
def test_second_address_is_refused(head):
    with pytest.raises(ClusterError, match="'local' is open"), session("auto"):
        pass


def look_around():
    def look(_item):
        import cluster

        return {"threads": os.environ["OMP_NUM_THREADS"], "path": os.environ["PYTHONPATH"], "room": cluster.__file__}

    return look


@pytest.mark.ray
def test_workers_import_our_packages_and_use_one_thread(head):
    import cluster

    (outcome,) = run_tasks(look_around, [0], address="local")
    assert outcome.error is None
    root = os.path.dirname(os.path.dirname(cluster.__file__))
    assert outcome.result["path"].split(os.pathsep)[0] == root
    assert outcome.result["room"] == cluster.__file__
    assert outcome.result["threads"] == os.environ.get("OMP_NUM_THREADS", "1")


def listening(context, arguments):
    """Addresses on which the driver's processes listen while two workers train: of Ray, of torch and of gloo."""
    context.all_reduce(torch.ones(1))  # after which all have what they need
    driver = psutil.Process(arguments["driver"])
    found = []
    for process in [driver, *driver.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            connections = process.net_connections("inet")
            found += [(process.name(), one.laddr.ip) for one in connections if one.status == psutil.CONN_LISTEN]
    context.all_reduce(torch.ones(1))  # until then both are there to be looked at
    return found


def only_from_here(address):
    address = ip_address(address)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_session_listens_on_the_loopback_interface_only(head, tmp_path):
    """That nothing of it stays in the temporary folder, the fixture `ray_head` asserts when all is over."""
    found = fit(listening, {"driver": os.getpid()}, address="local", workers=2)
    assert {"gcs_server", "raylet"} < {name for name, _ in found}
    assert sum("_TrainingWork" in name for name, _ in found) >= 2  # the workers themselves
    assert [(name, address) for name, address in found if not only_from_here(address)] == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_module_of_the_users_does_not_shadow_ours_in_workers(tmp_path):
    """Ray has workers search first the folder in which the driver was started."""
    (tmp_path / "storage.py").write_text("raise SystemExit('the wrong one')\n")
    code = """if True:
        import sys
        sys.path.remove("")  # as it is in the command
        from functools import partial
        from importlib import import_module
        from cluster import run_tasks
        [outcome] = run_tasks(partial(partial, import_module), ["storage.errors"], address="local", attempts=1)
        print(outcome)
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert "storage/errors.py" in done.stdout, done.stderr
