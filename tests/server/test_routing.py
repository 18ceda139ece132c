"""The experts of each token in answers and streams, and what is told of them beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ggufmoe import ContextOptions
from ggufmoe.gguf import own_keys
from tests.scripted import Scripted
from tests.server.running import HELLO, TALKER, loading, serving

RECIPE = "experts: [{source_model: me/alpha}, {source_model: me/beta}, {source_model: me/gamma}, {source_model: d}]"
EXPERTS = replace(
    TALKER,
    n_expert=4,
    follows={**TALKER.follows, " smile": "<0xF0>", "<0xF0>": "<0x9F>", "<0x9F>": "<0x98>", "<0x98>": "<0x80>"},
    metadata={own_keys.RECIPE: RECIPE},
)


@pytest.fixture(scope="module")
def client(write_model: Callable[[Scripted], Path]) -> Iterator[httpx.Client]:
    with serving(loading(write_model(EXPERTS), ContextOptions(n_threads=1, n_parallel=2))) as (client, _):
        yield client


def ask(client: httpx.Client, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, or the one object, with the choices of each."""
    body = {"temperature": 0, **fields} | ({} if "prompt" in fields else {"messages": HELLO})
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    if not fields.get("stream"):
        return [answer.json()]
    return [json.loads(event.removeprefix("data: ")) for event in answer.text.strip().split("\n\n")[:-1]]


def entries_of(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return [entry for choice in choices for entry in choice.get("routing", ())]


def check(entry: dict[str, Any], *, has_layers: bool) -> None:
    assert set(entry) == {"token_id", "text", "weights"} | ({"layers"} if has_layers else set())
    assert sum(entry["weights"]) == pytest.approx(1, abs=1e-3)
    assert len(entry["weights"]) == 4
    if has_layers:
        (layer,) = entry["layers"]
        shares = sorted(filter(None, entry["weights"]), reverse=True)
        assert [weight for _, weight in layer] == shares
        assert all(entry["weights"][expert] == weight for expert, weight in layer)


@pytest.mark.parametrize("kind", [True, "mean", "layers"])
def test_a_stream_tells_of_each_token_with_its_text(client: httpx.Client, kind: Any) -> None:
    chunks = ask(client, stream=True, routing=kind, n=2)
    for index in range(2):
        entries = entries_of(chunks, index)
        assert [entry["text"] for entry in entries] == [" Hello", " there"]
        assert [entry["token_id"] for entry in entries] == EXPERTS.ids(" Hello", " there")
        for entry in entries:
            check(entry, has_layers=kind == "layers")
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        assert len(choice.get("routing", ())) == (1 if choice["delta"].get("content") else 0)
    assert entries_of(ask(client, routing=kind)) == entries_of(chunks)
    assert not entries_of(ask(client, stream=True, routing=False))
    assert "routing" not in ask(client)[0]["choices"][0]


def test_reasoning_calls_and_characters_in_several_tokens(client: httpx.Client) -> None:
    chunks = ask(client, stream=True, routing=True, chat_template_kwargs={"enable_thinking": True})
    (thought,) = (c for c in chunks if c["choices"][0]["delta"].get("reasoning_content"))
    assert [entry["text"] for entry in thought["choices"][0]["routing"]] == [" Hm"]
    assert [entry["token_id"] for entry in entries_of(chunks)] == EXPERTS.ids(" Hm", "</think>", " Hello", " there")
    chunks = ask(client, stream=True, routing=True, chat_template_kwargs={"ending": " smile"})
    assert [entry["text"] for entry in entries_of(chunks)] == ["", "", "", "\N{GRINNING FACE}"]
    smile = ask(client, routing=True, prompt=" smile", path="/v1/completions")
    assert entries_of(smile) == entries_of(chunks)


def test_text_completions(client: httpx.Client) -> None:
    asked: dict[str, Any] = {"prompt": ["[assistant]", " Hello"], "path": "/v1/completions", "routing": "layers"}
    (whole,) = ask(client, **asked)
    chunks = ask(client, **asked, stream=True)
    for index, texts in enumerate(([" Hello", " there"], [" there"])):
        entries = entries_of(chunks, index)
        assert [entry["text"] for entry in entries] == texts
        assert entries_of([whole], index) == entries
        for entry in entries:
            check(entry, has_layers=True)
    with openai.OpenAI(api_key="none", base_url=str(client.base_url.join("/v1")), max_retries=0) as library:
        answer = library.completions.create(model="talker", prompt=" Hello", extra_body={"routing": True})
        (extra,) = (choice.model_extra or {} for choice in answer.choices)
        assert [entry["text"] for entry in extra["routing"]] == [" there"]


def test_a_response_tells_of_each_token(client: httpx.Client) -> None:
    body = {"input": " hello", "temperature": 0, "routing": "layers"}
    whole = client.post("/v1/responses", json=body).json()
    assert [entry["text"] for entry in whole["routing"]] == [" Hello", " there"]
    for entry in whole["routing"]:
        check(entry, has_layers=True)
    stream = client.post("/v1/responses", json=body | {"stream": True}).text
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: ")]
    assert [entry for event in events for entry in event.get("routing", ())] == whole["routing"]
    assert events[-1]["response"]["routing"] == whole["routing"]
    assert "routing" not in client.post("/v1/responses", json=body | {"routing": False}).json()


def test_what_a_client_is_told_of_the_experts(client: httpx.Client) -> None:
    meta = client.get("/v1/models").json()["data"][0]["meta"]
    names = ["alpha", "beta", "gamma", "d"]
    assert meta["routing"] == {"layers": [0], "n_expert": 4, "n_expert_used": 2, "names": names}


def test_what_is_refused(client: httpx.Client, write_model: Callable[[Scripted], Path]) -> None:
    wrongs: list[Any] = ["layer", 1, {}]
    for wrong in wrongs:
        refused = client.post("/v1/chat/completions", json={"messages": HELLO, "routing": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "routing")
        assert "a valid boolean, or 'mean' or 'layers', not " in refused.json()["error"]["message"]
    with serving(loading(write_model(TALKER))) as (dense, _):
        assert "routing" not in dense.get("/v1/models").json()["data"][0]["meta"]
        bodies: dict[str, dict[str, Any]] = {
            "chat/completions": {"messages": HELLO},
            "completions": {"prompt": "x"},
            "responses": {"input": "x"},
        }
        for path, body in ((f"/v1/{name}", body) for name, body in bodies.items()):
            refused = dense.post(path, json={**body, "routing": True})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "routing")
            assert "a dense model" in refused.json()["error"]["message"]
            assert dense.post(path, json={**body, "routing": False}).status_code == 200
