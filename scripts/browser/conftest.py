"""One browser for all tests, and a tab for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from canned import Canned, serving
from playwright.sync_api import Browser
from tabs import NewTab, Tab, chromium, watched_tab


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def new_tab(browser: Browser) -> Iterator[NewTab]:
    """Makes tabs that are closed after the test."""
    tabs: list[Tab] = []

    def make(**context: Any) -> Tab:
        tabs.append(watched_tab(browser, **context))
        return tabs[-1]

    yield make
    for tab in tabs:
        tab.page.context.close()


@pytest.fixture
def canned() -> Iterator[Canned]:
    with serving(Canned()) as server:
        yield server
