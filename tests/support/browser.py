"""A headless Chromium for tests of pages, that notes what a page asks for and complains of."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass
class Seen:
    """What a page did."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Of its console, and exceptions of its scripts."""


def chromium() -> str:
    """Find the browser; without one a test is skipped, but not in CI, which has to run it."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        why = "no chromium, chromium-browser or google-chrome on PATH; apt-get install chromium"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    return found


def screenshot(page: Any, name: str, **options: Any) -> None:
    """Keep a picture of a page: NAME.png in the folder $METRIS_ARTEFACTS, or else in build/screenshots."""
    given = os.environ.get("METRIS_ARTEFACTS")
    folder = Path(given) if given else Path(__file__).parents[2] / "build" / "screenshots"
    page.screenshot(path=folder / f"{name}.png", **options)


@contextmanager
def opened(address: str, **context: Any) -> Iterator[tuple[Any, Seen]]:
    """Open a page, and close the browser after it."""
    executable = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(OPTIONS))
        try:
            page = browser.new_context(viewport={"width": 1280, "height": 900}, **context).new_page()
            seen = Seen()
            page.on("request", lambda request: seen.requests.append(request.url))
            page.on("console", lambda m: seen.errors.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error: seen.errors.append(str(error)))
            page.goto(address)
            yield page, seen
        finally:
            browser.close()
