"""Chat and text completions: texts, streams, reasoning, calls, grammars, probabilities and numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.scripted import Scripted
from tests.server.running import CLOCK, HELLO, PLAIN, TALKER, WEATHER, loading, serving


@pytest.fixture(scope="module")
def talker(write_model: Callable[[Scripted], Path]) -> Iterator[httpx.Client]:
    with serving(loading(write_model(TALKER))) as (client, _):
        yield client


@pytest.fixture(scope="module")
def library(talker: httpx.Client) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with openai.OpenAI(api_key="none", base_url=str(talker.base_url.join("/v1")), max_retries=0) as client:
        yield client


def chat(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json={"messages": HELLO, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def stream(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": HELLO, "temperature": 0, "stream": True, **fields}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def ending(words: str) -> dict[str, Any]:
    return {"chat_template_kwargs": {"ending": words}}


def test_an_answer_as_one_object(talker: httpx.Client) -> None:
    answer = chat(talker, model="talker")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    assert (answer["object"], answer["model"]) == ("chat.completion", "talker")
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 2, 6)
    assert chat(talker)["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert "service_tier" not in answer
    assert chat(talker, service_tier="auto")["service_tier"] == "default"
    assert answer["timings"]["predicted_n"] == 2


def test_a_stream_holds_the_same(talker: httpx.Client) -> None:
    first, *middle, last, usage = stream(talker, stream_options={"include_usage": True})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(middle) == "Hello there"
    assert last["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2)
    assert all(chunk["usage"] is None for chunk in (first, *middle, last))
    assert len({chunk["id"] for chunk in (first, *middle, last, usage)}) == 1
    assert "usage" not in stream(talker)[-1]


def test_limits_stop_strings_and_biases(talker: httpx.Client) -> None:
    (choice,) = chat(talker, max_completion_tokens=1)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "length")
    (choice,) = chat(talker, stop=" there")["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "stop")
    (choice,) = chat(talker, logit_bias={str(TALKER.id(" there")): -100}, max_tokens=2)["choices"]
    assert choice["message"]["content"] != "Hello there"


def test_several_answers_differ_by_seed_and_repeat(talker: httpx.Client) -> None:
    asked = {"n": 8, "seed": 3, "temperature": 1, "max_tokens": 1, **ending(" dice")}
    answer = chat(talker, **asked)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == list(range(8))
    assert set(texts) == {"one", "two"}
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["usage"]["prompt_tokens"] == 5
    chunks = stream(talker, **asked)
    assert [text_of(chunks, index) for index in range(8)] == texts


def test_probabilities_of_tokens(talker: httpx.Client) -> None:
    (choice,) = chat(talker, logprobs=True, top_logprobs=2, max_tokens=1, **ending(" dice"))["choices"]
    (entry,) = choice["logprobs"]["content"]
    assert entry["token"] in (" one", " two")
    assert entry["bytes"] == list(entry["token"].encode())
    assert entry["logprob"] == pytest.approx(math.log(0.5), abs=1e-3)
    assert {other["token"] for other in entry["top_logprobs"]} == {" one", " two"}
    chunks = stream(talker, logprobs=True, max_tokens=2)
    entries = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", ())]
    assert [entry["token"] for entry in entries] == [" Hello", " there"]


def test_reasoning_is_a_field_of_its_own(talker: httpx.Client) -> None:
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    (choice,) = chat(talker, **thinking)["choices"]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm", "Hello there")
    chunks = stream(talker, **thinking)
    assert "".join(chunk["choices"][0]["delta"].get("reasoning_content", "") for chunk in chunks) == "Hm"
    assert text_of(chunks) == "Hello there"
    assert "reasoning_content" not in chat(talker, reasoning_effort="none")["choices"][0]["message"]


def test_a_tool_is_called_and_its_result_goes_back(library: Any, talker: httpx.Client) -> None:
    asked: dict[str, Any] = {"model": "talker", "temperature": 0, "tools": [WEATHER], "extra_body": ending(" call")}
    answer = library.chat.completions.create(messages=HELLO, **asked)
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    assert call.id.startswith("call_")
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    history = [*HELLO, message.model_dump(exclude_none=True), result]
    assert chat(talker, messages=history, tools=[WEATHER])["choices"][0]["message"]["content"] == "Hello there"

    name, arguments, ids = "", "", set()
    for chunk in library.chat.completions.create(messages=HELLO, stream=True, **asked):
        for part in chunk.choices[0].delta.tool_calls or ():
            name, arguments = name + (part.function.name or ""), arguments + part.function.arguments
            ids.add(part.id)
    assert (name, json.loads(arguments)) == ("weather", {"city": "Rome"})
    assert len(ids - {None}) == 1


def test_without_tools_their_marks_are_text(talker: httpx.Client) -> None:
    (choice,) = chat(talker, tools=[WEATHER], tool_choice="none", **ending(" call"))["choices"]
    assert "weather" in choice["message"]["content"]
    assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize(
    ("choice", "name"),
    [({"type": "function", "function": {"name": "weather"}}, {"weather"}), ("required", {"weather", "clock"})],
)
def test_a_call_that_must_come(talker: httpx.Client, choice: Any, name: set[str]) -> None:
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}  # the grammar lets no reasoning through
    answer = chat(talker, tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=200, **thinking)["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] in name
    if call["function"]["name"] == "weather":
        assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Bern")
    assert answer["finish_reason"] == "tool_calls"


def test_a_schema_holds_the_answer(library: Any, talker: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    asked = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    content = chat(talker, response_format=asked, max_tokens=60)["choices"][0]["message"]["content"]
    assert json.loads(content)["n"] in (1, 2)
    asked = {"type": "json_object", "schema": schema}
    assert json.loads(chat(talker, response_format=asked, max_tokens=60)["choices"][0]["message"]["content"])["n"]
    answer = chat(talker, response_format={"type": "json_object"}, max_tokens=1)
    assert answer["choices"][0]["message"]["content"].startswith("{")


def test_a_template_without_tools_gets_them_in_words(write_model: Callable[[Scripted], Path]) -> None:
    with serving(loading(write_model(PLAIN))) as (client, _):
        answer = chat(client, tools=[CLOCK], **ending(" go"))
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert (call["function"]["name"], call["function"]["arguments"]) == ("clock", "{}")
        assert answer["usage"]["prompt_tokens"] > chat(client, **ending(" go"))["usage"]["prompt_tokens"] + 100
        spoken = {"role": "assistant", "tool_calls": [call]}
        history = [*HELLO, spoken, {"role": "tool", "tool_call_id": call["id"], "content": "noon"}]
        assert chat(client, tools=[CLOCK], messages=history)["choices"][0]["message"]["content"] == "Hi"
        assert chat(client, messages=history)["choices"][0]["message"]["content"] == "Hi"


def test_text_completions(library: Any, talker: httpx.Client) -> None:
    answer = library.completions.create(model="talker", prompt=" hello[assistant]", temperature=0, echo=True)
    assert answer.choices[0].text == " hello[assistant] Hello there"
    asked = {"prompt": [TALKER.ids("[assistant]"), TALKER.ids(" Hello")], "temperature": 0}
    body = talker.post("/v1/completions", json=asked).json()
    assert [choice["text"] for choice in body["choices"]] == [" Hello there", " there"]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (2, 3)
    long = library.completions.create(model="talker", prompt=" on", temperature=0)
    assert (long.choices[0].text, long.choices[0].finish_reason) == (" on" * 16, "length")
    parts = library.completions.create(model="talker", prompt=" on", temperature=0, stream=True, max_tokens=3)
    assert "".join(part.choices[0].text for part in parts) == " on" * 3


def test_probabilities_of_a_prompt(talker: httpx.Client) -> None:
    asked = {"prompt": " Hello there", "max_tokens": 0, "echo": True, "logprobs": 1}
    (choice,) = talker.post("/v1/completions", json=asked).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" Hello there", "length")
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["", " Hello", " there"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][2] == pytest.approx(0, abs=1e-3)
    assert logprobs["top_logprobs"][2] == {" there": pytest.approx(0, abs=1e-3)}
    assert logprobs["text_offset"] == [0, 0, 6]


def test_tokens_and_texts(talker: httpx.Client) -> None:
    ids = TALKER.ids(" Hello", "</think>")
    assert talker.post("/tokenize", json={"content": " Hello</think>"}).json() == {"tokens": ids}
    asked = {"content": "\u00e9", "with_pieces": True}
    pieces = [token["piece"] for token in talker.post("/tokenize", json=asked).json()["tokens"]]
    assert pieces == [[0xC3], [0xA9]]
    assert talker.post("/detokenize", json={"tokens": ids}).json() == {"content": " Hello</think>"}


def test_models(library: Any) -> None:
    (model,) = library.models.list().data
    assert (model.id, library.models.retrieve("talker").id) == ("talker", "talker")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        library.models.retrieve("gpt-4o")
