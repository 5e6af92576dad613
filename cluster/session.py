"""Hold a Ray session for the length of a `with` block, or none at all.

Notable: a session that this process already holds is used again, so calls can be nested, and one head can serve a
whole run of tests. What was started here is shut down here, and nothing else ever is. A local instance listens on the
loopback interface only, and keeps its sockets and logs in a folder of its own that is removed with it.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.errors import ClusterError, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

OBJECT_STORE_BYTES = 200_000_000  # workers fetch their own chunks, so the store carries only small messages
CONNECT_TIMEOUT_S = 10.0
_LAST_LINES = 3  # of each log of a local instance that did not come up
_SWEEPS, _SWEEP_PAUSE_S = 50, 0.1  # workers that are being ended may still write their logs

# Ray reads these when it is imported or initialised; a value that the user has set wins.
_DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # This will be Ray's default; without it every worker with 0 GPUs warns of that.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Its 30 s are few on a machine that is busy with other work.
    "RAY_gcs_server_port_wait_time_s": "60",
}

# Ray has workers search the driver's folder first, where a `storage.py` of the user's may lie.
_OWN_PACKAGES = "nested_ats_start.keep_own"

_open_address: str | None = None


@contextmanager
def session(address: str, *, num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[None]:
    """Hold a Ray session while the block runs.

    Parameters
    ----------
    address
        ``"none"`` is no Ray at all, and ``"local"`` a new Ray instance on this machine, never somebody else's.
        ``"auto"``, ``"host:port"`` and ``"ray://host:port"`` name a running cluster to connect to.
    num_cpus, num_gpus
        The logical resources of a new local instance, which by default are those of the machine.

    Raises
    ------
    ClusterError
        Ray is not installed, the cluster cannot be reached, or another session is open in this process.
    """
    global _open_address  # noqa: PLW0603 - Ray's own session is one per process, too
    if address in ("none", _open_address):
        yield
        return
    ray = require_ray()
    if address != "local":
        _probe(address)
    if _open_address is not None:
        raise ClusterError(f"cannot open {address!r}: a session with {_open_address!r} is open in this process")
    with _temporary_folder() if address == "local" else nullcontext("") as folder:
        _start(ray, address, folder, num_cpus, num_gpus)
        _open_address = address
        try:
            yield
        finally:
            _open_address = None
            ray.shutdown()


def require_ray() -> ModuleType:
    """Import Ray with this project's environment.

    Raises
    ------
    ClusterError
        Ray is not installed; the message says how to install it.
    """
    for name, value in _DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ClusterError(
            "Ray is not installed: run pip install 'nested-ats[cluster]', or use the address 'none'"
        ) from error
    module: ModuleType = ray
    return module


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """Make a folder where Ray would have its own, and remove it once all of Ray's processes have let go of it."""
    # Ray chooses so, too: the paths of its sockets must be short, and macOS has long temporary folders.
    place = os.environ.get("RAY_TMPDIR") or ("/tmp" if sys.platform == "darwin" else None)  # noqa: S108
    folder = tempfile.mkdtemp(prefix="ray-", dir=place)
    try:
        yield folder
    finally:
        for _ in range(_SWEEPS):
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.exists(folder):
                break
            time.sleep(_SWEEP_PAUSE_S)


def _start(ray: ModuleType, address: str, folder: str, num_cpus: int | None, num_gpus: int | None) -> None:
    from ray._private import ray_constants

    options: dict[str, Any] = {"address": address, "logging_level": logging.ERROR, "log_to_driver": False}
    environment = _worker_environment(address)
    # Ray's switch for systems on which it has no clusters: this node is 127.0.0.1, and all that it opens is there.
    # Its public setting, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER, is read once and for all when Ray is imported.
    ray_constants.ENABLE_RAY_CLUSTER = address != "local"
    if address == "local":
        options |= {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": folder,
        }
        _forget_token(ray)
        environment |= {"TMPDIR": folder} | dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _loopback())
    runtime_env = {"env_vars": environment, "worker_process_setup_hook": _OWN_PACKAGES}
    # On a busy machine one of a local instance's processes may not come up in time: it is started once more.
    for last in (address != "local", True):
        try:
            ray.init(runtime_env=runtime_env, **options)
        except (Exception, SystemExit) as error:
            if last:
                hint = "; if the cluster wants a token, set RAY_AUTH_MODE=token and its token"
                if address == "local":
                    hint = _last_words(folder)
                raise ClusterError(f"no Ray session at {address!r}: {one_line(error)}{hint}") from error
        else:
            break


def _forget_token(ray: ModuleType) -> None:
    """Have Ray look for its token again, as the processes that it starts do.

    This process may know a token of a home folder that was another one then, or of a file that is gone; Ray would
    make none where they look, and they would not come up.
    """
    if (loader := getattr(ray._raylet, "AuthenticationTokenLoader", None)) is not None:
        loader.instance().reset_cache()


def _last_words(folder: str) -> str:
    """Tell the last lines that the servers of local instances wrote, whose logs go with the folder."""
    words = []
    for log in sorted(Path(folder).glob("session_[0-9]*/logs/gcs_server.*")):
        records = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("[")]
        words += [line for line in records if not line.endswith(("stats:", "state:", "table:"))][-_LAST_LINES:]
    return f"; its servers' last words: {' '.join(words)}" if words else ""


def _loopback() -> str:
    """Name the interface of 127.0.0.1, which is ``lo``, or ``lo0`` on macOS."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _worker_environment(address: str) -> dict[str, str]:
    """Give every worker process one compute thread, and our packages on its path."""
    variables = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if address == "local":
        root = str(Path(__file__).resolve().parent.parent)
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return variables


def _probe(address: str) -> None:
    """Fail within seconds if nothing listens, where Ray itself would try for minutes and then end the process."""
    try:
        target = urlsplit(address if "://" in address else f"ray://{address}")
        port = target.port
    except ValueError as error:
        raise ClusterError(f"{address!r} is no address of a Ray cluster ({error}); give HOST:PORT or auto") from error
    if port is None:
        return  # "auto": Ray looks for a running instance on this machine, without waiting
    try:
        socket.create_connection((target.hostname or "", port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address!r} ({one_line(error)}); is it running, and is the port right?"
        ) from error
