"""The verb ``serve``: a process that clients talk to, its end, and what it says when it cannot begin."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from ggufmoe import ContextOptions, Engine, ModelLoadError
from ggufmoe.cli.app import exit_code


def test_a_process_serves_until_it_is_asked_to_end(story_path: Path) -> None:
    command = [sys.executable, "-m", "ggufmoe", "serve", str(story_path), "--port", "0", "-t", "1", "--alias", "tales"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            first = process.stderr.readline()
            assert first.startswith("serving tales at http://127.0.0.1:")
            url = first.removeprefix("serving tales at ").partition(";")[0]
            assert f"; a chat is at {url.removesuffix('v1')}; " in first
            assert "the model is loaded" in process.stderr.readline()
            body = {"prompt": " once", "temperature": 0}
            answer = httpx.post(f"{url}/completions", json=body, timeout=20, trust_env=False).json()
            assert (answer["choices"][0]["text"], answer["model"]) == (" upon a time", "tales")
            refused = httpx.post(f"{url}/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
            assert refused.status_code == 400
            assert "has no chat template" in refused.json()["error"]["message"]
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_what_is_missing_is_named(
    story_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    absent = ("starlette", "uvicorn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    assert exit_code(["serve", str(story_path)]) == 1
    error = capsys.readouterr().err
    assert "starlette and uvicorn must be installed" in error
    assert 'pip install "ggufmoe[server]"' in error


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--host", "0.0.0.0"], 2, "other machines can reach 0.0.0.0"),
        (["--port", "70000"], 2, "--port must be between 0 and 65535"),
        (["--api-key", "a", "--no-api-key"], 2, "contradicts"),
        (["--api-key-file", "no-such-file"], 1, "cannot be read"),
        (["--chat-template", "no-such-template", "--port", "0"], 2, "neither a template's name"),
    ],
)
def test_command_lines_that_are_refused(
    story_path: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = ["serve", str(story_path), *arguments]
    assert exit_code(given) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "n_parallel"), [([], 0), (["--parallel", "1"], 1), (["-np", "9"], 9)])
def test_several_answers_at_once_unless_asked_otherwise(
    story_path: Path, arguments: list[str], n_parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ContextOptions] = []

    def load(model: Path, context: ContextOptions, *given: object, **named: object) -> Engine:
        asked.append(context)
        raise ModelLoadError("no model here")

    monkeypatch.setattr("ggufmoe.cli.serve.Engine", load)
    assert exit_code(["serve", str(story_path), "--port", "0", *arguments]) == 1
    assert [context.n_parallel for context in asked] == [n_parallel]
