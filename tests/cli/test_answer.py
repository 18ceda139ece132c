"""What a terminal, a pipe and a JSON object get of a model that reasons, and the flags and commands for it."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ggufmoe.cli import answer
from ggufmoe.cli.answer import write_answer
from ggufmoe.cli.app import exit_code
from ggufmoe.errors import EngineError
from ggufmoe.runtime.events import NO_TIMING, ChatEvent, Finished, Reasoning, Token, ToolCallArguments, ToolCallBegun
from tests.scripted import Scripted

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{{ mood or '' }}"
    "{{ reasoning_effort or '' }}"
)
MODEL = Scripted(
    {"[assistant]": "<think>", "<think>": " Hm", " Hm": " so", " so": "</think>", "</think>": " Yes", "low": " Low"},
    pieces=["[user]", "[system]", " hello", "glad"],
    controls=["<think>", "</think>"],
    chat_template=TEMPLATE,
)
THOUGHT: list[ChatEvent] = [Reasoning("Hm, "), Token("", 1), Reasoning("so"), Token("", 1)]
END = Finished("", "stop", NO_TIMING, 0)


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


Screens = Callable[[], tuple[Screen, Screen]]


@pytest.fixture
def screens(monkeypatch: pytest.MonkeyPatch) -> Screens:
    """Makes stdout and stderr a terminal of 20 columns when called: pytest sets both once more before a test."""

    def both() -> tuple[Screen, Screen]:
        out, err = Screen(), Screen()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err

    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    return both


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(MODEL.write(tmp_path_factory.mktemp("reasoning") / "model.gguf"))


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ggufmoe(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    def call(verb: str, *arguments: str, lines: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = exit_code([verb, model, *arguments, "--temp", "0", "-t", "1", "--quiet"])
        return code, *capsys.readouterr()

    return call


# ---- writing


def test_a_terminal_gets_reasoning_dimmed_before_the_answer(screens: Screens) -> None:
    out, err = screens()
    write_answer(iter([*THOUGHT, Token("Yes, ", 1), Token("it is.", 1), END]))
    assert out.getvalue() == "\x1b[2mHm, so\x1b[22m\n\nYes, it is.\n"
    assert err.getvalue() == ""


def test_reasoning_is_wrapped_like_the_answer(screens: Screens) -> None:
    out, _ = screens()
    write_answer(iter([Reasoning("one two three four five six"), Token("one two three four five six", 1), END]))
    wrapped = "one two three four\nfive six"
    assert out.getvalue() == f"\x1b[2m{wrapped}\x1b[22m\n\n{wrapped}\n"


def test_an_answer_that_ends_within_reasoning(screens: Screens) -> None:
    out, _ = screens()
    write_answer(iter([*THOUGHT, END]))
    assert out.getvalue() == "\x1b[2mHm, so\x1b[22m\n"


@pytest.mark.parametrize("error", [EngineError("lost"), KeyboardInterrupt()])
def test_a_terminal_is_not_left_dim(screens: Screens, error: BaseException) -> None:
    out, _ = screens()

    def events() -> Iterator[ChatEvent]:
        yield Reasoning("Hm")
        raise error

    with pytest.raises(type(error)):
        write_answer(events())
    assert out.getvalue() == "\x1b[2mHm\x1b[22m\n"


def test_a_terminal_that_cannot_dim_gets_headings(screens: Screens, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = screens()
    monkeypatch.setenv("TERM", "dumb")
    write_answer(iter([*THOUGHT, Token("Yes.", 1), END]))
    assert out.getvalue() == "[reasoning]\nHm, so\n[answer]\n\nYes.\n"
    write_answer(iter([*THOUGHT, END]))
    assert out.getvalue().endswith("[reasoning]\nHm, so\n")


def test_hidden_reasoning_shows_how_long_it_takes(screens: Screens, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = screens()
    monkeypatch.setattr(answer, "_STATUS_S", 0)
    write_answer(iter([*THOUGHT, Token("Yes.", 1), END]), show_reasoning=False)
    assert out.getvalue() == "Yes.\n"
    assert re.fullmatch(r"(\rthinking, \d s *)+\r *\r", err.getvalue())


def test_control_characters_of_reasoning_do_not_reach_a_terminal(screens: Screens) -> None:
    out, _ = screens()
    write_answer(iter([Reasoning("a\x1b[0mb"), END]))
    assert out.getvalue() == "\x1b[2ma\ufffd[0mb\x1b[22m\n"


def test_a_pipe_gets_the_answer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[ChatEvent] = [*THOUGHT, Token("Yes.", 1), END]
    write_answer(iter(events))
    assert capsys.readouterr() == ("Yes.\n", "")
    write_answer(iter(events), show_reasoning=True)
    assert capsys.readouterr() == ("Yes.\n", "Hm, so\n")


def test_a_tool_that_the_model_calls_without_being_given_any_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    write_answer(iter([ToolCallBegun(0, "python"), ToolCallArguments(0, "{}"), END]))
    assert capsys.readouterr() == ("\n", "(the model asks for the tool python, which it was not given)\n")


# ---- run


def test_run_prints_the_answer_alone(ggufmoe: Call) -> None:
    assert ggufmoe("run", " hello") == (0, "Yes\n", "")
    assert ggufmoe("run", " hello", "--show-reasoning") == (0, "Yes\n", "Hm so\n")
    assert ggufmoe("run", " hello", "--think", "off") == (0, "Yes\n", "")
    assert ggufmoe("run", " hello", "-n", "2") == (0, "\n", "")


def test_run_tells_text_and_reasoning_apart_in_json(ggufmoe: Call) -> None:
    result = json.loads(ggufmoe("run", " hello", "--json")[1])
    assert (result["text"], result["reasoning"], result["generated_tokens"]) == ("Yes", "Hm so", 5)


def test_variables_of_the_template(ggufmoe: Call) -> None:
    assert ggufmoe("run", " hello", "--reasoning-effort", "low") == (0, "Low\n", "")
    assert ggufmoe("run", " hello", "--template-var", "mood=glad") == (0, "\n", "")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (
            ("--template-var", "no=1"),
            2,
            "--template-var no has no effect on this model: its chat template reads no varia",
        ),
        (
            ("--chat-template", "chatml", "--think", "on"),
            2,
            "--think has no effect on this model: its chat template ch",
        ),
        (("--template-var", "no"), 2, "--template-var: expected NAME=VALUE, not 'no'"),
        (("--think", "maybe"), 2, "'maybe' is not one of"),
        (("--raw", "--think", "on"), 2, "--raw takes the text as it is"),
    ],
)
def test_a_flag_that_cannot_be_followed(ggufmoe: Call, flags: tuple[str, ...], code: int, message: str) -> None:
    given, out, err = ggufmoe("run", " hello", *flags)
    assert (given, out) == (code, "")
    assert message in " ".join(err.split())


# ---- chat


def test_chat_keeps_reasoning_out_of_what_the_model_sees_again(ggufmoe: Call, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    code, out, _ = ggufmoe("chat", lines=("hello", "hello", f"/save {path}", "/stats"))
    assert (code, out) == (0, "Yes\nYes\n")
    messages = json.loads(path.read_text("utf-8"))["messages"]
    assert [(message["content"], message.get("reasoning")) for message in messages] == [
        *(("hello", None), ("Yes", "Hm so")) * 2
    ]


def test_commands_of_reasoning(ggufmoe: Call) -> None:
    shown = ("/reasoning", "hello", "/reasoning hide", "hello", "/reasoning so")
    code, out, err = ggufmoe("chat", lines=(*shown, "/think off", "hello", "/think", "/think x"))
    assert (code, out) == (0, "Yes\n" * 3)
    assert err.splitlines() == [
        "reasoning is shown",
        "Hm so",
        "reasoning is hidden",
        "error: /reasoning takes show or hide, not so",
        "think = off",
        "think = off",
        "error: --think must be one of auto, on, off, not x",
    ]


def test_set_changes_variables(ggufmoe: Call) -> None:
    lines = ("/set reasoning-effort low", "hello", "/set template-var mood=1 no=2", "/set think", "/set", "/effort low")
    _, out, err = ggufmoe("chat", lines=(*lines, "/reasoning-effort high"))
    assert out == "Low\n"
    told = err.splitlines()
    assert told[:3] == [
        "reasoning-effort = low",
        "error: --template-var no has no effect on this model: its chat template reads no variable no",
        "think = auto",
    ]
    assert "reasoning-effort = low" in told[3:]
    assert any(line.startswith("also: ") and line.endswith("think, template-var") for line in told)
    assert told[-1] == "error: there is no /reasoning-effort; did you mean /set reasoning-effort?"
