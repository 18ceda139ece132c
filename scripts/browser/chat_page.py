"""The chat page as a person uses it: what tests do with it, and what they look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from canned import Canned
from playwright.sync_api import Locator, expect
from tabs import Tab


@dataclass
class ChatPage:
    """The page of a server in a tab."""

    tab: Tab
    server: Canned

    def open(self) -> ChatPage:
        """Load the page, and wait until it knows the model."""
        self.tab.page.goto(self.server.url)
        expect(self.status).to_have_text(self.server.name)
        return self

    @property
    def status(self) -> Locator:
        return self.tab.page.locator("#status")

    @property
    def answers(self) -> Locator:
        """The texts of the answers that are shown."""
        return self.tab.page.locator(".message.assistant > .content")

    @property
    def questions(self) -> Locator:
        return self.tab.page.locator(".message.user > .content")

    def button(self, name: str, within: str = "body") -> Locator:
        """A button that a screen reader calls ``name``, the last one."""
        return self.tab.page.locator(within).get_by_role("button", name=name, exact=True).last

    def send(self, text: str) -> None:
        """Type a message and send it."""
        self.tab.page.fill("#question", text)
        self.tab.page.keyboard.press("Enter")

    def ask(self, text: str, answer: Any = None) -> None:
        """Send a message and wait until its answer is complete; ``answer`` is what the server says."""
        if answer is not None:
            self.server.will_say(answer)
        shown = self.tab.page.locator(".message.assistant")
        before = shown.count()
        self.send(text)
        expect(shown).to_have_count(before + 1)  # until then the answers that were there are complete
        self.wait()

    def wait(self) -> None:
        """Wait until no answer is under way, and one is there."""
        expect(self.tab.page.locator(".message.assistant .stats").last).to_be_attached()
        expect(self.tab.page.locator("[aria-busy=true]")).to_have_count(0)
        expect(self.tab.page.locator("#send")).to_be_visible()
