"""llama.cpp's log, as it comes: in pieces, in odd encodings, and a lot of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from ggufmoe.native.log import NativeLog

DEBUG, INFO, WARN, ERROR, CONT = 1, 2, 3, 4, 5


class FakeBindings:
    """Takes the callback that llama.cpp would call."""

    def __init__(self) -> None:
        self.callbacks: list[Any] = []

    def llama_log_callback(self, function: Any) -> Any:
        return function

    def llama_log_set(self, callback: Any, _: Any) -> None:
        self.callbacks.append(callback)


@pytest.fixture
def log() -> NativeLog:
    return NativeLog()


@pytest.fixture
def say(log: NativeLog) -> Callable[[int, bytes], None]:
    bindings = FakeBindings()
    log.attach(bindings)
    return lambda level, text: bindings.callbacks[0](level, text, None)


def test_lines_are_put_together(log: NativeLog, say: Callable[[int, bytes], None]) -> None:
    say(INFO, b"load: one\nload: tw")
    say(CONT, b"o\n")
    say(INFO, b"....")
    say(CONT, b"\n")
    say(WARN, b"unfinished")
    assert [(line.level, line.text) for line in log.since(0)] == [
        (logging.INFO, "load: one"),
        (logging.INFO, "load: two"),
    ]


def test_lines_reach_logging_with_their_level(
    say: Callable[[int, bytes], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="ggufmoe.llama"):
        for level in (DEBUG, INFO, WARN, ERROR):
            say(level, b"\xff%s\n")
    assert [record.levelno for record in caplog.records] == [10, 20, 30, 40]
    assert caplog.records[0].getMessage() == "\ufffd%s"


def test_the_cause_is_the_last_error_that_tells_something(log: NativeLog, say: Callable[[int, bytes], None]) -> None:
    say(ERROR, b"before: old\n")
    mark = log.mark()
    assert log.cause_since(mark) == "it gave no reason"
    say(INFO, b"print_info: 12 layers\n")
    assert log.cause_since(mark) == "12 layers"
    say(ERROR, b"llama_model_load_from_file_impl: failed to load model\n")
    assert log.cause_since(mark) == "failed to load model"
    say(ERROR, b"llama_model_load: error loading model: missing tensor 'x: y'\n")
    say(ERROR, b"llama_model_load_from_file_impl: failed to load model\n")
    assert log.cause_since(mark) == "error loading model: missing tensor 'x: y'"
    say(ERROR, b"no function's name: here\n")
    assert log.cause_since(mark) == "no function's name: here"


def test_the_buffer_is_bounded(log: NativeLog, say: Callable[[int, bytes], None]) -> None:
    for i in range(5000):
        say(INFO, b"line %d\n" % i)
    say(INFO, b"x" * 100_000 + b"\n")
    lines = log.since(0)
    assert len(lines) == 2000
    assert lines[0].text == "line 3001"
    assert len(lines[-1].text) == 4096
