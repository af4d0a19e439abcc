"""Take the picture of a report for the documentation: python docs/images/shoot_report.py RUN_FOLDER.

Needs Chromium and the package playwright (extra `test`). Writes docs/images/report_page.png.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

OUTPUT = Path(__file__).with_name("report_page.png")
WIDTH, HEIGHT = 1000, 780


def shoot(report: Path, output: Path) -> None:
    """Write the top of a report as a PNG file."""
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(report.resolve().as_uri(), timeout=300_000)
        page.screenshot(path=str(output), timeout=300_000)
        browser.close()


if __name__ == "__main__":
    shoot(Path(sys.argv[1]) / "report.html", OUTPUT)
