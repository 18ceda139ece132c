"""``ggufmoe chat``, over pipes and with typed lines."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from ggufmoe import WorkerOptions
from ggufmoe.cli import chat as chat_module
from ggufmoe.cli.app import exit_code
from ggufmoe.remote.worker import Worker
from ggufmoe.runtime.chat import Chat
from ggufmoe.runtime.events import ChatEvent
from tests.remote.workers import start_worker
from tests.scripted import Scripted

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ ' ' + m.content }}{% endfor %}[assistant]"
MODEL = Scripted(
    {"[assistant]": " hi", " hi": " there"}, pieces=["[user]", "[system]", " hello"], chat_template=TEMPLATE
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(MODEL.write(tmp_path_factory.mktemp("chat") / "model.gguf"))


@pytest.fixture
def talk(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, list[str]]]:
    """Sends lines over stdin; gives the exit code, stdout and the lines on stderr."""

    def call(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code = exit_code(["chat", model, "--temp", "0", "-t", "1", *options])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return call


Talk = Callable[..., tuple[int, str, list[str]]]


def test_a_conversation_over_pipes(talk: Talk) -> None:
    code, out, err = talk("hello", "", "  hello  ")
    assert (code, out) == (0, "hi there\nhi there\n")
    assert err[0] == "model.gguf: a context of 512 tokens. /help lists the commands, Ctrl-D leaves."
    assert err[1].startswith("prompt: 4 tokens, ")
    assert err[2].startswith("prompt: 3 tokens (6 reused), ")


def test_quiet(talk: Talk) -> None:
    assert talk("hello", options=("--quiet",)) == (0, "hi there\n", [])


def test_help_lists_every_command(talk: Talk) -> None:
    _, out, err = talk("/help")
    assert out == ""
    for word in ("help", "reset", "system", "undo", "regen", "set", "save", "load", "stats", "exit"):
        assert any(line.startswith(f"/{word} ") for line in err)
    assert any(line.startswith('"""') for line in err)


def test_exit_leaves_at_once(talk: Talk) -> None:
    assert talk("/exit", "hello")[:2] == (0, "")


