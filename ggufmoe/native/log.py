"""llama.cpp's log: kept in a bounded buffer and passed to ``logging``, never printed.

llama.cpp has one log for the whole process, so there is one buffer too; it exists from the first model that is loaded.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ggufmoe.native import library as native
from ggufmoe.native.wording import is_vague, without_function

_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUED = 5
_MAX_LINES = 2000
_MAX_LINE_CHARS = 4096


@dataclass(frozen=True)
class LogLine:
    """One line of llama.cpp's log, with its number since the process began and a level of ``logging``."""

    number: int
    level: int
    text: str


class NativeLog:
    """Collects llama.cpp's log line by line; llama.cpp calls it from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: deque[LogLine] = deque(maxlen=_MAX_LINES)
        self._n_lines = 0
        self._level = logging.INFO
        self._unfinished = ""
        self._collected: list[tuple[re.Pattern[str], list[str]]] = []
        self._logger = logging.getLogger("ggufmoe.llama")
        # without a handler anywhere, logging would print warnings on stderr
        self._logger.addHandler(logging.NullHandler())

    def attach(self, api: Any) -> None:
        """Receive llama.cpp's log from now on, until the process ends; ``api`` is the module of its bindings."""
        self._callback = api.llama_log_callback(self._receive)
        api.llama_log_set(self._callback, None)
        # after the interpreter's end a Python callback would crash the process; the C function `abs` takes any level
        quiet = api.llama_log_callback(native.function_address(native.c_library().abs))
        atexit.register(api.llama_log_set, quiet, None)

    def mark(self) -> int:
        """The current position in the log, for ``since`` and ``cause_since``."""
        return self._n_lines

    def since(self, mark: int) -> list[LogLine]:
        """The lines after ``mark`` that the buffer still holds."""
        with self._lock:
            return [line for line in self._lines if line.number >= mark]

    @contextmanager
    def collecting(self, pattern: re.Pattern[str]) -> Iterator[list[str]]:
        """Collect the texts of all lines that match ``pattern`` while the block runs; the list grows meanwhile."""
        found: list[str] = []
        entry = (pattern, found)
        with self._lock:
            self._collected.append(entry)
        try:
            yield found
        finally:
            with self._lock:
                self._collected = [other for other in self._collected if other is not entry]

    def cause_since(self, mark: int) -> str:
        """The most telling line after ``mark``: the last error that names a cause, without the C++ function's name."""
        lines = self.since(mark)
        errors = [line.text for line in lines if line.level >= logging.ERROR]
        telling = [text for text in errors if not is_vague(text)]
        for texts in (telling, errors, [line.text for line in lines]):
            if texts:
                return without_function(texts[-1])
        return "it gave no reason"

    def _receive(self, level: int, text: bytes | None, _user_data: Any) -> None:
        with self._lock:
            if level != _CONTINUED:
                self._level = _LEVELS.get(level, logging.INFO)
            *whole, rest = (self._unfinished + (text or b"").decode("utf-8", "replace")).split("\n")
            self._unfinished = rest[-_MAX_LINE_CHARS:]
            lines = [self._add(line) for line in whole if line.strip(" .")]
        for line in lines:
            self._logger.log(line.level, "%s", line.text)

    def _add(self, text: str) -> LogLine:
        line = LogLine(self._n_lines, self._level, text.strip()[:_MAX_LINE_CHARS])
        self._n_lines += 1
        self._lines.append(line)
        for pattern, found in self._collected:
            if pattern.search(line.text):
                found.append(line.text)
        return line


def no_wait_callback(api: Any) -> tuple[Any, ctypes.Array[ctypes.c_char]]:
    """An abort callback that never waits for Python's interpreter lock, and the flag that it reads.

    The callback is C's ``strlen`` on the flag, a buffer of two bytes: as soon as the first byte is not zero, it returns
    non-zero and llama.cpp stops. llama.cpp calls it for every node of the graph, too often for a Python function.
    """
    flag = ctypes.create_string_buffer(2)
    return api.ggml_abort_callback(native.function_address(native.c_library().strlen)), flag
