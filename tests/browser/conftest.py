"""Headless Chromium of the system, driven by Playwright, on a real server. `make test-browser` installs both."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import tiny
from tests.servers import ServerProcess

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make test-browser)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# What Chromium itself writes about an answer that is an error, as some tests want it and /startupz gives while loading.
EXPECTED = "Failed to load resource: the server responded with a status of "


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (make test-browser)")
    with sync_api.sync_playwright() as playwright:
        # Its sandbox needs more rights than a container's root has; the only pages are ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The bundled model, with limits that tests can reach."""
    with ServerProcess(["--max-image-mb", "0.3", "--max-body-mb", "1"]) as process:
        process.wait_ready()
        yield process.base_url
        assert process.terminate() == 0


@pytest.fixture(scope="session")
def locked() -> Iterator[ServerProcess]:
    """Wants a key, and answers at length: a random model. Not awaited."""
    with ServerProcess([str(tiny.qwen2_vl()), "--api-key", "secret", "--served-model-name", "tiny"]) as process:
        process.wait_for("/livez")
        yield process
        assert process.terminate() == 0


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """visit(url, **context) opens the page; nothing may go wrong in its scripts, nor against its own policy."""
    contexts, wrong = [], []

    def note(message: Any) -> None:
        if message.type == "error" and not message.text.startswith(EXPECTED):
            wrong.append(message.text)

    def open_page(url: str, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1100, "height": 760}, **options})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong
