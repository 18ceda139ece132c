"""``ggufmoe demo``: the story it tells, what it refuses to overwrite, and the conversation after it."""

from __future__ import annotations

import importlib
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ggufmoe.cli import demo
from ggufmoe.cli.app import exit_code
from ggufmoe.cli.console import make_console
from ggufmoe.cli.demo import _go_on, bars_for, program_as_typed
from ggufmoe.demo import APART, questions
from ggufmoe.errors import Cancelled
from ggufmoe.gguf.header import read_header


@pytest.fixture(autouse=True, scope="module")
def one_core() -> Iterator[None]:
    """Have the demo compute on one thread: on a busy machine two of them mostly wait for each other."""
    if sys.platform != "linux":
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return tmp_path


@pytest.fixture
def first_act(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo without its second act, which takes some seconds."""
    monkeypatch.setattr(demo, "_compare_routers", lambda *_: None)


def test_the_whole_story_and_the_commands_that_it_names(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["demo"]) == 0
    out, _ = capsys.readouterr()
    for question in questions():
        assert f"   {question.text}\n   {question.answer}\n   " in out
    assert re.search(rf"\b{len(questions())} of {len(questions())} are right", out)
    assert re.search(r"^   ▁?[▁▂▃▄▅▆▇█]+  math \d+%$", out, re.MULTILINE)
    assert "   ggufmoe chat ggufmoe-demo.gguf --temp 0\n" in out
    assert read_header(in_tmp_path / "ggufmoe-demo.gguf").get("general.name") == "ggufmoe demo"
    check_second_act(out, in_tmp_path / "ggufmoe-demo-router")
    check_commands(out)
    page = (in_tmp_path / "routers.html").read_text(encoding="utf-8")
    assert "Router of guessed.gguf: guessed from prompts (hidden)" in page
    assert "Router of fitted.gguf: fitted on texts" in page


def check_commands(out: str) -> None:
    """They are whole, and those that look at a file work."""
    lines = out.replace("\\\n", "").splitlines()  # a long command goes on in the next line
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("   ggufmoe ")]
    assert {arguments[0] for arguments in commands} == {"convert", "refit", "chat", "route", "inspect"}
    for arguments in commands:
        if arguments[0] in ("route", "inspect"):
            assert exit_code(arguments) == 0


def check_second_act(out: str, folder: Path) -> None:
    """The fitted router answers more, gives tokens to their own expert, and has half the loss on held-out texts."""
    asked = questions(APART)
    for question in asked:
        assert f"   {question.text}\n      guessed" in out
    rows = {row[0]: row[1:] for row in (re.findall(r"[\w.%]+(?: of \d+)?", line) for line in out.splitlines()) if row}
    right = {name: int(rows[name][0].split()[0]) for name in ("guessed", "fitted")}
    assert rows["fitted"][0].endswith(f" of {len(asked)}")
    assert right["fitted"] > right["guessed"]
    own = {name: int(rows[name][1].rstrip("%")) for name in right}
    assert own["fitted"] > own["guessed"] + 10
    losses = {name: [float(loss) for loss in rows[name][2:]] for name in right}
    assert sum(losses["fitted"]) < 0.5 * sum(losses["guessed"])
    assert read_header(folder / "guessed.gguf").get("ggufmoe.gate_mode") == "hidden"
    assert read_header(folder / "fitted.gguf").get("ggufmoe.gate_mode") == "fitted"


@pytest.mark.usefixtures("first_act")
def test_the_program_may_not_be_on_the_path(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert exit_code(["demo"]) == 0
    out = capsys.readouterr().out.replace("\\\n", "")  # a long command goes on in the next line
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert f"{shlex.quote(sys.executable)} -m ggufmoe chat ggufmoe-demo.gguf --temp 0" in lines


@pytest.mark.parametrize(
    ("typed", "found", "shown"),
    [
        ("HERE/.venv/bin/ggufmoe", None, ".venv/bin/ggufmoe"),
        ("HERE/.venv/bin/ggufmoe", "/usr/bin/ggufmoe", ".venv/bin/ggufmoe"),
        (".venv/bin/ggufmoe", None, ".venv/bin/ggufmoe"),
        ("/opt/my tools/ggufmoe", None, "'/opt/my tools/ggufmoe'"),
        ("/usr/bin/ggufmoe", "/usr/bin/ggufmoe", "ggufmoe"),
        ("HERE/ggufmoe/__main__.py", "/usr/bin/ggufmoe", "ggufmoe"),
        ("HERE/ggufmoe/__main__.py", None, f"{shlex.quote(sys.executable)} -m ggufmoe"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="paths of POSIX")
def test_commands_name_the_program_as_it_was_typed(
    typed: str, found: str | None, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: found)
    monkeypatch.setattr(sys, "argv", [typed.replace("HERE", str(tmp_path)), "demo"])
    assert program_as_typed() == shown


def test_commands_quote_paths_as_windows_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "sys", SimpleNamespace(platform="win32"))
    assert demo._quoted(Path("my models/a.gguf")) == '"my models/a.gguf"'
    assert demo._quoted(Path("a.gguf")) == "a.gguf"


def test_bars_are_characters_that_the_terminal_has() -> None:
    for encoding, shown in ("utf-8", "▁█"), ("cp437", "_#"), ("ascii", "_#"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
        bars = bars_for(make_console(stream))
        assert bars[0] + bars[-1] == shown
        assert len(set(bars)) == 8
        assert "?" not in bars


@pytest.mark.parametrize(
    ("quant", "code", "message"),
    [
        ("IQ2_XS", 2, "IQ2_XS needs an importance matrix, which the demo does not make"),
        ("nope", 2, "unknown file type"),
    ],
)
def test_a_type_that_it_cannot_make(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str], quant: str, code: int, message: str
) -> None:
    assert exit_code(["demo", "-q", quant]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert list(in_tmp_path.iterdir()) == []


def test_a_demo_that_was_stopped_leaves_nothing(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(source: str, output: Path, *_: object, **__: object) -> None:
        Path(f"{output}.partial").write_bytes(b"half")
        Path(f"{output}.partial.journal").write_bytes(b"")
        raise Cancelled("go on with --resume")

    monkeypatch.setattr(importlib.import_module("ggufmoe.convert"), "convert", stop)
    assert exit_code(["demo"]) == 130
    assert capsys.readouterr().err == "error: stopped; nothing is left behind\n"
    assert list(in_tmp_path.iterdir()) == []


@pytest.mark.usefixtures("first_act")
def test_an_earlier_demo_is_replaced_and_nothing_else(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["demo", "-o", "again.gguf"]) == 0
    assert exit_code(["demo", "-o", "again.gguf", "-q", "Q8_0"]) == 0
    (in_tmp_path / "mine.gguf").write_text("precious", encoding="utf-8")
    capsys.readouterr()
    assert exit_code(["demo", "-o", "mine.gguf"]) == 1
    message = capsys.readouterr().err
    assert message == "error: mine.gguf exists and is not an earlier demo; choose another name with -o\n"
    assert (in_tmp_path / "mine.gguf").read_text(encoding="utf-8") == "precious"
    (in_tmp_path / "new-router").mkdir()
    assert exit_code(["demo", "-o", "new.gguf"]) == 1
    message = capsys.readouterr().err
    assert message == "error: new-router exists and is not of an earlier demo; choose another name with -o\n"
    assert not (in_tmp_path / "new.gguf").exists()


@pytest.mark.usefixtures("first_act")
def test_a_conversation_afterwards(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 12 + 30?\n"))
    assert exit_code(["demo", "--chat"]) == 0
    assert "so 42\n" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 60, 160])
def test_commands_and_sentences_fit_the_terminal(
    columns: int, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen()
    console = make_console(screen)
    _go_on(console, Path("a file.gguf"), Path("a folder"))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    whole = screen.getvalue().replace("\\\n", " ")
    commands = [shlex.split(line) for line in whole.splitlines() if line.startswith("   ggufmoe ")]
    assert ["ggufmoe", "route", "a file.gguf", "--chat", "What is 12 + 30?", "--generate", "24"] in commands
    assert len(commands) == 5
    assert "opposites, colors, sizes, capitals, and numbers to 100" in " ".join(whole.split())
    assert ("\\\n" in screen.getvalue()) == (columns < 160)
