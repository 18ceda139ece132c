"""Messages to prompts and answers to events, without state, with models that reason and call tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ggufmoe import Chat, Engine, InputError, OptionError
from ggufmoe.options import TemplateOptions
from ggufmoe.runtime.chatformat import ChatFormat, message_of
from ggufmoe.runtime.events import ChatEvent, Finished, Reasoning, Token, ToolCallArguments, ToolCallBegun
from ggufmoe.runtime.messages import Message, Tool, ToolCall
from ggufmoe.templates.jinja_template import ChatTemplate
from tests.scripted import Scripted
from tests.stories import GREEDY, ONE_THREAD

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    '{% for call in m.tool_calls or [] %}<call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</call>{% endfor %}{% endfor %}'
    "{% for tool in tools or [] %}[tool:{{ tool.function.name }}]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
    "{{ reasoning_effort or '' }}{{ persona or '' }}{% endif %}"
)
THINKER = Scripted(
    {
        "[assistant]": "<think>",
        "<think>": " Hm",
        " Hm": ".",
        ".": "</think>",
        "</think>": "\n",
        "\n": " Yes",
        "[tool:weather]": "[assistant]",
        " low": " Low",
    },
    pieces=["[user]", "[system]", " hello", " again"],
    controls=["<think>", "</think>"],
    chat_template=TEMPLATE,
)
CALLER = Scripted(
    {
        "[assistant]": " Look",
        " Look": "<call>",
        "<call>": '{"name": "weather", "arg',
        '{"name": "weather", "arg': 'uments": {"city": "Ro',
        'uments": {"city": "Ro': 'me"}}',
        'me"}}': "</call>",
    },
    pieces=["[user]", "[tool]", "[tool:weather]", " hello"],
    controls=["<call>", "</call>"],
    chat_template=TEMPLATE,
)
WEATHER = Tool("weather", "The weather.", {"type": "object", "properties": {"city": {"type": "string"}}})
HELLO = Message("user", " hello")


@pytest.fixture(scope="module")
def thinker(write_model: Callable[[Scripted], Path]) -> Iterator[Engine]:
    with Engine(write_model(THINKER), ONE_THREAD) as engine:
        yield engine


@pytest.fixture(scope="module")
def caller(write_model: Callable[[Scripted], Path]) -> Iterator[Engine]:
    with Engine(write_model(CALLER), ONE_THREAD) as engine:
        yield engine


def kinds(events: list[ChatEvent]) -> list[type]:
    return [type(event) for event in events if not isinstance(event, Token)]


# ---- reasoning


def test_reasoning_comes_in_events_of_its_own(thinker: Engine) -> None:
    form = ChatFormat(thinker)
    events = list(form.generate(form.render([HELLO]), GREEDY))
    assert message_of(events) == Message("assistant", "Yes", "Hm.")
    assert [event for event in events if isinstance(event, Reasoning)] == [Reasoning("Hm"), Reasoning(".")]
    tokens = [event for event in events if isinstance(event, Token)]
    assert [(token.token_id, token.text) for token in tokens] == [
        *((THINKER.id(piece), "") for piece in ("<think>", " Hm", ".", "</think>", "\n")),
        (THINKER.id(" Yes"), "Yes"),
    ]
    assert isinstance(events[-1], Finished)
    assert events[-1].timing.generated_tokens == 6


def test_a_prompt_that_begins_the_reasoning(thinker: Engine) -> None:
    form = ChatFormat(thinker)
    prompt = form.render([HELLO], variables={"enable_thinking": True})
    assert (prompt.in_reasoning, form.render([HELLO]).in_reasoning) == (True, False)
    assert message_of(form.generate(prompt, GREEDY)) == Message("assistant", "Yes", "Hm.")


def test_an_answer_that_ends_within_its_reasoning(thinker: Engine) -> None:
    form = ChatFormat(thinker)
    events = list(form.generate(form.render([HELLO]), replace(GREEDY, n_predict=2)))
    assert message_of(events) == Message("assistant", "", "Hm")
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "length"


def test_control_tokens_are_shown_only_where_that_was_asked(thinker: Engine) -> None:
    prompt = ChatFormat(thinker).render([HELLO]).tokens
    for shown, text in (((), " Hm.\n Yes"), (THINKER.ids("<think>"), "<think> Hm.\n Yes")):
        assert "".join(event.text for event in thinker.generate(prompt, GREEDY, shown=shown)) == text


def test_channels_of_control_tokens(write_model: Callable[[Scripted], Path]) -> None:
    final = "assistant<|channel|>final<|message|> Yes"
    spec = Scripted(
        {
            "<|start|>assistant": "<|channel|>",
            "<|channel|>": "analysis",
            "analysis": "<|message|>",
            "<|message|>": " Hm",
            " Hm": "<|end|>",
            "<|end|>": "<|start|>",
            "<|start|>": final,
            final: "<|return|>",
        },
        # llama.cpp takes <|end|> for the end of an answer unless the vocabulary has <|return|> and <|call|>
        controls=["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>", "<|call|>"],
        chat_template="{{ messages[0].content }}<|start|>assistant{# <|channel|>analysis<|message|> #}",
    )
    with Engine(write_model(spec), ONE_THREAD) as engine:
        form = ChatFormat(engine)
        answer = message_of(form.generate(form.render([Message("user", "")]), GREEDY))
    assert answer == Message("assistant", " Yes", "Hm")


def test_a_chat_keeps_reasoning_and_the_template_decides_about_it(thinker: Engine) -> None:
    chat = Chat(thinker, sampling=GREEDY)
    assert "".join(event.text for event in chat.send(" hello")) == "Yes"
    assert chat.messages == (HELLO, Message("assistant", "Yes", "Hm."))
    prompt = thinker.detokenize(chat.prompt([*chat.messages, Message("user", " again")]), special=True)
    assert prompt.decode() == "<s>[user] hello[assistant]Yes[user] again[assistant]"


def test_a_chat_keeps_an_answer_that_ended_within_its_reasoning(thinker: Engine) -> None:
    chat = Chat(thinker, sampling=replace(GREEDY, n_predict=2))
    list(chat.send(" hello"))
    assert chat.messages == (HELLO, Message("assistant", "", "Hm"))
    chat.sampling = GREEDY
    list(chat.regenerate())
    assert chat.messages == (HELLO, Message("assistant", "Yes", "Hm."))


def test_reasoning_is_saved_and_loaded(thinker: Engine, tmp_path: Path) -> None:
    path, chat = tmp_path / "talk.json", Chat(thinker, sampling=GREEDY)
    list(chat.send(" hello"))
    chat.save(path)
    content = json.loads(path.read_text("utf-8"))
    assert content["messages"] == [
        {"role": "user", "content": " hello"},
        {"role": "assistant", "content": "Yes", "reasoning": "Hm."},
    ]
    other = Chat(thinker)
    other.load(path)
    assert other.messages == chat.messages
    content["messages"][1]["reasoning"] = 5
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(InputError, match="a message needs a role and a content"):
        other.load(path)


# ---- variables


def test_variables_reach_the_template(thinker: Engine) -> None:
    form = ChatFormat(thinker)
    options = TemplateOptions(think="off", reasoning_effort="low", template_var=("persona= hello",))
    variables = form.variables_of(options)
    assert variables == {"enable_thinking": False, "reasoning_effort": "low", "persona": " hello"}
    text = thinker.detokenize(form.render([HELLO], variables=variables).tokens, special=True).decode()
    assert text.endswith("[assistant]low hello")
    assert form.variables_of(TemplateOptions(think="on")) == {"enable_thinking": True}
    assert form.variables_of(TemplateOptions()) == {}


def test_values_of_variables_are_json_or_text() -> None:
    typed = ("a=1", "b=true", 'c={"d": []}', "e=so so", "f=", "g=[1", "h=a=b")
    assert TemplateOptions(template_var=typed).variables == {
        "a": 1,
        "b": True,
        "c": {"d": []},
        "e": "so so",
        "f": "",
        "g": "[1",
        "h": "a=b",
    }
    for wrong in ("a", "=1", "1a=2", "a b=1"):
        with pytest.raises(OptionError, match=r"--template-var: expected NAME=VALUE, not"):
            TemplateOptions(template_var=(wrong,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TemplateOptions(think="on"), "--think has no effect on this model: its chat template reads none of enable_th"),
        (TemplateOptions(reasoning_effort="low"), "--reasoning-effort has no effect on this model"),
        (TemplateOptions(template_var=("mood=glad",)), "--template-var mood has no effect .* reads no variable mood"),
        (TemplateOptions(template_var=("messages=[]",)), "--template-var messages cannot be set: each conversation"),
    ],
)
def test_a_variable_that_the_template_never_reads(thinker: Engine, options: TemplateOptions, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Chat(thinker, template=ChatTemplate("{{ messages[0].content }}"), variables=options)


# ---- tools


def test_tools_and_results_reach_the_template(caller: Engine) -> None:
    form = ChatFormat(caller)
    asked = Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Rome"}', "a1"),))
    result = Message("tool", " hello", tool_call_id="a1", name="weather")
    text = caller.detokenize(form.render([HELLO, asked, result], [WEATHER]).tokens, special=True).decode()
    call = '<call>{"name": "weather", "arguments": {"city": "Rome"}}</call>'
    assert text == f"<s>[user] hello[assistant]{call}[tool] hello[tool:weather][assistant]"


def test_a_call_comes_in_events(caller: Engine) -> None:
    form = ChatFormat(caller)
    events = list(form.generate(form.render([HELLO], [WEATHER]), GREEDY))
    assert kinds(events) == [ToolCallBegun, ToolCallArguments, ToolCallArguments, Finished]
    assert message_of(events) == Message("assistant", "Look", tool_calls=(ToolCall("weather", '{"city": "Rome"}'),))


def test_without_tools_a_call_is_text(caller: Engine) -> None:
    form = ChatFormat(caller)
    answer = message_of(form.generate(form.render([HELLO]), GREEDY))
    assert answer.content == 'Look<call>{"name": "weather", "arguments": {"city": "Rome"}}</call>'


def test_text_before_a_call_is_analysis_for_gpt_oss(caller: Engine) -> None:
    source = "{% for m in messages %}{{ m.content }}|{{ m.thinking }};{% endfor %}{# <|channel|> <|message|> #}"
    form = ChatFormat(caller, ChatTemplate(source))
    both = Message("assistant", " Look", " hello", (ToolCall("weather", "{}"),))
    text = caller.detokenize(form.render([both, replace(both, tool_calls=())]).tokens).decode()
    assert text == "| hello\n\n Look; Look| hello;"


def test_messages_as_templates_get_them() -> None:
    cut_off = Message("assistant", "x", "r", (ToolCall("f", '{"a": '), ToolCall("g", ""), ToolCall("h", "[1]", "i")))
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": '{"a": '}},
        {"type": "function", "function": {"name": "g", "arguments": {}}},
        {"id": "i", "type": "function", "function": {"name": "h", "arguments": "[1]"}},
    ]
    assert cut_off.to_template() == {"role": "assistant", "content": "x", "reasoning_content": "r", "tool_calls": calls}
    as_text = Message("assistant", "", tool_calls=(ToolCall("f", '{"a": 1}'),)).to_template(arguments_as_text=True)
    assert as_text["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


def test_closing_the_events_ends_the_computing(thinker: Engine) -> None:
    form = ChatFormat(thinker)
    events = form.generate(form.render([HELLO]), replace(GREEDY, n_predict=-1))
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert list(events) == []
    assert message_of(form.generate(form.render([HELLO]), GREEDY)).content == "Yes"
