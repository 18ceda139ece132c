"""What is told from a chat template about the answers of its model. scripts/peers asks llama.cpp's 70 templates."""

from __future__ import annotations

import pytest

from ggufmoe.runtime.answer_syntax import AnswerSyntax, Tags, ToolSyntax, syntax_of
from ggufmoe.templates.jinja_template import ChatTemplate

BEGIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END = "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = "{% for call in m.tool_calls or [] %}{% set f = call.function %}"


def told(middle: str = "", source: str = "") -> AnswerSyntax:
    """What is told from a template that writes ``middle`` before the content of each message."""
    return syntax_of(ChatTemplate(source or BEGIN + middle + END))


def test_a_template_that_tells_nothing() -> None:
    for source in (
        "",
        "{{ messages[0].content }}",
        "{{ raise_exception('no') }}",
        "{% for x in y %}{{ x }}{% endfor %}",
    ):
        assert told(source=source or BEGIN + END) == AnswerSyntax(Tags("<think>", "</think>"), None)


@pytest.mark.parametrize(
    ("middle", "opens", "closes"),
    [
        ("{% if m.thinking %}<s:think>{{ m.thinking }}</s:think>{% endif %}", "<s:think>", "</s:think>"),
        ("{% if m.thinking %}[R]{{ m.thinking }}[/R]\n{% endif %}", "[R]", "[/R]"),
        ("{# [THINK] and [/THINK] #}", "[THINK]", "[/THINK]"),
        ("{% if m.thinking %}<|im_start|>{{ m.thinking }}<|im_end|>{% endif %}", "<think>", "</think>"),
    ],
)  # fmt: skip
def test_marks_of_reasoning(middle: str, opens: str, closes: str) -> None:
    assert told(middle).reasoning == Tags(opens, closes)


def test_marks_around_the_text() -> None:
    assert told("{# <response> </response> #}").text == Tags("<response>", "</response>")
    assert "<response>" in told("{# <response> </response> #}").marks


def test_channels() -> None:
    assert told("{% if false %}<|channel|><|message|>{% endif %}").is_harmony


@pytest.mark.parametrize(
    ("calls", "syntax"),
    [
        (
            '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>{% endfor %}',
            ToolSyntax("json", ("<tool_call>",), ends=("</tool_call>",)),
        ),
        (
            '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}{% endfor %}',
            ToolSyntax("json"),
        ),
        (
            '{% if loop.first %}<t>[{% endif %}{"{{ f.name }}": {{ f.arguments | tojson }}}'
            "{% if loop.last %}]</t>{% else %}, {% endif %}{% endfor %}",
            ToolSyntax("json", ("<t>",), ends=("</t>",), name_is_key=True),
        ),
        (
            "[TOOL_CALLS]{{ f.name }}[CALL_ID]{{ call.id }}[ARGS]{{ f.arguments | tojson }}{% endfor %}",
            ToolSyntax("named", ("[TOOL_CALLS]",)),
        ),
        (
            "{% if loop.first %}<calls>{% endif %}<call>{{ call.id }}<sep>{{ f.name }}\n```json\n"
            "{{ f.arguments | tojson }}\n```</call>{% if loop.last %}</calls>{% endif %}{% endfor %}",
            ToolSyntax("named", ("<call>", None, "<sep>"), ("<calls>",), ("```", "</call>", "</calls>")),
        ),
        (
            "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}<parameter={{ k }}>\n{{ v }}\n"
            "</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}",
            ToolSyntax(
                "tagged",
                ("<tool_call>", "<function="),
                ends=("</parameter>", "</function>", "</tool_call>"),
                argument_opening=("<parameter=",),
                name_ends=(">",),
                key_end=">",
                value_end="</parameter>",
            ),
        ),
        (
            "{% if loop.first %}<c>[{% endif %}{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}='{{ v }}'"
            "{{ ', ' if not loop.last }}{% endfor %}){{ ', ' if not loop.last else ']</c>' }}{% endfor %}",
            ToolSyntax("python", ("<c>",), ends=("</c>",)),
        ),
        ("{{ f.name }}\n{{ f.arguments | tojson }}{% endfor %}", None),
        ('<|im_start|>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}{% endfor %}', None),
        ("{% endfor %}{# [TOOL_CALLS] #}", ToolSyntax("json", ("[TOOL_CALLS]",))),
    ],
    ids=lambda value: value.style if isinstance(value, ToolSyntax) else "none" if value is None else "",
)
def test_styles_of_calls(calls: str, syntax: ToolSyntax | None) -> None:
    assert told(CALLS + calls).tools == syntax


@pytest.mark.parametrize("times", [40, 4000])
@pytest.mark.parametrize(
    "calls", ["<t>{{ f.name * N }}{{ 'probe_key' * N }}{{ 'one v' * N }}", "<t>{{ '[{' * N }}{{ f.name }}"]
)
def test_a_template_that_writes_much_more_than_a_call(calls: str, times: int) -> None:
    assert told(CALLS + calls.replace("N", str(times)) + "{% endfor %}").tools is None


def test_a_template_that_wants_arguments_as_text() -> None:
    said = told(CALLS + "<t>{{ '{\"name\": \"' + f.name + '\", \"arguments\": ' + f.arguments + '}' }}</t>{% endfor %}")
    assert said.arguments_as_text
    assert said.tools == ToolSyntax("json", ("<t>",), ends=("</t>",))


def test_marks_that_must_be_seen() -> None:
    assert told().marks == ("<think>", "</think>")
    with_tools = told(CALLS + "<a>{{ call.id }}<b>{{ f.name }}<x>{{ f.arguments | tojson }}</a>{% endfor %}")
    assert with_tools.marks == ("<think>", "</think>", "<a>", "<b>", "</a>")
    assert "<|channel|>" in told("{% if false %}<|channel|><|message|>{% endif %}").marks
