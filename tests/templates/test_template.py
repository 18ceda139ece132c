"""Which template holds, what a system message becomes, and the built-in templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ggufmoe import OptionError, TemplateError
from ggufmoe.gguf.header import GGUFValue, Header
from ggufmoe.gguf.types import ValueType
from ggufmoe.templates.jinja_template import BUILTIN, ChatTemplate, find_template, fold_system

TALK = [
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
]
SYSTEM = {"role": "system", "content": "S"}
PLAIN = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
DROPPING = "{% for m in messages if m.role != 'system' %}{{ m.role }}={{ m.content }};{% endfor %}"


def header(**metadata: Any) -> Header:
    values = {f"tokenizer.{key}": GGUFValue(ValueType.STRING, text, None) for key, text in metadata.items()}
    return Header(version=3, metadata=values, tensors=(), alignment=32, data_offset=0, file_bytes=0)


def test_a_template_sees_messages_tokens_and_variables() -> None:
    template = ChatTemplate("{{ bos_token }}{{ eos_token }}{{ tools }}{{ mood }}" + PLAIN, bos="<s>", eos="</s>")
    assert template.render(TALK[:1], mood="glad") == "<s></s>Nonegladuser=U1;>"
    assert template.render(TALK[:1], add_generation_prompt=False, tools=[]) == "<s></s>[]user=U1;"


def test_a_system_message_where_there_is_a_place_for_it() -> None:
    template = ChatTemplate(PLAIN)
    assert template.takes_system
    assert template.render([SYSTEM, *TALK[:1]]) == "system=S;user=U1;>"


@pytest.mark.parametrize("source", [REFUSING, DROPPING])
def test_a_system_message_where_there_is_none_goes_into_the_first_turn(source: str) -> None:
    template = ChatTemplate(source)
    assert not template.takes_system
    assert "user=S\n\nU1;assistant=A1;user=U2;" in template.render([SYSTEM, *TALK])


def test_folding_without_a_user() -> None:
    assert fold_system([SYSTEM]) == [{"role": "user", "content": "S"}]
    assert fold_system([SYSTEM, TALK[1]]) == [{"role": "user", "content": "S"}, TALK[1]]


def test_what_was_given_is_left_as_it_was() -> None:
    messages = [dict(SYSTEM), *(dict(turn) for turn in TALK)]
    ChatTemplate(DROPPING).render(messages)
    assert messages == [SYSTEM, *TALK]


def test_no_messages_at_all() -> None:
    assert ChatTemplate(PLAIN).render([]) == ">"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
            "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nU1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nU2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] S\n\nU1 [/INST] A1</s>[INST] U2 [/INST]"),
    ],
)
def test_builtin_templates(name: str, expected: str) -> None:
    template = find_template(name, header(), bos="<s>", eos="</s>")
    assert template is not None
    assert template.render([SYSTEM, *TALK]) == expected
    assert template.stop == BUILTIN[name].stop


def test_mistral_wants_turns() -> None:
    template = ChatTemplate(BUILTIN["mistral"].source)
    with pytest.raises(TemplateError, match="user and assistant must take turns"):
        template.render([TALK[0], TALK[0]])


def test_the_files_own_template_and_its_named_ones() -> None:
    file = header(**{"chat_template": "own", "chat_template.tool_use": "tools", "chat_template.chatml": "mine"})
    choices = (None, "own"), ("default", "own"), ("tool_use", "tools"), ("tool-use", "tools"), ("chatml", "mine")
    for choice, text in choices:
        template = find_template(choice, file)
        assert template is not None
        assert template.render([]) == text
    assert find_template(None, header()) is None
    assert find_template(None, header(chat_template="")) is None


def test_a_template_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(PLAIN, encoding="utf-8")
    template = find_template(str(path), header())
    assert template is not None
    assert template.render(TALK[:1]) == "user=U1;>"


def test_what_editors_put_before_a_template_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes(PLAIN.replace("\n", "\r\n").encode(encoding))
        template = find_template(str(path), header())
        assert template is not None
        assert template.render(TALK[:1]) == "user=U1;>"
    stored = find_template(None, header(chat_template="\ufeff" + PLAIN))
    assert stored is not None
    assert stored.render(TALK[:1]) == "user=U1;>"


def test_special_tokens_and_what_transformers_always_gives() -> None:
    source = "{{ unk_token }}|{{ pad_token }}|{{ documents is none }}{{ tools is none }}"
    template = find_template(None, header(chat_template=source), unk="<unk>", pad="")
    assert template is not None
    assert template.render([]) == "<unk>||TrueTrue"
    assert template.render([], documents=["d"]) == "<unk>||FalseTrue"


def test_a_template_that_loops_over_tools_without_asking_gets_none() -> None:
    template = ChatTemplate("{% for tool in tools %}{{ tool }};{% endfor %}" + PLAIN)
    assert template.render(TALK[:1]) == "user=U1;>"
    assert template.render(TALK[:1], tools=["t"]) == "t;user=U1;>"
    with pytest.raises(TemplateError, match="failed: 'NoneType' object is not iterable"):
        template.render_strictly(TALK[:1])
    assert ChatTemplate("{{ functions[0].name }}")._no_tools == {}


def test_reasoning_has_the_names_that_templates_look_for_and_none_is_no_field() -> None:
    source = "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.content is defined }};{% endfor %}"
    turns = [{"role": "assistant", name: "R", "content": None} for name in ("reasoning", "reasoning_content")]
    assert ChatTemplate(source).render(turns) == "R|R|False;" * 2


def test_a_template_names_the_variables_that_it_reads() -> None:
    source = "{% if think is defined and think %}{{ strftime_now('%Y') }}{% endif %}{% set x = 1 %}{{ x }}" + PLAIN
    assert ChatTemplate(source).variables == {"think", "messages", "add_generation_prompt"}


ORACLE = json.loads((Path(__file__).parent / "fixtures" / "transformers_templates.json").read_text("utf-8"))


@pytest.mark.parametrize("name", ORACLE["cases"])
def test_templates_render_as_transformers_renders_them(name: str) -> None:
    case = ORACLE["cases"][name]
    messages = [dict(message) for message in ORACLE["messages"][case["messages"]]]

    def rendered() -> str:
        template = ChatTemplate(case["template"], bos="<s>", eos="</s>")
        return template.render_strictly(messages, add_generation_prompt=True)

    if case["text"] is None:
        with pytest.raises(TemplateError):
            rendered()
    else:
        assert rendered() == case["text"]


def test_a_name_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"neither a template's name \(chatml, llama3, mistral, own\) nor a file"):
        find_template(str(tmp_path / "no"), header(**{"chat_template.own": "x"}))
    with pytest.raises(OptionError, match="neither"):
        find_template(str(tmp_path), header())


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"\xff\xfe")
    with pytest.raises(TemplateError, match="not a text file"):
        find_template(str(tmp_path / "t"), header())


def test_a_file_that_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n")
    with pytest.raises(TemplateError, match=r"t: is a git-lfs pointer in the place of the file"):
        find_template(str(tmp_path / "t"), header())


def test_a_file_that_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("x" * 200_000)
    with pytest.raises(TemplateError, match="a template may have 100000"):
        find_template(str(tmp_path / "t"), header())
