"""``ggufmoe run``: what is on stdout, what on stderr, and the exit code."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ggufmoe import ContextOptions, OffloadOptions
from ggufmoe.cli import terminal
from ggufmoe.cli.answer import write_answer
from ggufmoe.cli.app import exit_code
from ggufmoe.cli.jobs import interruptible
from ggufmoe.cli.terminal import load_engine, waiting_shown
from ggufmoe.errors import EngineError
from ggufmoe.folders import state_directory
from ggufmoe.runtime.events import Event, Finished, Timing, Token
from ggufmoe.runtime.vocabulary import LoadedVocabulary
from ggufmoe.work import CancelFlag
from tests.interrupts import interrupting
from tests.scripted import Scripted

GREEDY = ("--temp", "0", "-t", "1")
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
MODEL = Scripted(
    {" once": " upon", " upon": " a", "[assistant]": " héllo", " on": " on"},
    pieces=["[user]", "[system]"],
    chat_template=TEMPLATE,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(MODEL.write(tmp_path_factory.mktemp("run") / "model.gguf"))


@pytest.fixture
def run(model: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*args: str) -> tuple[int, str, str]:
        code = exit_code(["run", model, *args, *GREEDY])
        return code, *capsys.readouterr()

    return call


def test_an_answer_and_its_speeds(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("hi")
    assert (code, out) == (0, "héllo\n")
    assert err.startswith("prompt: 5 tokens, ")
    assert "answer: 1 token, " in err
    assert err.count("\n") == 1


def test_quiet(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("hi", "--quiet") == (0, "héllo\n", "")


def test_raw_text_is_continued(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run(" once", "--raw")
    assert (code, out) == (0, " once upon a\n")


def test_the_number_of_new_tokens(run: Callable[..., tuple[int, str, str]]) -> None:
    _, out, err = run(" on", "--raw", "-n", "3")
    assert out == " on" * 4 + "\n"
    assert err.startswith("(stopped at the limit of new tokens: --n-predict)\nprompt: ")


def test_a_full_context_is_told(run: Callable[..., tuple[int, str, str]]) -> None:
    _, _, err = run(" on", "--raw", "-n", "-1", "-c", "256")
    assert err.startswith("(the context is full: --ctx-size gives more room)\nprompt: ")


@pytest.mark.parametrize(("text", "prompt"), [(" once\n", " once"), ("two\nlines\r\n", "two\nlines")])
def test_a_prompt_from_stdin(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, text: str, prompt: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code, out, _ = run("-", "--json", "--raw")
    assert (code, json.loads(out)["prompt"]) == (0, prompt)


def test_a_pipe_without_a_prompt_is_the_prompt(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(" once\n"))
    code, out, _ = run("--json", "--raw")
    assert (code, json.loads(out)["prompt"]) == (0, " once")


def test_without_a_prompt_and_a_pipe(run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Screen())
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("error: there is no prompt")


def test_a_stop_text_ends_the_answer(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("hi", "--quiet", "--stop", "no", "--stop", "ll")[1] == "hé\n"
    assert run(" once", "--raw", "--quiet", "--stop", " a")[1] == " once upon\n"
    assert run("hi", "--stop", "")[0] == 2


def test_a_stop_text_may_hold_a_new_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Scripted({" once": "<0x0A>", "<0x0A>": " upon"}).write(tmp_path / "m.gguf")
    assert exit_code(["run", str(model), " once", "--raw", "--quiet", "--stop", r"\n", *GREEDY]) == 0
    assert capsys.readouterr().out == " once\n"


HOSTILE = "\x1b]52;c;cm0gLXJmIH4K\x07a\rb\x1bc\x9b2J\u202ec"


def test_a_terminal_never_gets_the_models_escape_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(Scripted({" once": HOSTILE}).write(tmp_path / "m.gguf"))
    arguments = ["run", path, " once", "--raw", "--quiet", *GREEDY]
    assert exit_code(arguments) == 0
    assert capsys.readouterr().out == f" once{HOSTILE}\n"  # a pipe gets what the model wrote
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    assert exit_code(arguments) == 0
    assert screen.getvalue() == " once\ufffd]52;c;cm0gLXJmIH4K\ufffdab\ufffdc\ufffd2J\ufffdc\n"


def test_a_terminal_gets_the_answer_wrapped_at_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = Scripted({" once": " upon", " upon": " a", " a": " time"}).write(tmp_path / "m.gguf")
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "10")
    assert exit_code(["run", str(path), "once", "--raw", "--quiet", "-n", "0", *GREEDY]) == 0
    assert exit_code(["run", str(path), " once", "--raw", "--quiet", *GREEDY]) == 0
    assert screen.getvalue() == "once\n once upon\na time\n"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_on_stdin_is_no_part_of_the_prompt(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, mark: bytes
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(mark + b" once\n"), encoding="utf-8"))
    code, out, _ = run("-", "--json", "--raw")
    assert (code, json.loads(out)["prompt"]) == (0, " once")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_prompt_that_powershell_saved(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    stream = io.BufferedReader(io.BytesIO("\ufeff h\u00e9\r\n".encode(encoding)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream, encoding="utf-8"))
    assert json.loads(run("-", "-n", "1", "--json")[1])["prompt"] == " h\u00e9"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a device of POSIX")
@pytest.mark.parametrize("verb", ["run", "chat", "route"])
def test_a_stdin_without_end_is_no_prompt(model: str, verb: str) -> None:
    options = ["--chat-template", "chatml"] if verb == "chat" else ["-"] if verb == "route" else []
    command = [sys.executable, "-m", "ggufmoe", verb, model, *options]
    with Path("/dev/zero").open("rb") as zeros:
        done = subprocess.run(command, stdin=zeros, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "stdin goes on after 64 Mi characters" in done.stderr


def test_nothing_to_answer(run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    for prompt in ("", " ", "-"):
        assert run(prompt) == (1, "", "error: the prompt is empty: there is nothing to answer\n")


def test_json(run: Callable[..., tuple[int, str, str]], model: str) -> None:
    code, out, _ = run("hi", "--json", "--seed", "3")
    assert code == 0
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result["prompt_s"] > 0
    assert {key: result[key] for key in ("model", "prompt", "text", "finish_reason", "seed")} == {
        "model": model,
        "prompt": "hi",
        "text": "héllo",
        "finish_reason": "stop",
        "seed": 3,
    }
    assert (result["prompt_tokens"], result["cached_tokens"], result["generated_tokens"]) == (5, 0, 1)


def test_a_system_prompt_and_a_template_from_a_file(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages[0].content }}")
    assert run("hi", "-sys", " once", "--chat-template", str(file))[1] == "upon a\n"


def test_without_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = replace(MODEL, chat_template=None).write(tmp_path / "m.gguf")
    assert exit_code(["run", str(path), "hi"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {path}: the model has no chat template")
    assert "--chat-template NAME|FILE" in err
    assert "--raw" in err
    assert exit_code(["run", str(path), " once", "--raw", "--quiet", *GREEDY]) == 0
    assert capsys.readouterr().out == " once upon a\n"


def test_raw_and_a_template_contradict_each_other(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("hi", "--raw", "--chat-template", "chatml")
    assert (code, out) == (2, "")
    assert "--raw takes the text as it is" in err


def test_a_prompt_that_cannot_be_answered_is_not_printed_either(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("word " * 600, "--raw")
    assert (code, out) == (1, "")
    assert "--ctx-size" in err


@pytest.mark.parametrize("road", [(), ("--raw",)])
def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenized(
    run: Callable[..., tuple[int, str, str]], road: tuple[str, ...]
) -> None:
    started = time.process_time()
    code, out, err = run("word once upon a time " * 200_000, *road)
    assert (code, out) == (1, "")
    assert err.startswith("error: the text has at least ")
    assert "tokens and the context holds 512: shorten it, or ask for more with --ctx-size" in err
    assert time.process_time() - started < 3


@pytest.mark.parametrize("policy", ["shift", "truncate-middle"])
@pytest.mark.parametrize("road", [(), ("--raw", "--json")])
def test_a_long_prompt_is_still_cut_where_that_is_wanted(
    run: Callable[..., tuple[int, str, str]], policy: str, road: tuple[str, ...]
) -> None:
    code, out, _ = run("word once" * 20_000, "--overflow", policy, "-n", "1", *road)
    assert code == 0
    assert " upon" in out if road else out == "h\u00e9llo\n"


def test_ctrl_c_while_a_long_prompt_is_tokenized(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedVocabulary, "_tokens_of", interrupting(LoadedVocabulary._tokens_of))
    code, out, err = run("<s>" * 1_000_000, "--raw", "--overflow", "shift")
    assert (code, out, err) == (130, "", "error: tokenizing was stopped\n")


def test_a_context_beyond_what_the_model_was_trained_for_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windowed = replace(MODEL, metadata={"ggufmoe.sliding_window": np.uint32(300)}).write(tmp_path / "windowed.gguf")
    for verb in ("run", "plan"):
        arguments = ["hi", "--quiet", *GREEDY] if verb == "run" else []
        assert exit_code([verb, str(windowed), *arguments]) == 0
        out, err = capsys.readouterr()
        assert (err if verb == "run" else out).count("attends to the last 300 tokens only") == 1
        assert exit_code([verb, str(windowed), *arguments, "-c", "300"]) == 0
        assert "attends" not in "".join(capsys.readouterr())


def test_a_prompt_that_is_not_utf_8(model: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ggufmoe", "run", model, "-", "--raw", "--json", *GREEDY],
        input=b"caf\xff once",
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert result.returncode == 0
    assert json.loads(result.stdout)["prompt"] == "caf\ufffd once"


@pytest.mark.parametrize("args", [("nothing.gguf", "hi"), (str(Path(__file__)), "hi")])
def test_files_that_are_no_model(args: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["run", *args]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {args[0]}: ")
    assert err.count("\n") == 1


def test_without_the_engine(model: str) -> None:
    code = (
        f"import sys; sys.modules['llama_cpp'] = None; from ggufmoe.cli.app import main; main(['run', {model!r}, 'x'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: llama-cpp-python is not installed; install it with ")
    assert result.stderr.count("\n") == 1


def test_ctrl_c_stops_the_answer(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(io.StringIO):
        """Somebody who presses Ctrl-C at the fifth piece."""

        def write(self, text: str) -> int:
            if self.tell() == len(" on" * 5):
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    screen = Impatient()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", screen)
        code = exit_code(["run", model, " on", "--raw", "-n", "-1", "-c", "512", *GREEDY])
    assert code == 130
    assert len(screen.getvalue()) < len(" on" * 512)
    assert screen.getvalue().endswith("on\n")
    assert "error: stopped\n" in capsys.readouterr().err


# ---- Ctrl-C

_END = Finished("", "cancelled", Timing(1, 0, 0.0, 0, 0, 0.0), 0)


def test_events_pass_through() -> None:
    assert list(interruptible(lambda cancel: iter([Token("a", 1), _END]))) == [Token("a", 1), _END]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_how_far_the_loading_is(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "24")
    load_engine(Path(model), ContextOptions(n_threads=1), OffloadOptions()).close()
    shown = screen.getvalue().split("\r")
    assert shown[0] == ""
    assert shown[1] == "loading model.gguf"
    assert "loading model.gguf   0%" in shown
    assert shown[-2:] == [" " * len(shown[-3]), ""]


def test_a_terminal_shows_that_a_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, read, closed = Screen(), threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(terminal, "_UNSEEN_S", 0.05)

    def events() -> Iterator[Event]:
        try:
            assert read.wait(10)
            while True:
                yield Token("a", 1)
        finally:
            closed.set()

    shown = waiting_shown(events())
    threading.Timer(0.5, read.set).start()
    assert next(shown) == Token("a", 1)
    assert screen.getvalue().startswith("\rreading the prompt, 0 s\r  ")
    assert screen.getvalue().endswith(" \r")
    assert next(shown) == Token("a", 1)
    shown.close()  # type: ignore[attr-defined]
    assert closed.is_set()
    list(waiting_shown(iter([_END])))
    assert screen.getvalue().count("reading") == 1


def test_ctrl_c_cancels_and_a_second_one_interrupts() -> None:
    cancelled = threading.Event()

    def start(cancel: CancelFlag) -> Iterator[Event]:
        yield Token("a", 1)
        while not cancel.is_set():
            pass
        cancelled.set()
        yield _END

    events = interruptible(start)
    next(events)
    signal.raise_signal(signal.SIGINT)
    assert next(events) == _END
    assert cancelled.is_set()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    events.close()  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_stands_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def events() -> Iterator[Event]:
        yield Token("half an ans", 1)
        raise EngineError("lost")

    with pytest.raises(EngineError):
        write_answer(events())
    assert capsys.readouterr().out == "half an ans\n"


def test_leaving_early_closes_the_events() -> None:
    closed = threading.Event()

    def start(_: CancelFlag) -> Iterator[Event]:
        try:
            while True:
                yield Token("a", 1)
        finally:
            closed.set()

    events = interruptible(start)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert closed.is_set()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", "XDG_STATE_HOME", "ggufmoe"),
        ("linux", None, ".local/state/ggufmoe"),
        ("darwin", None, "Library/Application Support/ggufmoe"),
        ("win32", "LOCALAPPDATA", "ggufmoe"),
        ("win32", None, "AppData/Local/ggufmoe"),
    ],
)
def test_the_state_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, variable: str | None, expected: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    assert state_directory() == tmp_path / expected
