"""The chat page for everyone: by keyboard alone, with a screen reader, narrow and wide, light and dark."""

from __future__ import annotations

import threading

import pytest
from canned import Answer, Canned, said
from chat_page import ChatPage
from playwright.sync_api import expect
from tabs import NewTab
from test_chat_page import MARKDOWN
from test_experts_page import STEPS, meta

from ggufmoe.routing.palette import expert_colour

FOCUSED = "(e => e.getAttribute('aria-label') || e.title || e.id || e.textContent.trim())(document.activeElement)"


@pytest.fixture
def chat(canned: Canned, new_tab: NewTab) -> ChatPage:
    canned.meta = meta()
    return ChatPage(new_tab(), canned).open()


def walk_to(chat: ChatPage, name: str, key: str = "Tab") -> None:
    """Press ``key`` until what has the focus is called ``name``."""
    seen = []
    for _ in range(60):
        chat.tab.page.keyboard.press(key)
        seen.append(chat.tab.page.evaluate(FOCUSED))
        if seen[-1] == name:
            return
    raise AssertionError(f"{key} does not lead to {name}, but to {seen}")


def test_the_keyboard_alone_is_enough(chat: ChatPage) -> None:
    page, keyboard = chat.tab.page, chat.tab.page.keyboard
    chat.tab.look(width=1000)
    expect(page.locator("#question")).to_be_focused()
    keyboard.type("First line")
    keyboard.press("Shift+Enter")
    keyboard.type("second line")
    answer = Answer([*said("On and on"), threading.Event()])
    chat.server.will_say(answer)
    keyboard.press("Enter")
    expect(chat.answers).to_have_text("On and on")
    assert chat.server.asked[0]["messages"][0]["content"] == "First line\nsecond line"
    keyboard.press("Escape")
    assert answer.left.wait(20)
    chat.wait()

    chat.server.will_say("Again")
    walk_to(chat, "Answer again", "Shift+Tab")
    keyboard.press("Enter")
    chat.wait()
    expect(chat.answers).to_have_text("Again")
    walk_to(chat, "Previous version", "Shift+Tab")
    keyboard.press("Space")
    expect(chat.answers).to_have_text("On and on")
    assert page.evaluate(FOCUSED) == "Next version"

    walk_to(chat, "Edit", "Shift+Tab")
    keyboard.press("Enter")
    chat.server.will_say(Answer(STEPS))
    keyboard.press("Control+A")
    keyboard.type("Other")
    keyboard.press("Enter")
    chat.wait()
    expect(chat.questions).to_have_text("Other")

    walk_to(chat, "System prompt and sampling", "Shift+Tab")
    keyboard.press("Enter")
    assert page.evaluate(FOCUSED) == "system"
    keyboard.type("Be kind.")
    keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()

    walk_to(chat, "Experts and model")
    keyboard.press("Enter")
    walk_to(chat, "Tokens by layers")
    keyboard.press("ArrowLeft")
    expect(page.locator("#picture")).to_have_attribute("aria-valuenow", "4")
    walk_to(chat, "Layer", "Shift+Tab")
    keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    assert page.evaluate(FOCUSED) == "Experts and model"
    assert chat.tab.complaints == []


def test_a_screen_reader_meets_names_and_hears_answers(chat: ChatPage) -> None:
    chat.tab.look(width=1400)
    more = threading.Event()
    chat.server.will_say(Answer([*said("The first sentence. And"), more, *said(" the second.")]))
    chat.send("Tell me")
    expect(chat.tab.page.locator("#announcer")).to_have_text("The first sentence.")
    more.set()
    chat.wait()
    expect(chat.tab.page.locator("#announcer")).to_have_text("And the second. End of the answer.")
    chat.ask("And?", Answer(STEPS))
    met = chat.tab.accessible()
    for expected in [
        ("textbox", "Message"),
        ("button", "Send"),
        ("log", "Conversation"),
        ("navigation", "Kept conversations"),
        ("complementary", "Conversations"),
        ("complementary", "Experts and model"),
        ("article", "You"),
        ("article", "talker"),
        ("combobox", "Layer"),
        ("slider", "Tokens by layers"),
        ("list", "Share of each expert"),
        ("checkbox", "Show which experts make each token"),
    ]:
        assert expected in met
    roles = ("button", "textbox", "combobox", "checkbox", "link", "slider", "group", "region")
    assert [role for role, name in met if role in roles and not name] == []
    assert chat.tab.page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("width", [360, 800, 1920])
