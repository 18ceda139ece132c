"""``/v1/responses`` through OpenAI's own client: items, typed events, tools, schemas, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from ggufmoe import Engine
from ggufmoe.errors import EngineLostError
from ggufmoe.runtime.events import Event, Token
from ggufmoe.server.asked_responses import ResponsesRequest
from ggufmoe.server.bodies import validated
from ggufmoe.work import OnProgress
from tests.scripted import Scripted
from tests.server.running import PLAIN, TALKER, loading, serving
from tests.stories import ONE_THREAD

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}
THINKING = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.fixture(scope="module")
def talker(write_model: Callable[[Scripted], Path]) -> Iterator[httpx.Client]:
    with serving(loading(write_model(TALKER))) as (client, _):
        yield client


@pytest.fixture(scope="module")
def library(talker: httpx.Client) -> Iterator[Any]:
    with openai.OpenAI(api_key="none", base_url=str(talker.base_url.join("/v1")), max_retries=0) as client:
        yield client


def ending(words: str) -> dict[str, Any]:
    return {"chat_template_kwargs": {"ending": words}}


def create(library: Any, **fields: Any) -> Any:
    return library.responses.create(**{"model": "talker", "input": " hello", "temperature": 0, **fields})


def events(library: Any, **fields: Any) -> list[Any]:
    found = list(create(library, stream=True, **fields))
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


def without_ids(response: Any) -> list[dict[str, Any]]:
    """The output without what differs each time."""
    items = [item.model_dump(exclude={"id", "call_id"}, exclude_none=True) for item in response.output]
    assert len({item.id for item in response.output}) == len(items)
    return items


def test_an_answer_as_one_object(library: Any) -> None:
    answer = create(library, instructions=" hello", metadata={"a": "b"}, store=True)
    assert (answer.status, answer.output_text, answer.error) == ("completed", "Hello there", None)
    (item,) = answer.output
    assert (item.type, item.role, item.status, item.content[0].annotations) == ("message", "assistant", "completed", [])
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (6, 2, 8)
    assert (answer.instructions, answer.metadata, answer.to_dict()["store"]) == (" hello", {"a": "b"}, False)
    assert create(library, instructions=" hello").usage.input_tokens_details.cached_tokens == 5
    cut = create(library, max_output_tokens=1)
    assert (cut.status, cut.incomplete_details.reason, cut.output_text) == ("incomplete", "max_output_tokens", "Hello")
    assert cut.output[0].status == "incomplete"
    assert create(library, extra_body={"stop": ["there"]}).output_text == "Hello "


def test_a_stream_of_typed_events(library: Any, talker: httpx.Client) -> None:
    found = events(library)
    types = [event.type.removeprefix("response.") for event in found]
    assert [kind for kind, _ in itertools.groupby(types)] == [  # tokens that come together are one delta
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert types.count("output_text.done") == 1
    assert "".join(event.delta for event in found if event.type == "response.output_text.delta") == "Hello there"
    assert without_ids(found[-1].response) == without_ids(create(library))
    assert found[0].response.status == "in_progress"
    body = {"input": " hello", "stream": True, "temperature": 0}
    first, *_, last = talker.post("/v1/responses", json=body).text.strip().split("\n\n")
    assert first.startswith("event: response.created\ndata: {")
    assert last.startswith("event: response.completed\ndata: {")
    with library.responses.stream(model="talker", input=" hello", temperature=0, max_output_tokens=1) as stream:
        assert [event.type for event in stream][-1] == "response.incomplete"


def test_reasoning_is_an_item_of_its_own(library: Any) -> None:
    answer = create(library, extra_body=THINKING)
    thought, said = answer.output
    assert (thought.type, thought.content[0].text, thought.summary) == ("reasoning", "Hm", [])
    assert said.content[0].text == "Hello there"
    assert answer.usage.output_tokens_details.reasoning_tokens == 1
    found = events(library, extra_body=THINKING)
    assert [event.delta for event in found if event.type == "response.reasoning_text.delta"] == ["Hm"]
    assert without_ids(found[-1].response) == without_ids(answer)
    question = {"role": "user", "content": " hello"}
    assert create(library, input=[question, *answer.output, question]).output_text == "Hello there"


def test_a_tool_is_called_and_its_result_goes_back(library: Any) -> None:
    answer = create(library, tools=[TOOL], extra_body=ending(" call"))
    (call,) = answer.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Rome"})
    found = events(library, tools=[TOOL], extra_body=ending(" call"))
    parts = [event.delta for event in found if event.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(parts)) == {"city": "Rome"}
    assert without_ids(found[-1].response) == without_ids(answer)
    history = [
        {"role": "user", "content": [{"type": "input_text", "text": " hello"}]},
        *answer.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    assert create(library, input=history, tools=[TOOL]).output_text == "Hello there"
    named = {"type": "function", "name": "weather"}
    one = create(library, tools=[TOOL], tool_choice=named, max_output_tokens=300)
    assert one.output[0].name == "weather"
    assert "weather" in create(library, tools=[TOOL], tool_choice="none", extra_body=ending(" call")).output_text


@pytest.mark.parametrize(
    "fields",
    [
        {"include": ["message.output_text.logprobs"], "max_output_tokens": 1},
        THINKING,
        {"tools": [TOOL], **ending(" call")},
    ],
)
def test_every_object_has_the_documented_fields(talker: httpx.Client, fields: dict[str, Any]) -> None:
    """OpenAI's client takes what it gets; its types validate when they are asked to."""
    kinds: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    body = {"input": " hello", "temperature": 0, **fields}
    Response.model_validate(talker.post("/v1/responses", json=body).json())
    for event in talker.post("/v1/responses", json={**body, "stream": True}).text.strip().split("\n\n"):
        name, data = event.split("\n")
        assert kinds.validate_json(data.removeprefix("data: ")).type == name.removeprefix("event: ")