def test_an_impatient_ctrl_c_does_not_cost_the_conversation(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    send, calls = Chat.send, []

    def press(chat: Chat, text: str, **keywords: Any) -> Iterator[ChatEvent]:
        calls.append(text)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return send(chat, text, **keywords)

    monkeypatch.setattr(Chat, "send", press)
    code, out, err = talk("hello", "hello", "hello", "/stats")
    assert (code, out) == (0, "hi there\n" * 2)
    assert "(stopped)" in err
    assert any(line.endswith("4 messages") for line in err)


def test_reset(talk: Talk) -> None:
    _, out, err = talk("hello", "/reset", "/stats")
    assert out == "hi there\n"
    assert "context: 0 of 512 tokens; 0 messages" in err
    assert err[-1] == "no answer yet"


def test_stats(talk: Talk) -> None:
    _, _, err = talk("/stats", "hello", "/stats")
    assert "no answer yet" in err
    assert "context: 6 of 512 tokens; 2 messages" in err
    assert err[-1].startswith("prompt: 4 tokens")


def test_system(talk: Talk) -> None:
    _, _, err = talk("/system", "/system be kind", "/system", options=("-sys", "be quick"))
    assert err[1:] == ["system message: be quick", "system message: be kind", "system message: be kind"]
    assert talk("/system")[2][1:] == ["system message: (none)"]


def test_regen(talk: Talk) -> None:
    _, out, err = talk("/regen", "hello", "/regen")
    assert out == "hi there\nhi there\n"
    assert err[1] == "error: there is no answer yet that could be given again"


def test_undo_takes_back_the_last_message_and_its_answer(talk: Talk) -> None:
    _, _, err = talk("hello", "hello hello", "/undo", "/stats", "/undo", "/undo", options=("--quiet",))
    assert err[0] == "taken back: hello hello"
    assert err[1].endswith("; 2 messages")
    assert err[3:] == ["taken back: hello", "error: there is no message yet that could be taken back"]


def test_set_changes_how_answers_are_made(talk: Talk) -> None:
    _, out, err = talk("/set n-predict 1", "hello", "/set n_predict=default", "hello", options=("--quiet",))
    assert out == "hi\nhi there\n"
    assert err[0] == "n-predict = 1"
    assert err[2] == "n-predict = 256"


def test_set_alone_shows_the_options(talk: Talk) -> None:
    _, _, err = talk("/set top-k 7", "/set xtc-threshold 0.5", "/set", "/set temp", options=("--quiet",))
    shown = err[2:]
    assert "temperature = 0.0" in shown
    assert "top-k = 7" in shown
    assert "top-p = default (the model's, else 0.95)" in shown
    assert "xtc-threshold = 0.5" in shown
    assert any(line.startswith("also: typical-p, ") and "xtc-threshold" not in line for line in shown)
    assert shown[-1] == "temperature = 0.0"


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("/set temprature 1", "error: there is no option temprature; did you mean temperature?"),
        ("/set zzz 1", "error: there is no option zzz"),
        ("/set temp warm", "error: expected a number, not 'warm'"),
        ("/set top-k 1.5", "error: expected a whole number, not '1.5'"),
        ("/set temp 200", "error: --temperature must be between 0 and 100, not 200.0"),
        ("/set logit-bias 'a", "error: 'a: a quotation mark is not closed"),
        ("/set logit-bias a", "error: --logit-bias: expected a token id and a signed number, as 15043+1, not 'a'"),
        ("/temp 0.5", "error: there is no /temp; did you mean /set temp?"),
    ],
)
def test_a_wrong_set_changes_nothing(talk: Talk, typed: str, answer: str) -> None:
    _, out, err = talk(typed, "hello", options=("--quiet",))
    assert (out, err) == ("hi there\n", [answer])


def test_other_words_for_a_command(talk: Talk) -> None:
    assert talk("/?", options=("--quiet",))[2][0].startswith("/help ")
    for word in ("/quit", "/bye", "/q"):
        assert talk(word, "hello")[1] == ""


