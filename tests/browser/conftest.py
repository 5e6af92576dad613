"""Chromium, driven by Playwright, where there is one.

`.ci/run` installs it by apt-get and sets NESTED_ATS_BROWSER=required, with which a missing one fails the tests.
Screenshots go to the folder that NESTED_ATS_SCREENSHOTS names, to be looked at.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def chromium():
    """A running Chromium."""
    place = next(filter(None, map(shutil.which, NAMES)), None)
    if place is None:
        if os.environ.get("NESTED_ATS_BROWSER") == "required":
            pytest.fail("NESTED_ATS_BROWSER is required, and there is no Chromium: apt-get install chromium")
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        # There is no sandbox for root, as whom CI runs; the pages are our own.
        browser = playwright.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory) -> Path:
    """Folder of what is to be looked at."""
    folder = Path(os.environ.get("NESTED_ATS_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
