"""What is the environment's doing is never called a defect of ggufmoe: no home, no memory, no threads, odd files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ggufmoe.cli import app, terminal
from ggufmoe.cli.chat import _history
from ggufmoe.cli.route import _read_prompts
from ggufmoe.errors import InputError, OptionError, OutputError
from ggufmoe.evaluation import chunks
from ggufmoe.files import partial_path
from ggufmoe.folders import state_directory
from ggufmoe.runtime.chat import _read_conversation
from tests.scripted import Scripted


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "LLAMA_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_the_history_of_a_chat_is_not_kept() -> None:
    assert state_directory() is None
    assert type(_history()).__name__ == "InMemoryHistory"


@pytest.mark.usefixtures("homeless")
def test_without_a_home_a_worker_asks_for_the_folder_of_its_cache() -> None:
    with pytest.raises(OptionError, match="LLAMA_CACHE"):
        terminal.rpc_cache_directory()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "error: there is not enough memory for this (reported by the operating system)\n"),
        (RuntimeError("can't start new thread"), "error: no further thread can be started; see 'ulimit -u'"),
        (RuntimeError("something else"), "error: RuntimeError: something else (a defect of ggufmoe;"),
    ],
)
def test_memory_and_threads_that_are_missing_are_the_systems_answer(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(app, "root_command", fail)
    assert app.exit_code(["doctor"]) == 1
    assert capsys.readouterr().err.startswith(said)


def test_a_path_without_a_name_is_a_directory() -> None:
    with pytest.raises(OutputError, match="/ is a directory"):
        partial_path(Path("/"))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a system without devices as files")
def test_a_file_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_MAX_TEXT_BYTES", 1000)
    zero = Path("/dev/zero")
    with pytest.raises(InputError, match="a device or a pipe, not a saved conversation"):
        _read_conversation(zero)
    with pytest.raises(InputError, match="of text; take a part of it"):
        chunks.read_text(None, zero)
    with pytest.raises(InputError, match="of prompts; take a part of them"):
        _read_prompts(zero)


@pytest.mark.skipif(sys.platform == "win32", reason="other paths")
def test_a_chat_goes_on_after_paths_that_cannot_be_used(tmp_path: Path) -> None:
    model = Scripted({"a": "b"}).write(tmp_path / "m.gguf")
    lines = "/save /\n/load /dev/zero\n/load /\n/exit\n"
    ended = subprocess.run(
        [sys.executable, "-m", "ggufmoe", "chat", str(model), "--chat-template", "chatml"],
        input=lines,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path)},
    )
    assert ended.returncode == 0
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert [error.partition(": ")[2].partition(" ")[0] for error in errors] == ["/:", "/dev/zero:", "/:"]
    assert "defect" not in ended.stderr
