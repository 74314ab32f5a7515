"""The pictures of docs/playground.md, taken of the page as it is: `make screenshots`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from sightline import demo
from tests.servers import ServerProcess

IMAGES = Path(__file__).parents[1] / "docs" / "images"
DESKTOP: dict[str, Any] = {"viewport": {"width": 860, "height": 640}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 780}, "has_touch": True}
MESSAGE = "#parts textarea:last-child"


def converse(page: Page, url: str) -> None:
    """A greedy conversation about two pictures, and a third one being asked about."""
    page.goto(url)
    page.wait_for_selector("#send:enabled")
    page.click("#open-settings")
    page.fill("#temperature", "0")
    page.click("#open-settings")
    page.set_input_files("#file", [str(demo.sample_path(name)) for name in ("shapes.png", "word.png")])
    page.fill(MESSAGE, "Describe the first image, then the second.")
    page.press(MESSAGE, "Enter")
    page.locator(".copies").wait_for()
    page.set_input_files("#file", str(demo.sample_path("counting.png")))
    page.wait_for_selector(".chip .muted:has-text('tokens')")
    page.fill(MESSAGE, "How many stars are there?")
    page.mouse.move(0, 0)
    page.wait_for_timeout(400)


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with ServerProcess([]) as server, sync_playwright() as playwright:
        server.wait_ready()
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, options in (
            ("light", {**DESKTOP, "color_scheme": "light"}),
            ("dark", {**DESKTOP, "color_scheme": "dark"}),
            ("phone", {**PHONE, "color_scheme": "light"}),
        ):
            page = browser.new_page(**options)
            converse(page, server.base_url)
            page.screenshot(path=IMAGES / f"playground-{name}.png")
            if name == "light":
                page.click(".user .thumb >> nth=0")
                page.wait_for_selector("#seen[open] canvas")
                page.locator("#seen").screenshot(path=IMAGES / "playground-seen.png")
        browser.close()


if __name__ == "__main__":
    main()
