"""Ask the dashboard of a Ray cluster, before Ray's client does, whether it is there, safe, ours and new enough.

Notable: Ray's client connects without a time limit, and looks for a token in ways that differ between its commands.
Here a plain HTTP request with a limit asks each question, and the token is found once and sent explicitly.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import ClusterError, one_line
from cluster.session import CONNECT_TIMEOUT_S, require_ray

OLDEST_RAY = (2, 60)  # pyproject.toml has the same
_TOKEN_HELP = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or copy the head's ~/.ray/auth_token"  # noqa: S105 - no token


@dataclass(frozen=True)
class Dashboard:
    """A dashboard that may be used.

    Attributes
    ----------
    headers
        They are sent with every request, and hold the token.
    warning
        What a user should know; it may be empty.
    """

    url: str
    headers: dict[str, str]
    warning: str


def find_dashboard(address: str, *, insecure: bool = False) -> Dashboard:
    """Reach the dashboard of a running cluster, or say within seconds why not.

    Parameters
    ----------
    address
        ``http://HOST:8265`` or https; ``HOST:8265`` means http.
    insecure
        Whether to go on where a dashboard that is not on this machine has no token authentication.

    Raises
    ------
    ClusterError
        Ray is not installed, nothing answers, the token is missing or wrong, there is no authentication, or the
        cluster's Ray is too old.
    """
    url = _url(address)
    ray = require_ray()
    token = find_token()
    guarded = insecure or _is_loopback(url)
    if not (token or guarded):
        raise ClusterError(f"{url} is not on this machine and no token was found; {_TOKEN_HELP}, or give --insecure")
    authenticated = _ask(url, "/api/authentication_mode").get("authentication_mode") == "token"
    if authenticated and not token:
        raise ClusterError(f"{url} wants a token and none was found; {_TOKEN_HELP}")
    if not (authenticated or guarded):
        raise ClusterError(
            f"{url} has no token authentication: whoever reaches it can run commands there. Start the cluster with "
            "RAY_AUTH_MODE=token (see docs/cluster.md), or give --insecure"
        )
    headers = {"Authorization": f"Bearer {token}"} if authenticated else {}
    theirs = str(_ask(url, "/api/version", headers).get("ray_version", ""))
    warning = check_version(theirs, ray.__version__)
    return Dashboard(url, headers, warning)


def find_token() -> str:
    """Look for the token where Ray does, in the same order; the answer is empty where there is none.

    Raises
    ------
    ClusterError
        RAY_AUTH_TOKEN_PATH names a file that cannot be read or is empty.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return ""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text().strip()
    except OSError as error:
        if not named:
            return ""
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH: {path} cannot be read ({one_line(error)})") from error
    if named and not token:
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH: {path} is empty; write the cluster's token into it")
    return token


def check_version(theirs: str, ours: str) -> str:
    """Compare the cluster's version of Ray with what this package needs, and with ours.

    Returns
    -------
    str
        A warning, or an empty text. Jobs run with the cluster's Ray alone, so another version here is no error.

    Raises
    ------
    ClusterError
        The cluster's Ray is older than `OLDEST_RAY`.
    """
    oldest = ".".join(map(str, OLDEST_RAY))
    try:
        major, minor = map(int, theirs.split(".")[:2])
    except ValueError:
        raise ClusterError(f"the cluster names no version of Ray ({theirs!r}); nested-ats needs {oldest}") from None
    if (major, minor) < OLDEST_RAY:
        raise ClusterError(
            f"the cluster runs Ray {theirs}, nested-ats needs {oldest} or newer: use an image with Ray {ours}"
        )
    return "" if theirs == ours else f"the cluster runs Ray {theirs}, here is {ours}"


def refused(url: str) -> str:
    """Say that the token is wrong."""
    return f"{url} refuses the token: it is not the cluster's; {_TOKEN_HELP}"


def _url(address: str) -> str:
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
    except ValueError:  # one bracket is missing
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(f"{address}: give the dashboard's address, as in http://HOST:8265")
    return url.rstrip("/")


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ask(url: str, path: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """GET a JSON object from the dashboard within `CONNECT_TIMEOUT_S`; it is empty where the path is unknown."""
    request = urllib.request.Request(url + path, headers=headers or {})  # noqa: S310 - _url allows http(s) only
    try:
        with urllib.request.urlopen(request, timeout=CONNECT_TIMEOUT_S) as answer:  # noqa: S310
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise ClusterError(refused(url)) from error
        if error.code == 404:
            return {}
        raise ClusterError(f"{url} answers with an error of its own ({error.code} {error.reason})") from error
    except (OSError, http.client.HTTPException) as error:
        raise ClusterError(
            f"no Ray dashboard answers at {url} ({one_line(error)}); is the cluster running, the port that of its "
            "dashboard (8265), and a tunnel to it open?"
        ) from error
    except ValueError as error:
        raise ClusterError(f"{url} answers, but is no Ray dashboard; check host and port (8265)") from error
    return found if isinstance(found, dict) else {}