def test_nothing_is_wider_than_the_window(chat: ChatPage, width: int) -> None:
    chat.tab.look(width=width)
    page = chat.tab.page
    chat.ask("W" * 200, MARKDOWN + "\n" + "x" * 300 + "\n\n```\n" + "y " * 200 + "\n```\n")
    chat.ask("And?", Answer(STEPS))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(
        "document.querySelector('#scroller').scrollWidth <= document.querySelector('#scroller').clientWidth"
    )
    for opener, drawer in (("#show-sidebar", "#sidebar"), ("#show-panel", "#panel")):
        if not page.locator(drawer).is_visible():
            page.click(opener)
        expect(page.locator(drawer)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator(drawer).bounding_box()
        assert box is not None
        assert (box["x"], box["x"] + box["width"]) >= (0, 0)
        assert box["x"] + box["width"] <= width
        page.keyboard.press("Escape")
    expect(page.locator("#question")).to_be_visible()


CONTRAST = """(() => {
  const one = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
  const canvas = one.getContext('2d', {willReadFrequently: true});
  const over = (colour, below) => {
    canvas.fillStyle = below;
    canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return `rgb(${[...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).join(' ')})`;
  };
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const paper = (element) => {
    const chain = [];
    for (let one = element; one; one = one.parentElement) chain.unshift(getComputedStyle(one).backgroundColor);
    return chain.reduce((below, colour) => over(colour, below), 'rgb(255 255 255)');
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!hasText || !element.checkVisibility() || element.closest('.hidden, :disabled, noscript, .skip')) continue;
    const below = paper(element);
    found.push([ratio(over(getComputedStyle(element).color, below), below), element.outerHTML.slice(0, 120)]);
  }
  found.sort((a, b) => a[0] - b[0]);
  return [found[0], found.length, light(paper(document.body))];
})()"""


@pytest.mark.parametrize("chosen", ["light", "dark", "system"])
def test_light_and_dark_can_be_read(chat: ChatPage, chosen: str) -> None:
    """Contrast as the Web Content Accessibility Guidelines want it, 4.5 to 1, of text on whatever lies below it."""
    page = chat.tab.page
    is_dark = chosen != "light"
    chat.tab.look(width=1400, scheme="dark" if chosen == "system" else "light" if is_dark else "dark")
    page.get_by_label("Theme").select_option(chosen)
    step = {"reasoning_content": "Hm", "content": MARKDOWN}
    chat.ask("Hello", Answer([step], error={"message": "It failed"}))
    chat.ask("And?", Answer(STEPS))
    page.reload()
    expect(page.locator(".assistant .t").first).to_be_visible()
    page.evaluate("document.querySelector('details').open = true")
    worst, n, paper = page.evaluate(CONTRAST)
    assert n > 40
    assert worst[0] >= 4.5, worst
    assert (paper < 0.5) == is_dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_at_its_strongest_can_be_read(chat: ChatPage, scheme: str) -> None:
    """The strongest that a token gets is 0.55, of an expert that is looked at alone."""
    chat.tab.look(width=1400, scheme=scheme)
    chat.ask("Hello", Answer(STEPS))
    strongest = """colours => {
      const token = document.querySelector('.assistant .t');
      token.after(...colours.map((colour) => {
        const made = token.cloneNode(true);
        made.style.setProperty('--c', colour);
        made.style.setProperty('--a', 0.55);
        return made;
      }));
    }"""
    colours = [" ".join(map(str, expert_colour(expert))) for expert in range(128)]
    chat.tab.page.evaluate(strongest, colours)
    worst, n, _ = chat.tab.page.evaluate(CONTRAST)
    assert n > len(colours)
    assert worst[0] >= 4.5, worst


def test_the_end_of_an_answer_leaves_the_focus_where_it_is(chat: ChatPage) -> None:
    chat.tab.look(width=1400)
    page, more = chat.tab.page, threading.Event()
    chat.ask("First?", "One")
    for where in (page.locator(".conversation").last, page.locator(".assistant").first.get_by_label("Copy")):
        more.clear()
        chat.server.will_say(Answer([*said("So"), more, *said(" it is")]))
        chat.send("Next?")
        expect(chat.answers.last).to_have_text("So")
        where.focus()
        more.set()
        chat.wait()
        expect(chat.answers.last).to_have_text("So it is")
        expect(where).to_be_focused()