def test_what_the_conversation_becomes() -> None:
    call = {"type": "function_call", "name": "clock", "arguments": "{}"}
    items = [
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"role": "assistant", "content": "Let me see"},
        {**call, "call_id": "a"},
        {**call, "call_id": "b", "status": "completed"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "noon"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "It is", "annotations": []}]},
        {"role": "assistant", "content": "noon"},
    ]
    told = validated(ResponsesRequest, {"input": items, "instructions": "Be brief"}).to_chat().messages
    assert [message.role for message in told] == ["system", "assistant", "tool", "assistant", "assistant"]
    assert (told[1].content, told[1].reasoning_content) == ("Let me see", "Hm")
    assert [(call.id, call.function.name) for call in told[1].tool_calls or ()] == [("a", "clock"), ("b", "clock")]
    assert [(message.content, message.tool_call_id) for message in told[2:]] == [
        ("noon", "a"),
        ("It is", None),
        ("noon", None),
    ]


class Number(BaseModel):
    n: Literal[1, 2]


def test_a_schema_holds_the_answer(library: Any) -> None:
    parsed = library.responses.parse(model="talker", input=" hello", text_format=Number, max_output_tokens=100)
    assert parsed.output_parsed.n in (1, 2)
    asked = {"format": {"type": "json_object"}}
    assert create(library, text=asked, max_output_tokens=1).output_text.startswith("{")


def test_probabilities(library: Any) -> None:
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    entry, _ = create(library, **asked).output[0].content[0].logprobs
    assert (entry.token, len(entry.top_logprobs)) == (" Hello", 2)
    deltas = [event for event in events(library, **asked) if event.type == "response.output_text.delta"]
    assert [entry.token for event in deltas for entry in event.logprobs] == [" Hello", " there"]


def test_tools_for_a_template_that_knows_none(write_model: Callable[[Scripted], Path]) -> None:
    with serving(loading(write_model(PLAIN))) as (client, _):
        asked = {"input": " hello", "tools": [{**TOOL, "name": "clock"}], "temperature": 0, **ending(" go")}
        (item,) = client.post("/v1/responses", json=asked).json()["output"]
        assert (item["name"], item["arguments"]) == ("clock", "{}")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores nothing"),
        ({"conversation": "conv_1"}, "conversation", "stores nothing"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "an item must be a message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content", "images"),
        ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input[0].colour", "does not know"),
        ({"tools": [{"type": "web_search", "name": "x"}]}, "tools[0].type", "function"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "needs a schema"),
        ({"top_logprobs": 1}, "top_logprobs", "needs include"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "no variable reasoning_effort"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"background": True}, "background", "False"),
        ({"max_tokens": 1}, "max_tokens", "does not know"),
        ({"n": 2}, "n", "does not know"),
        ({"input": " hello" * 500}, "input", "the context holds"),
    ],
)
def test_what_is_refused(talker: httpx.Client, fields: dict[str, Any], param: str, message: str) -> None:
    refused = talker.post("/v1/responses", json={"input": " hello", **fields})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


def test_an_engine_that_is_lost_within_an_answer(write_model: Callable[[Scripted], Path]) -> None:
    class Losing(Engine):
        def generate(self, *arguments: Any, **keywords: Any) -> Iterator[Event]:
            yield Token(" Hello", 5)
            raise EngineLostError("llama.cpp has given up: an assertion")

    path = write_model(TALKER)

    def load(on_progress: OnProgress, cancel: Any) -> Engine:
        return Losing(path, ONE_THREAD, on_progress=on_progress, cancel=cancel)

    with serving(load) as (client, _):
        last = client.post("/v1/responses", json={"input": " hello", "stream": True}).text.strip().split("\n\n")[-1]
        name, data = last.split("\n")
        failed = json.loads(data.removeprefix("data: "))
        assert (name, failed["response"]["status"]) == ("event: response.failed", "failed")
        assert "an assertion" in failed["response"]["error"]["message"]
        assert failed["response"]["output"][0]["content"][0]["text"] == "Hello"
