"""Schemas of calls that must come, and prompts behind which an answer begins at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ggufmoe import Engine, SamplingOptions
from ggufmoe.runtime.chatformat import ChatFormat, ChatPrompt, message_of
from ggufmoe.runtime.events import Reasoning
from ggufmoe.runtime.grammar import gbnf_of_schema
from ggufmoe.runtime.messages import Message, Tool
from ggufmoe.server.toolcalls import answering_at_once, knows_tools, schema_of_call, with_bare_calls
from tests.scripted import Scripted
from tests.stories import ONE_THREAD

HARMONY = Scripted(
    {"<|start|>assistant": "<|channel|>", "<|channel|>": "analysis", "analysis": "<|message|>", "<|message|>": " Hm"},
    pieces=["<|start|>user", "final", " hello"],
    controls=["<|channel|>", "<|message|>", "<|end|>", "<|call|>"],
    chat_template=(
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|> #}"
    ),
)
HELLO = [Message("user", " hello")]
DAY = Tool("day", parameters={"type": "object", "properties": {"of": {"const": 1}}, "required": ["of"]})


def test_a_schema_refers_to_the_right_place_wherever_it_stands() -> None:
    tree = {"type": "object", "properties": {"child": {"$ref": "#"}, "name": {"$ref": "#/$defs/name"}}}
    tools = [DAY, Tool("tree", parameters={**tree, "$defs": {"name": {"enum": ["$ref", "#"]}}})]
    schema = json.loads(schema_of_call(tools))
    assert [call["properties"]["name"]["const"] for call in schema["anyOf"]] == ["day", "tree"]
    moved = schema["$defs"]["tool1"]
    assert moved["properties"]["child"] == {"$ref": "#/$defs/tool1"}
    assert moved["properties"]["name"] == {"$ref": "#/$defs/tool1/$defs/name"}
    assert moved["$defs"]["name"] == {"enum": ["$ref", "#"]}
    assert "root ::=" in gbnf_of_schema(json.dumps(schema))


def test_gpt_oss_answers_at_once_in_its_final_channel(write_model: Callable[[Scripted], Path]) -> None:
    with Engine(write_model(HARMONY), ONE_THREAD) as engine:
        chat_format = ChatFormat(engine)
        prompt = chat_format.render(HELLO)
        assert any(
            isinstance(event, Reasoning) for event in chat_format.generate(prompt, SamplingOptions(temperature=0))
        )
        at_once = answering_at_once(chat_format, prompt)
        assert at_once.tokens == (*prompt.tokens, *HARMONY.ids("<|channel|>", "final", "<|message|>"))
        held = SamplingOptions(temperature=0, json_schema='{"const": {"a": 1}}', n_predict=40)
        answer = message_of(chat_format.generate(at_once, held))
        assert (json.loads(answer.content), answer.reasoning) == ({"a": 1}, "")
        reader = with_bare_calls(chat_format)
        called = SamplingOptions(temperature=0, json_schema=schema_of_call([DAY]), n_predict=80)
        prompt = ChatPrompt(at_once.tokens, tools=(DAY,))
        (call,) = message_of(reader.generate(prompt, called)).tool_calls
        assert (call.name, json.loads(call.arguments)) == ("day", {"of": 1})
        assert not knows_tools(chat_format)  # this template does not show them
