"""How a child process ended, in words; on Windows too, which gives numbers where other systems give signals."""

from __future__ import annotations

import os
import threading
from collections import deque
from types import SimpleNamespace

import pytest

from ggufmoe.remote import process
from ggufmoe.remote.process import ChildProcess, exit_words, leave_with_parent


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-9, "signal 9"),
        (0xC0000005, "exit code 0xc0000005 (access violation)"),
        (0xC0000409, "exit code 0xc0000409 (abort)"),
        (0xE06D7363, "exit code 0xe06d7363"),
    ],
)
def test_the_words_for_an_end(code: int, words: str) -> None:
    assert exit_words(code) == words


def ended(code: int | None, *, is_killed: bool = False) -> ChildProcess:
    """A child whose last line was not yet the cause of its end."""
    child = object.__new__(ChildProcess)
    child.__dict__.update(_process=SimpleNamespace(returncode=code), _lines=deque(["loading"]), _is_killed=is_killed)
    return child


@pytest.mark.parametrize(
    ("system", "code", "is_killed", "said"),
    [
        ("linux", -15, False, "signal 15"),
        ("linux", -9, False, "signal 9"),
        ("linux", -11, False, "loading (signal 11)"),
        ("linux", 1, False, "loading (exit code 1)"),
        ("win32", 1, True, "exit code 1"),
        ("win32", 1, False, "loading (exit code 1)"),
        ("win32", 0, False, "loading (exit code 0)"),
        ("win32", 0xC0000005, False, "loading (exit code 0xc0000005 (access violation))"),
        ("linux", None, True, "still there"),
    ],
)
def test_the_last_line_of_a_killed_child_is_not_the_cause(
    system: str, code: int | None, is_killed: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "sys", SimpleNamespace(platform=system))
    assert ended(code, is_killed=is_killed).how_it_ended() == said


def test_windows_needs_no_watch_over_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    monkeypatch.setattr(process, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.delattr(os, "getppid")
    leave_with_parent()
    assert threading.active_count() == before
