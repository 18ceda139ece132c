"""The chat page: versions of messages, what stays in the browser, and what goes through files."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from canned import Answer, Canned, said
from chat_page import ChatPage
from playwright.sync_api import expect
from tabs import NewTab


@pytest.fixture
def chat(canned: Canned, new_tab: NewTab) -> ChatPage:
    return ChatPage(new_tab(), canned).open()


def test_messages_have_versions_with_what_followed_them(chat: ChatPage) -> None:
    page = chat.tab.page
    chat.ask("First?", "One")
    chat.ask("Second?", "Two")
    chat.server.will_say("One, again")
    page.locator(".assistant").first.get_by_role("button", name="Answer again").click()
    chat.wait()
    expect(chat.answers).to_have_text(["One, again"])
    assert chat.server.asked[-1]["messages"] == [{"role": "user", "content": "First?"}]
    chat.ask("Third?", "Three")
    assert [one["content"] for one in chat.server.asked[-1]["messages"]] == ["First?", "One, again", "Third?"]
    group = page.get_by_role("group", name="Version 2 of 2")
    expect(group).to_have_text("2/2")
    group.get_by_role("button", name="Previous version").click()
    expect(chat.answers).to_have_text(["One", "Two"])
    expect(
        page.get_by_role("group", name="Version 1 of 2").get_by_role("button", name="Previous version")
    ).to_be_disabled()

    chat.server.will_say("Zero")
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("Nothing?")
    page.keyboard.press("Enter")
    chat.wait()
    expect(chat.questions).to_have_text(["Nothing?"])
    expect(chat.answers).to_have_text(["Zero"])
    assert chat.server.asked[-1]["messages"] == [{"role": "user", "content": "Nothing?"}]
    chat.button("Previous version").click()
    expect(chat.questions).to_have_text(["First?", "Second?"])
    expect(chat.answers).to_have_text(["One", "Two"])


def test_an_edit_that_is_left_changes_nothing(chat: ChatPage) -> None:
    chat.ask("First?", "One")
    for leave in ("Escape", "Cancel"):
        chat.button("Edit").click()
        chat.tab.page.get_by_label("Edit the message").fill("Other")
        if leave == "Escape":
            chat.tab.page.keyboard.press("Escape")
        else:
            chat.button("Cancel", ".edit").click()
        expect(chat.questions).to_have_text(["First?"])
        expect(chat.button("Edit")).to_be_focused()
    assert len(chat.server.asked) == 1


def test_conversations_stay_when_the_page_is_loaded_again(chat: ChatPage) -> None:
    page = chat.tab.page
    chat.ask("Why is the sky blue?", Answer([{"reasoning_content": "Hm"}, *said("It scatters")]))
    chat.button("New conversation").click()
    expect(page.locator("h1")).to_have_text("New conversation")
    chat.ask("And grass green?", "Leaves")
    page.reload()
    expect(chat.status).to_have_text("talker")
    expect(chat.answers).to_have_text(["Leaves"])
    expect(page.locator(".conversation")).to_have_text(["And grass green?", "Why is the sky blue?"])
    page.get_by_role("button", name="Why is the sky blue?", exact=True).click()
    expect(chat.answers).to_have_text(["It scatters"])
    expect(page.locator("summary")).to_have_text("Thoughts")
    expect(page.locator(".assistant .stats")).to_contain_text("7 tokens")

    page.once("dialog", lambda dialog: dialog.accept())
    chat.button("Delete “Why is the sky blue?”").click()
    expect(page.locator(".conversation")).to_have_text(["And grass green?"])
    expect(page.locator(".message")).to_have_count(0)
    page.reload()
    expect(page.locator(".conversation")).to_have_text(["And grass green?"])


def test_an_answer_that_a_reload_ends_stays_as_far_as_it_came(chat: ChatPage) -> None:
    answer = Answer([*said("As far as this"), threading.Event()])
    chat.server.will_say(answer)
    chat.send("Go on")
    expect(chat.answers).to_have_text("As far as this")
    chat.tab.page.reload()
    expect(chat.answers).to_have_text("As far as this")
    assert answer.left.wait(20)


def test_another_conversation_can_be_held_meanwhile(chat: ChatPage) -> None:
    more = threading.Event()
    chat.server.will_say(Answer([*said("Slow"), more, *said(" but sure")]), "Quick")
    chat.send("One")
    expect(chat.answers).to_have_text("Slow")
    chat.button("New conversation").click()
    expect(chat.button("Send")).to_be_visible()
    chat.ask("Two")
    expect(chat.answers).to_have_text("Quick")
    more.set()
    chat.tab.page.get_by_role("button", name="One", exact=True).click()
    expect(chat.answers).to_have_text("Slow but sure")


def test_what_is_exported_can_be_imported(chat: ChatPage, new_tab: NewTab, tmp_path: Path) -> None:
    page = chat.tab.page
    chat.ask("First?", Answer([{"reasoning_content": "Hm"}, *said("One **bold**")]))
    chat.server.will_say("Another")
    chat.button("Answer again").click()
    chat.wait()
    with page.expect_download() as download:
        chat.button("Export all").click()
    download.value.save_as(tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))
    assert (kept["format"], kept["version"]) == ("ggufmoe-conversations", 1)
    assert [one["content"] for one in kept["conversations"][0]["messages"]] == ["First?", "One **bold**", "Another"]

    other = ChatPage(new_tab(), chat.server).open()
    other.tab.page.set_input_files("#import-file", tmp_path / "kept.json")
    expect(other.answers).to_have_text(["Another"])
    other.button("Previous version").click()
    expect(other.answers).to_have_text(["One bold"])
    expect(other.tab.page.locator("h1")).to_have_text("First?")
    other.tab.page.reload()
    expect(other.answers).to_have_text(["One bold"])


MESSAGE = {"id": "a", "parent": "", "role": "user", "content": "x"}


OTHER_FILES: list[tuple[object, str]] = [
    ("no JSON", "no JSON"),
    ("[]", "no conversations"),
    ({"version": 2, "conversations": []}, "version 2"),
    ({"conversations": [{}]}, "no messages"),
    ({"conversations": [None]}, "no messages"),
    ({"conversations": [{"messages": [MESSAGE | {"content": 5}]}]}, "A text in this file"),
    ({"conversations": [{"messages": [MESSAGE | {"parent": "none"}]}]}, "do not belong together"),
    ({"conversations": [{"messages": [MESSAGE, MESSAGE]}]}, "do not belong together"),
    ({"conversations": [{"messages": [MESSAGE | {"role": "<b>"}]}]}, "do not belong together"),
    ({"conversations": [{"title": ["x"], "messages": []}]}, "A text in this file"),
]


def test_files_that_hold_something_else_are_refused(chat: ChatPage, tmp_path: Path) -> None:
    for number, (content, told) in enumerate(OTHER_FILES):
        path = tmp_path / f"{number}.json"
        whole = {"format": "ggufmoe-conversations", "version": 1} | content if isinstance(content, dict) else content
        path.write_text(whole if isinstance(whole, str) else json.dumps(whole), encoding="utf-8")
        chat.tab.page.evaluate("document.querySelector('#status').textContent = ''")
        chat.tab.page.set_input_files("#import-file", path)
        expect(chat.status).to_contain_text("Not imported")
        expect(chat.status).to_contain_text(told)
    expect(chat.tab.page.locator(".conversation")).to_have_count(0)
    chat.ask("Hello", "Still here")


def test_a_hostile_file_runs_nothing(chat: ChatPage, tmp_path: Path) -> None:
    evil = "<img src=x onerror='window.hacked = 1'>"
    messages = [
        {"id": "__proto__", "parent": "", "role": "user", "content": evil},
        {"id": "constructor", "parent": "__proto__", "role": "assistant", "content": evil, "reasoning": evil}
        | {"model": evil, "finish": evil, "error": evil, "stats": {"n_tokens": evil, "tokens_per_s": 1}},
    ]
    one = {"title": evil, "messages": messages, "settings": {"system": evil, "sampling": {"temperature": evil}}}
    one |= {"chosen": {"__proto__": "constructor", "": "none"}}
    whole = {"format": "ggufmoe-conversations", "version": 1, "conversations": [one]}
    (tmp_path / "evil.json").write_text(json.dumps(whole), encoding="utf-8")
    chat.tab.page.set_input_files("#import-file", tmp_path / "evil.json")
    expect(chat.answers).to_have_text([evil])
    expect(chat.tab.page.locator("h1")).to_have_text(evil)
    assert chat.tab.page.evaluate("document.images.length") == 0
    assert chat.tab.page.evaluate("window.hacked") is None
    chat.ask("Hello", "Hi")
    assert chat.server.asked[0]["messages"][0] == {"role": "system", "content": evil}
    assert "temperature" not in chat.server.asked[0]
    assert chat.tab.complaints == []


def test_where_a_browser_keeps_nothing_the_page_works_all_the_same(canned: Canned, new_tab: NewTab) -> None:
    tab = new_tab()
    tab.page.add_init_script("Object.defineProperty(window, 'indexedDB', {get() { throw new Error('no'); }})")
    chat = ChatPage(tab, canned).open()
    expect(tab.page.locator("#kept-note")).to_contain_text("keeps nothing")
    chat.ask("Hello", "Hi")
    expect(chat.answers).to_have_text(["Hi"])
    expect(tab.page.locator(".conversation")).to_have_text(["Hello"])
