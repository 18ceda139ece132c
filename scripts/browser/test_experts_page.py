"""The chat page's experts: the colours of tokens, the layers, the shares, the picture, and what stays of them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from canned import META, Answer, Canned, Step, said
from chat_page import ChatPage
from playwright.sync_api import expect
from tabs import NewTab

from ggufmoe.routing.palette import expert_colour, lead

NAMES = ["words", "<b>sums</b>"]
PLACEMENT = {
    "devices": [
        {
            "name": "CUDA0",
            "weight_bytes": 3 << 30,
            "kv_bytes": 1 << 28,
            "compute_bytes": 1 << 27,
            "layers": 2,
            "expert_layers": 0,
        },
        {
            "name": "CPU",
            "weight_bytes": 5 << 30,
            "kv_bytes": 0,
            "compute_bytes": 1 << 20,
            "layers": 1,
            "expert_layers": 3,
        },
    ],
    "n_layer": 3,
    "n_gpu_layers": 2,
}


def meta(n_expert: int = 2, n_used: int = 2, names: list[str] | None = None) -> dict[str, Any]:
    routing = {"layers": [1, 2, 3], "n_expert": n_expert, "n_expert_used": n_used, "names": names}
    return META | {"routing": routing, "placement": PLACEMENT}


def routed(text: str, *layers: float) -> dict[str, Any]:
    """A token; of each layer the share of the first of two experts."""
    shares = [[[0, first], [1, round(1 - first, 3)]] for first in layers]
    return {"token_id": 7, "text": text, "weights": [0, 0], "layers": shares}


# the text comes in other pieces than the tokens, and one token is not shown at all
TOKENS = [
    routed(" Two", 0.9, 0.6, 0.9),
    routed("", 0.5, 0.5, 0.5),
    routed(" **and", 0.2, 0.1, 0.0),
    routed("**", 0.4, 0.4, 0.4),
    routed(" 2", 0.0, 1.0, 0.2),
]
STEPS: list[Step] = [
    {"content": "Tw", "routing": TOKENS[:1]},
    {"content": "o **an", "routing": TOKENS[1:3]},
    {"content": "d** 2", "routing": TOKENS[3:]},
]


@pytest.fixture
def chat(canned: Canned, new_tab: NewTab) -> ChatPage:
    canned.meta = meta(names=NAMES)
    tab = new_tab()
    tab.look(width=1400)
    return ChatPage(tab, canned).open()


def colours(chat: ChatPage) -> list[tuple[str, float]]:
    """The colour of each piece of the last answer, and how strong it is."""
    found: list[list[str]] = chat.tab.page.evaluate(
        "[...[...document.querySelectorAll('.assistant')].at(-1).querySelectorAll('.t')]"
        ".map(t => [t.style.getPropertyValue('--c'), t.style.getPropertyValue('--a')])"
    )
    return [(colour, float(alpha)) for colour, alpha in found]


def colour(expert: int) -> str:
    return " ".join(map(str, expert_colour(expert)))


def look_of(expert: int, share: float, n_expert: int) -> Any:
    """What ``colours`` gives for a token that this expert leads."""
    return colour(expert), pytest.approx(0.1 + 0.42 * lead(share, n_expert) ** 0.5, abs=0.002)


def pixels(chat: ChatPage) -> Any:
    """The picture as an array: (height, width, RGBA)."""
    width, height, data = chat.tab.page.evaluate(
        "(c => [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]])"
        "(document.querySelector('#picture'))"
    )
    return np.array(data, np.uint8).reshape(height, width, 4)


def test_each_token_has_the_colour_of_its_experts_as_it_comes(chat: ChatPage) -> None:
    page, more = chat.tab.page, threading.Event()
    chat.server.will_say(Answer([*STEPS[:2], more, STEPS[2]]))
    chat.send("One and one?")
    expect(page.locator(".assistant .t").first).to_have_text("Two")
    assert chat.server.asked[0]["routing"] == "layers"
    expect(page.locator("#picture")).to_have_attribute("aria-valuemax", "3")
    more.set()
    chat.wait()
    expect(chat.answers).to_have_text("Two and 2")
    expect(page.locator(".content strong .t")).to_have_text(["and"])
    pieces = page.locator(".assistant .t")
    assert "".join(pieces.all_text_contents()) == "Two and 2"
    assert pieces.first.get_attribute("data-i") == "0"
    assert pieces.last.get_attribute("data-i") == "4"
    first, last = colours(chat)[0], colours(chat)[-1]
    assert first == look_of(0, 0.8, 2)
    assert last == look_of(1, 0.6, 2)
    assert chat.tab.complaints == []


def test_a_layer_can_be_picked(chat: ChatPage) -> None:
    page = chat.tab.page
    chat.ask("One and one?", Answer(STEPS))
    assert page.locator("#layer option").all_text_contents() == ["mean of all layers", "layer 1", "layer 2", "layer 3"]
    shares = page.locator("#shares .value")
    expect(shares).to_have_text(["44 %", "56 %"])
    page.get_by_label("Layer", exact=True).select_option("layer 2")
    assert colours(chat)[-1] == look_of(0, 1.0, 2)
    expect(shares).to_have_text(["52 %", "48 %"])
    expect(page.locator("#shares .name")).to_have_text(NAMES)


def test_the_picture_has_a_cell_for_each_token_and_layer(chat: ChatPage) -> None:
    chat.ask("One and one?", Answer(STEPS))
    seen = pixels(chat)
    for token, entry in enumerate(TOKENS):
        for row, layer in enumerate(entry["layers"]):
            expected = sum(share * np.array(expert_colour(expert)) for expert, share in layer)
            cell = seen[16 * row + 3, 10 * token + 3]
            assert np.abs(cell[:3].astype(float) - expected).max() <= 2
            assert cell[3] == 255
    assert not seen[:, 10 * len(TOKENS) :].any()


def test_an_expert_can_be_looked_at_alone(chat: ChatPage) -> None:
    page = chat.tab.page
    chat.ask("One and one?", Answer(STEPS))
    page.get_by_role("button", name="sums").click()
    assert {found for found, _ in colours(chat)} == {colour(1)}
    assert colours(chat)[0][1] == pytest.approx(0.55 * 0.2**0.5, abs=0.002)
    assert tuple(pixels(chat)[3, 3][:3].astype(int)) == pytest.approx(expert_colour(1), abs=6)
    page.get_by_role("button", name="sums").click()
    assert {found for found, _ in colours(chat)} == {colour(0), colour(1)}


def test_pointing_and_arrow_keys_tell_the_numbers(chat: ChatPage) -> None:
    page = chat.tab.page
    chat.ask("One and one?", Answer(STEPS))
    page.hover(".assistant .t")
    expect(page.locator("#tip")).to_contain_text("“ Two”")
    expect(page.locator("#tip")).to_contain_text("words 80 %")
    page.hover("#picture", position={"x": 10 * 4 + 3, "y": 16 * 1 + 3})
    expect(page.locator("#tip")).to_have_text("“ 2”words 100 %layer 2")
    page.focus("#picture")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    picture = page.locator("#picture")
    expect(picture).to_have_attribute("aria-valuenow", "3")
    expect(picture).to_have_attribute("aria-valuetext", "Token 3, “ **and”: <b>sums</b> 80 %, words 20 %; layer 1")
    expect(page.locator("#token-title")).to_have_text("Token 3 of 5: “ **and”")
    rows = ["1<b>sums</b> 80 %", "2<b>sums</b> 90 %", "3<b>sums</b> 100 %", "mean<b>sums</b> 90 %"]
    expect(page.locator("#token-layers tr")).to_have_text(rows)
    expect(page.locator(".t.current")).to_have_text([" ", "and"])


def test_many_experts_are_summed_up_and_told_apart_one_by_one(canned: Canned, new_tab: NewTab) -> None:
    canned.meta = meta(128, 4)
    tab = new_tab()
    tab.look(width=1400)
    chat = ChatPage(tab, canned).open()
    layers = [[[40 + i, 0.4], [3, 0.3], [9, 0.2], [127, 0.1]] for i in range(3)]
    tokens = [{"token_id": 1, "text": f" w{i}", "weights": [], "layers": layers} for i in range(200)]
    steps: list[Step] = [{"content": token["text"], "routing": [token]} for token in tokens]
    chat.ask("Go", Answer(steps))
    page = tab.page
    expect(page.locator("#shares .share")).to_have_count(10)
    expect(page.locator("#shares .name").first).to_have_text("expert 3")
    expect(page.locator("#shares .value").first).to_have_text("30 %")
    expect(chat.button("and 118 more with 0.0 %")).to_be_visible()
    chat.button("and 118 more with 0.0 %").click()
    expect(page.locator("#shares .share")).to_have_count(128)
    assert colours(chat)[0] == look_of(3, 0.3, 128)
    columns = page.evaluate("Math.floor(document.querySelector('#picture-box').clientWidth / 10)")
    bands = -(-200 // columns)
    assert page.evaluate("document.querySelector('#picture').clientHeight") == bands * (48 + 10) - 10


def test_routing_stays_with_the_conversation(chat: ChatPage) -> None:
    page = chat.tab.page
    chat.ask("One and one?", Answer(STEPS))
    before = colours(chat)
    page.reload()
    expect(page.locator(".assistant .t").last).to_have_text(" 2")
    assert colours(chat) == before
    expect(page.locator("#picture")).to_have_attribute("aria-valuemax", "5")


def test_without_experts_answers_come_without_routing(chat: ChatPage) -> None:
    page = chat.tab.page
    page.get_by_label("Show which experts make each token").uncheck()
    chat.ask("One and one?", "Two")
    assert "routing" not in chat.server.asked[0]
    expect(page.locator("#routed")).to_be_hidden()
    page.reload()
    expect(page.get_by_label("Show which experts make each token")).not_to_be_checked()


def test_a_dense_model_has_no_experts(canned: Canned, new_tab: NewTab) -> None:
    tab = new_tab()
    tab.look(width=1000)
    chat = ChatPage(tab, canned).open()
    chat.ask("Hello", "Hi")
    assert "routing" not in canned.asked[0]
    expect(chat.tab.page.locator("#experts-box")).to_be_hidden()
    expect(chat.button("Model", "header")).to_be_visible()


def test_the_page_tells_where_the_model_is(chat: ChatPage) -> None:
    box = chat.tab.page.locator("#model-box")
    expect(box).to_contain_text("CUDA0: 3.38 GiB")
    expect(box).to_contain_text("weights 3 GiB · context 256 MiB · buffers 128 MiB")
    expect(box).to_contain_text("attention of 2 layers")
    expect(box).to_contain_text("attention of 1 layer, experts of 3 layers")
    chat.ask("One and one?", Answer(said("Two")))
    expect(box).to_contain_text("12 of 512 tokens")
    expect(box).to_contain_text("81.3 tokens/s")


def test_reasoning_is_coloured_too(chat: ChatPage) -> None:
    steps: list[Step] = [
        {"reasoning_content": "Hm", "routing": [routed("<think>", 0.5, 0.5, 0.5), routed(" Hm", 1.0, 1.0, 1.0)]},
        {"content": "Two", "routing": [routed("</think>", 0.5, 0.5, 0.5), routed("\n\n", 0.5, 0.5, 0.5)]},
        {"content": "!", "routing": [routed("Two", 0.0, 0.0, 0.0), routed("!", 1.0, 1.0, 1.0)]},
    ]
    chat.ask("One and one?", Answer(steps))
    expect(chat.tab.page.locator(".reasoning .t")).to_have_text(["Hm"])
    expect(chat.tab.page.locator(".assistant > .content .t")).to_have_text(["Two", "!"])
    assert [found for found, _ in colours(chat)] == [colour(0), colour(1), colour(0)]


# ---- where tokens stand in the text


def test_tokens_find_their_place(chat: ChatPage) -> None:
    ask = "([token, text, at, done]) => import('/page/routing.js').then(m => m.placeOf(token, text, at, done))"
    for token, text, at, is_complete, found in [
        ("ab", "xab", 1, False, [1, 3]),
        ("ab", "a", 0, False, None),
        ("ab", "a", 0, True, [0, 0]),
        ("", "a", 0, False, [0, 0]),
        (" ab", "ab", 0, False, [0, 2]),
        ("\n\n", "ab", 0, False, [0, 0]),
        ("<think>", "a", 0, False, None),
        ("<think>", "a" * 40, 0, False, [0, 0]),
        ("z", "日本 z", 0, False, [3, 4]),
        ("�", "é", 0, True, [0, 0]),
    ]:
        assert chat.tab.page.evaluate(ask, [token, text, at, is_complete]) == found