def test_a_message_of_several_lines(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    talk('"""hello', " hello", '"""', '"""/help"""', '""""""', f"/save {path}", '"""hello', "the end")
    messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["hello\n hello", "/help"]


def test_a_message_that_is_never_closed_ends_with_the_input(talk: Talk) -> None:
    assert talk('"""hello', "hello")[1] == "hi there\n"


def test_a_stop_text_ends_the_answer(talk: Talk) -> None:
    assert talk("hello", "/regen", options=("--quiet", "--stop", "xyz", "--stop", " th"))[1] == "hi\nhi\n"


def test_a_full_context_does_not_end_the_conversation(talk: Talk) -> None:
    code, out, err = talk(*["hello"] * 60, "/stats", options=("-c", "256"))
    assert (code, out) == (0, "hi there\n" * 60)
    (told,) = (line for line in err if line.startswith("(the conversation is longer"))
    assert "the context of 256 tokens" in told
    assert "the model was trained with 512" in told
    assert "--ctx-size" in told
    assert any(line.endswith("; 120 messages") for line in err)


@pytest.mark.parametrize("options", [("--overflow", "error"), ("--no-context-shift",)])
def test_the_conversation_ends_with_the_context_where_that_is_wanted(talk: Talk, options: tuple[str, ...]) -> None:
    _, out, err = talk(*["hello"] * 60, options=("-c", "256", *options))
    assert 0 < out.count("hi there\n") < 60
    assert any("the context holds 256" in line for line in err)


def test_a_message_of_megabytes_is_refused_before_it_is_tokenized(talk: Talk) -> None:
    started = time.process_time()
    code, out, err = talk("hello" * 600_000, "hello", options=("-c", "256"))
    assert (code, out) == (0, "hi there\n")
    assert any(line.startswith("error: the text has at least ") and "holds 256" in line for line in err)
    assert time.process_time() - started < 5


def test_an_answer_longer_than_the_context_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endless = Scripted({"[assistant]": " on", " on": " on"}, pieces=["[user]"], chat_template=TEMPLATE)
    path = str(endless.write(tmp_path / "model.gguf"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("hello\n"))
        assert exit_code(["chat", path, "--temp", "0", "-c", "256", "-n", "300"]) == 0
    out, err = capsys.readouterr()
    assert out.count("on") == 300
    assert err.count("(the conversation is longer than the context of 256 tokens") == 1


def test_save_and_load(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    _, _, err = talk("hello", f"/save {path}")
    assert err[-1] == f"saved to {path}"
    assert len(json.loads(path.read_text(encoding="utf-8"))["messages"]) == 2
    _, out, err = talk(f"/load {path}", "hello", "/stats")
    assert out == "hi there\n"
    assert f"2 messages from {path}" in err
    assert any(line.endswith("4 messages") for line in err)


def test_mistakes_do_not_end_the_conversation(talk: Talk, tmp_path: Path) -> None:
    mistakes = ("/sav", "/xyz", "/save", "/save ~nobody-here/x", f"/load {tmp_path / 'no'}", "word " * 600)
    code, out, err = talk(*mistakes, "hello")
    assert (code, out) == (0, "hi there\n")
    assert err[1:5] == [
        "error: there is no /sav; did you mean /save?",
        "error: there is no /xyz; /help lists them",
        "error: name a file",
        "error: ~nobody-here/x: there is no such home directory",
    ]
    assert "cannot be read" in err[5]
    assert "--ctx-size" in err[6]


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("/save /", "error: /: the conversation cannot be written: it is a directory"),
        ("/load /", "error: /: it is a directory, not a saved conversation"),
        ("/load /dev/zero", "error: /dev/zero: it is a device or a pipe, not a saved conversation"),
        ("/save /dev/null", "error: /dev/null: the conversation cannot be written: it is a device or a pipe"),
        ("/save FOLDER/none/x", "error: FOLDER/none/x: the conversation cannot be written: No such file or directory"),
        ("/load FOLDER/pipe", "error: FOLDER/pipe: it is a device or a pipe, not a saved conversation"),
        ("/save FOLDER/pipe", "error: FOLDER/pipe: the conversation cannot be written: it is a device or a pipe"),
        ("/load " + "x" * 300, "error: " + "x" * 300 + ": cannot be read: File name too long"),
        ("/save " + "x" * 300, "error: " + "x" * 300 + ": File name too long"),
        ("/save a\0b", "error: a\ufffdb: embedded null byte"),
        ("/load a\0b", "error: a\ufffdb: embedded null byte"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="devices of POSIX")
def test_files_that_cannot_hold_a_conversation(talk: Talk, tmp_path: Path, typed: str, answer: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    code, out, err = talk(typed.replace("FOLDER", str(tmp_path)), "hello", options=("--quiet",))
    assert (code, out, err) == (0, "hi there\n", [answer.replace("FOLDER", str(tmp_path))])


def test_why_an_answer_ended(talk: Talk) -> None:
    _, out, err = talk("hello", options=("-n", "1"))
    assert out == "hi\n"
    assert err[1] == "(stopped at the limit of new tokens: --n-predict, or /set n-predict N here)"


def test_ctrl_c_stops_the_answer_and_not_the_program(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(io.StringIO):
        """Somebody who presses Ctrl-C at the first word, once."""

        def write(self, text: str) -> int:
            if self.tell() == 0:
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    screen = Impatient()
    monkeypatch.setattr(sys, "stdout", screen)
    code, _, err = talk("hello", "hello")
    assert code == 0
    first, second = screen.getvalue().splitlines()
    assert "hi there".startswith(first)
    assert second == "hi there"
    assert any(line.startswith("prompt: ") for line in err)


# ---- typed lines


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PipeInput]:
    """A keyboard, with the history in a folder of its own."""
    monkeypatch.setattr(chat_module, "state_directory", lambda: tmp_path / "state")
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        yield keyboard


def test_typed_lines_are_edited_and_remembered(
    keys: PipeInput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys.send_text("helo\x1b[Dl\n" + "half a line\x03" + "again\n" + "\x04")
    assert list(chat_module._typed_lines()) == ["hello", "again"]
    assert capsys.readouterr().err == "(Ctrl-D or /exit leaves)\n"
    assert list(chat_module._history().load_history_strings()) == ["again", "hello"]
    assert (tmp_path / "state" / "chat_history").is_file()


def test_colours_that_are_pasted_are_no_reports_of_the_mouse(keys: PipeInput) -> None:
    keys.send_text("a\x1b[31mred\x1b[0m b\n" + "\x04")
    assert list(chat_module._typed_lines()) == ["ared b"]


def test_several_lines_are_typed_between_quotation_marks(keys: PipeInput) -> None:
    keys.send_text('"""one\ntwo\n"""\nthree\n\x04')
    assert list(chat_module._typed_lines()) == ['"""one\ntwo\n"""', "three"]


def test_the_word_exit_leaves_a_terminal(
    keys: PipeInput, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_module, "_is_terminal", lambda: True)
    keys.send_text("exit\nhello\n")
    assert exit_code(["chat", model, "--temp", "0", "--quiet", "-t", "1"]) == 0
    assert capsys.readouterr().out == ""


def test_without_a_folder_for_the_history(keys: PipeInput, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    keys.send_text("one\n\x04")
    assert list(chat_module._typed_lines()) == ["one"]


def test_a_conversation_in_a_terminal(
    keys: PipeInput, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    keys.send_text("hello\n/exit\n")
    assert exit_code(["chat", model, "--temp", "0", "--quiet", "-t", "1"]) == 0
    assert capsys.readouterr().out == "hi there\n"


def test_a_conversation_outlives_its_worker(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    worker = start_worker()
    host, _, port = worker.endpoint.rpartition(":")

    def lines() -> Iterator[str]:
        nonlocal worker
        yield "hello\n"
        worker.close()
        yield "hello\n"  # lost
        yield "/regen\n"  # cannot be loaded
        worker = Worker(WorkerOptions(host=host, port=int(port), n_threads=1))
        yield "/regen\n"
        yield "/stats\n"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_module, "_is_terminal", lambda: False)
        patch.setattr(sys, "stdin", lines())
        code = exit_code(["chat", model, "--temp", "0", "--rpc", worker.endpoint])
    worker.close()
    out, err = capsys.readouterr()
    assert (code, out) == (0, "hi there\n" * 2)
    said = [line for line in err.splitlines() if not line.startswith(("warning", "prompt: "))]
    assert "a worker was lost while it was in use" in said[1]
    assert said[2] == "the next message loads the model again, and /regen asks this one again"
    assert "cannot be reached" in said[3]
    assert said[4] == "the model is loaded again"
    assert said[5].endswith("4 messages")


def test_regen_after_a_loss_asks_nothing_older(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A message that was refused before is not what the loss left unanswered."""
    worker = start_worker()

    def lines() -> Iterator[str]:
        yield "hello\n"
        yield "hello" * 600 + "\n"  # does not fit
        worker.close()
        yield "/regen\n"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_module, "_is_terminal", lambda: False)
        patch.setattr(sys, "stdin", lines())
        code = exit_code(["chat", model, "--temp", "0", "--quiet", "--rpc", worker.endpoint])
    out, err = capsys.readouterr()
    assert (code, out) == (0, "hi there\n")
    assert "the context holds 512" in err
    assert err.splitlines()[-1] == "the next message loads the model again"
