"""The chat page over the demo's model, computed for real: the answer, its experts, and where the model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from canned import Canned
from chat_page import ChatPage
from playwright.sync_api import expect
from tabs import NewTab

import ggufmoe
from ggufmoe.demo import RECIPE
from ggufmoe.routing.palette import expert_colour
from tests.server.running import loading, serving

QUESTION = "What is 76 + 58?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    ggufmoe.convert(RECIPE, path, quant="Q4_K_M")
    return path


def test_the_demo_answers_in_the_colours_of_its_experts(model: Path, new_tab: NewTab) -> None:
    with serving(loading(model)) as (client, _):
        asked = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "routing": True}
        choice: dict[str, Any] = client.post("/v1/chat/completions", json=asked).json()["choices"][0]
        names = client.get("/v1/models").json()["data"][0]["meta"]["routing"]["names"]
        tab = new_tab()
        tab.look(width=1400)
        chat = ChatPage(tab, Canned(url=f"{client.base_url}/", name="talker")).open()
        chat.button("System prompt and sampling").click()
        tab.page.get_by_label("Temperature").fill("0")
        chat.button("Use", "#settings").click()
        chat.ask(QUESTION)
        expect(chat.answers).to_have_text(choice["message"]["content"])
        assert choice["message"]["content"].endswith("134")
        shown = tab.page.evaluate(
            "Object.fromEntries([...document.querySelectorAll('.assistant .t')]"
            ".map(t => [t.dataset.i, t.style.getPropertyValue('--c')]))"
        )
        assert len(shown) > 20
        for token, colour in shown.items():
            weights = choice["routing"][int(token)]["weights"]
            if abs(weights[0] - weights[1]) > 0.002:
                assert colour == " ".join(map(str, expert_colour(weights.index(max(weights)))))
        expect(tab.page.locator("#shares .name")).to_have_text(names)
        expect(tab.page.locator("#model-box")).to_contain_text("experts of 4 layers")
        assert tab.complaints == []
