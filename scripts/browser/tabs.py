"""Pages in headless Chromium, driven by Playwright: what they asked for, what went wrong, what a screen reader meets.

The browser is the one that the variable CHROMIUM names; Playwright brings none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

TIMEOUT_MS = 30_000
"""What has not come until then will not come; a busy machine needs a part of it."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser for the block."""
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ["CHROMIUM"],
            chromium_sandbox=os.geteuid() != 0,
            args=["--disable-gpu", "--disable-dev-shm-usage"],
        )
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Tab:
    """One page with a storage of its own, and all that it did."""

    page: Page
    requests: list[str] = field(default_factory=list)
    """Addresses of all that was asked for, the page itself first."""
    complaints: list[str] = field(default_factory=list)
    """Errors of scripts, and what the browser logged: blocked by the page's policy, not found, and so on."""

    def open_file(self, path: Path) -> None:
        """Load a file and wait until it has been shown."""
        self.page.goto(path.resolve().as_uri())

    def look(self, *, width: int = 1000, height: int = 800, scheme: str = "light") -> None:
        """A window of this size on a system with this colour scheme."""
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme=scheme)

    def accessible(self) -> list[tuple[str, str]]:
        """(role, name) of everything that a screen reader meets, in its order."""
        session = self.page.context.new_cdp_session(self.page)
        nodes: list[dict[str, Any]] = session.send("Accessibility.getFullAXTree")["nodes"]
        seen = (node for node in nodes if not node.get("ignored"))
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in seen]


NewTab = Callable[..., Tab]
"""Makes tabs; arguments go to ``Browser.new_context``."""


def watched_tab(browser: Browser, **context: Any) -> Tab:
    """A new, empty tab; ``context`` goes to ``Browser.new_context``."""
    page = browser.new_context(**{"reduced_motion": "reduce"} | context).new_page()
    page.set_default_timeout(TIMEOUT_MS)
    tab = Tab(page)
    page.on("request", lambda request: tab.requests.append(request.url))
    page.on("pageerror", lambda error: tab.complaints.append(str(error)))
    page.on("console", lambda said: tab.complaints.append(said.text) if said.type in ("error", "warning") else None)
    return tab
