"""A child process with a second Python, for native code that may abort or hang: its command, its pipes and its end.

Owns the command that starts it (in a frozen app too), what is sent and read, and the promise that it ends with its
parent. What the child does is one of the tasks of ``tasks``; the messages are ``wire``'s.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.spawn
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import IO, Any, Literal

from ggufmoe.errors import EngineError
from ggufmoe.native.wording import abort_message
from ggufmoe.remote.wire import encode_message, read_messages

TaskName = Literal["engine", "worker"]

CHILD_FLAG = "--ggufmoe-child"
"""First argument of a frozen app that is started as a child; the second one names the task."""
_CODE = (
    "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); from ggufmoe.remote.tasks import run_task; "
    "run_task(sys.argv[2])"
)
_ENVIRONMENT = {"GGML_NO_BACKTRACE": "1"}
"""Without it ggml starts a debugger before it ends its process, which takes seconds."""
_MAX_LINES = 100
_MAX_LINE_CHARS = 2000
_JOIN_S = 2.0
_KILLED_S = 10.0
"""A killed process that waits for a disk or a network drive is still there after so long, and is left."""
_logger = logging.getLogger("ggufmoe.process")


class FrozenApp:
    """Whether this process, if it is a frozen app, has called ``freeze_support``."""

    is_prepared = False


class ChildProcess:
    """A started child: messages to and from it, and what it wrote to stderr. Ends with this process, or by ``end``."""

    def __init__(self, task: TaskName) -> None:
        flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # Windows would open a console beside a desktop app
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            _command(task), stdin=pipe, stdout=pipe, stderr=pipe, env=os.environ | _ENVIRONMENT, creationflags=flags
        )
        self._is_read = self._is_killed = False
        self._parent = os.getpid()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lines: deque[str] = deque(maxlen=_MAX_LINES)
        self._threads = [
            threading.Thread(target=work, name=f"ggufmoe-child-{self.pid}", daemon=True)
            for work in (self._listen, self._write)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def is_ours(self) -> bool:
        """False in a process that was forked afterwards: it has no threads here, and the child is its parent's."""
        return os.getpid() == self._parent

    def send(self, message: object) -> None:
        """Send a message without waiting; lost if the child has ended. Finalizers may call this."""
        if not self.is_ours:
            return
        self._outbox.put(encode_message(message))

    def messages(self) -> Iterator[Any]:
        """The messages of the child, until it ends."""
        assert self._process.stdout is not None
        self._is_read = True
        with self._process.stdout as stdout:
            yield from read_messages(stdout)

    def wait(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` for the child's end; whether it has ended."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self, grace_s: float = 0.0) -> None:
        """Close the child's stdin, which tells it to leave, and kill it after ``grace_s``. May be called again."""
        if not self.is_ours:
            return
        self._outbox.put(None)
        if not self.wait(grace_s):
            self._is_killed = True
            self._process.kill()
        self.wait(_KILLED_S)
        for thread in self._threads:
            if thread is not threading.current_thread():  # a finalizer may run in any of them
                thread.join(_JOIN_S)
        if not self._is_read and self._process.stdout is not None:
            self._process.stdout.close()

    def abort_message(self) -> str:
        """The message of the failed assertion with which native code ended the child; empty if there was none."""
        return next(filter(None, map(abort_message, self._lines)), "")

    def how_it_ended(self) -> str:
        """Exit code or signal of a child that has ended, with the line that tells why, if there is one."""
        code = self._process.returncode
        was_killed = self._is_killed or (sys.platform != "win32" and code in (-signal.SIGTERM, -signal.SIGKILL))
        # the last line of one that was killed is not the cause
        said = self.abort_message() or ("" if was_killed or not self._lines else self._lines[-1])
        how = "still there" if code is None else exit_words(code)
        return f"{said} ({how})" if said else how

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for raw in stderr:
                line = raw.decode("utf-8", "replace").strip()[:_MAX_LINE_CHARS]
                if line:
                    self._lines.append(line)
                    _logger.debug("%s", line)

    def _write(self) -> None:
        assert self._process.stdin is not None
        # closing a pipe whose reader is gone fails like writing to it
        with contextlib.suppress(OSError), self._process.stdin as stdin:
            while (data := self._outbox.get()) is not None:
                stdin.write(data)
                stdin.flush()


def exit_words(code: int) -> str:
    """``exit code 1``, ``signal 9``; for a crash on Windows ``exit code 0xc0000005 (access violation)``."""
    if code < 0:
        return f"signal {-code}"
    if code <= _LARGEST_CHOSEN_CODE:
        return f"exit code {code}"
    known = _NT_STATUS.get(code)
    return f"exit code {code:#x} ({known})" if known else f"exit code {code:#x}"


_LARGEST_CHOSEN_CODE = 255
_NT_STATUS = {
    0xC0000005: "access violation",
    0xC000001D: "illegal instruction",
    0xC00000FD: "stack overflow",
    0xC0000135: "a DLL is missing",
    0xC000013A: "Ctrl-C",
    0xC0000409: "abort",
}
"""With these numbers Windows ends a process that crashes, where other systems give a signal."""


def _command(task: TaskName) -> list[str]:
    if getattr(sys, "frozen", False):
        if not FrozenApp.is_prepared:
            raise EngineError(
                "a frozen app that uses workers must call ggufmoe.remote.freeze_support() first in its main script, "
                "because it is started again as the process that computes"
            )
        return [sys.executable, CHILD_FLAG, task]
    # a program that embeds Python names it with multiprocessing.set_executable
    executable = os.fsdecode(multiprocessing.spawn.get_executable() or sys.executable)
    return [executable, "-c", _CODE, os.pathsep.join(sys.path), task]


# ---- called in the child


def child_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The pipes from and to the parent. From now on, what native code prints goes to stderr."""
    incoming = os.fdopen(os.dup(0), "rb")
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def close() -> None:
        # a process that the child has forked must not hold the parent's pipes open
        for pipe in (incoming, outgoing):
            with contextlib.suppress(OSError, ValueError):
                os.close(pipe.fileno())

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=close)
    return incoming, outgoing


def leave_with_parent() -> None:
    """From now on leave at once when the parent has ended, whatever native code is doing.

    The pipe from the parent tells as well, and on Windows alone, but processes that the parent has forked may hold that
    open.
    """
    if sys.platform == "win32":  # its processes do not fork, and keep the number of a parent that has ended
        return
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=follow, name="ggufmoe-parent", daemon=True).start()
