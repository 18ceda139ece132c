"""The verb ``serve``: a process that clients talk to, its end, and what it says when it cannot begin."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from ggufmoe import ContextOptions, Engine, ModelLoadError
from ggufmoe.cli.app import exit_code
from tests.remote.workers import wait_until
from tests.scripted import Scripted
from tests.server.running import TALKER

COMMAND = [sys.executable, "-m", "ggufmoe", "serve", "--port", "0", "-t", "1", "--alias", "tales"]


def test_a_process_serves_until_it_is_asked_to_end(story_path: Path) -> None:
    with subprocess.Popen([*COMMAND, str(story_path)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            first = process.stderr.readline()
            assert first.startswith("serving tales at http://127.0.0.1:")
            url = first.removeprefix("serving tales at ").partition(";")[0]
            assert f"; a chat is at {url.removesuffix('v1')}; " in first
            assert "the model is loaded" in process.stderr.readline()
            body = {"prompt": " once", "temperature": 0}
            answer = httpx.post(f"{url}/completions", json=body, timeout=100, trust_env=False).json()
            assert (answer["choices"][0]["text"], answer["model"]) == (" upon a time", "tales")
            refused = httpx.post(f"{url}/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
            assert refused.status_code == 400
            assert "has no chat template" in refused.json()["error"]["message"]
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


@contextmanager
def serving(path: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A process that serves ``path`` until it is killed, and a client of it."""
    with subprocess.Popen([*COMMAND, str(path), *flags], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = process.stderr.readline().removeprefix("serving tales at ").partition(";")[0]
            assert "the model is loaded" in process.stderr.readline()
            with httpx.Client(base_url=url, timeout=100, trust_env=False) as client:
                yield process, client
        finally:
            process.kill()


def test_a_conversation_goes_on_after_the_process_was_killed_in_mid_stream(
    write_model: Callable[[Scripted], Path], tmp_path: Path
) -> None:
    flags = ("--prompt-cache", str(tmp_path), "--parallel", "2", "--ctx-size", "0")
    path = write_model(replace(TALKER, n_ctx_train=16384))
    messages = [{"role": "user", "content": " hello" * 150}]
    body = {"messages": messages, "temperature": 0, "chat_template_kwargs": {"ending": " on"}}  # says " on" for ever
    with (
        serving(path, *flags) as (process, client),
        # a kept text of which the prompt is less than an eighth would not be read for it
        client.stream("POST", "/chat/completions", json={**body, "max_tokens": 1000, "stream": True}) as answer,
    ):
        assert any('" on' in line for line in answer.iter_lines())
        wait_until(lambda: bool(list(tmp_path.glob("*.prompt"))))
        process.kill()
    messages += [{"role": "assistant", "content": " on on"}, {"role": "user", "content": " hello"}]
    with serving(path, *flags) as (_, client):
        found = client.post("/chat/completions", json={**body, "max_tokens": 4}).json()
    # BOS, [user], 150 words, [assistant], " on" were the first prompt; " on" and a turn of four tokens follow
    assert found["usage"]["prompt_tokens"] == 159
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] >= 154
    assert found["timings"]["prompt_n"] <= 5


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
