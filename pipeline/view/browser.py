"""Open a browser on a viewer's page."""

from __future__ import annotations

import html
import os
import sys
import tempfile
import threading
import webbrowser
from pathlib import Path

_SECONDS = 30.0  # in which a browser has read the file


def open_browser(url: str) -> None:
    """Open a page in the user's browser, where there is a screen.

    The address goes by a file that only the user can read: others on this machine can see the arguments of a
    process, and would learn the token.
    """
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    handle, name = tempfile.mkstemp(prefix="nested-ats-", suffix=".html")
    with os.fdopen(handle, "w") as file:
        file.write(f'<!doctype html><meta http-equiv="refresh" content="0;url={html.escape(url)}">')
    webbrowser.open(Path(name).as_uri())
    ending = threading.Timer(_SECONDS, Path(name).unlink, kwargs={"missing_ok": True})
    ending.daemon = True
    ending.start()
