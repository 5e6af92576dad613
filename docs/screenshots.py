r"""Photograph the viewer, and a report, in Chromium: docs/viewer.jpg is made so.

    python docs/screenshots.py pyramids/manifest.csv runs/first --out docs/viewer.jpg \
        --slide 'slide-11&x=1250&y=1250&zoom=0.42'
    python docs/screenshots.py pyramids/manifest.csv runs/first --report runs/first/report.html --out report.jpg

It needs the extras ``view`` and ``dev``, and Chromium (``apt-get install chromium``).
"""

from __future__ import annotations

import argparse
import io
import shutil
from contextlib import ExitStack
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, ViewportSize, sync_playwright

from pipeline.data.discovery import find_slides
from pipeline.files import write_atomic
from pipeline.interrupt import run_main
from pipeline.view.cohort import cases_of, of_run
from pipeline.view.serving import Serving

SIZE: ViewportSize = {"width": 1200, "height": 713}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
TILES_MS = 5000  # until tiles that were asked for are drawn


def photograph(page: Page, address: str, out: Path) -> None:
    """Load a page, wait until it is at rest, and write what it shows as a JPEG."""
    page.goto(address)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(TILES_MS)
    picture = io.BytesIO()
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(picture, "jpeg", quality=88)
    write_atomic(out, picture.getvalue())


def main() -> None:
    """Photograph one page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("run", type=Path)
    parser.add_argument("--slide", help="the slide that is shown, as the viewer's address has it; default: the first")
    parser.add_argument("--report", type=Path, help="this page in place of the viewer")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    place = next(filter(None, map(shutil.which, CHROMIUM)), None)
    with ExitStack() as stack:
        browser = stack.enter_context(sync_playwright()).chromium.launch(executable_path=place, args=["--no-sandbox"])
        stack.callback(browser.close)
        page = browser.new_page(viewport=SIZE)
        if chosen.report:
            photograph(page, chosen.report.resolve().as_uri(), chosen.out)
            return
        predictions, heatmaps = of_run(chosen.run)
        cases = cases_of(find_slides([chosen.manifest]), predictions=predictions, heatmaps=heatmaps, tissue=True)
        serving = stack.enter_context(Serving(cases))
        photograph(page, serving.url + (f"#slide={chosen.slide}" if chosen.slide else ""), chosen.out)


if __name__ == "__main__":
    run_main(main, "interrupted; nothing was written")
