"""A second Python of ours, for native code that may end or hang its process: started, listened to, ended.

Owns the command that starts it (in a frozen app too), its three pipes and the promise that it ends with its parent.
What it does there is one of the tasks of ``run_task``. Parent and child speak in pickled messages, over pipes that
nobody else can reach.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.spawn
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal

from ggufmoe.errors import EngineError

Task = Literal["engine", "worker"]

_FLAG = "--ggufmoe-child"
_CODE = (
    "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); from ggufmoe.remote.process import run_task; "
    "run_task(sys.argv[2])"
)
_ENVIRONMENT = {"GGML_NO_BACKTRACE": "1"}
"""Without it ggml starts a debugger before it ends its process, which takes seconds."""
_MAX_LINES = 100
_MAX_LINE_CHARS = 2000
_NATIVE_ABORT = re.compile(r"\.(?:c|cc|cpp|cu|h|hpp|m|mm):\d+: (.+)$")
_GRACE_S = 2.0
_KILLED_S = 10.0
"""A killed process that waits for a disk or a network drive is still there after so long, and is left."""
_logger = logging.getLogger("ggufmoe.process")


class _Frozen:
    """Whether this process, being a frozen app, has said that it knows how to start as a child."""

    is_prepared = False


def freeze_support() -> None:
    """Call this first in the main script of a frozen app (PyInstaller and the like) that uses workers.

    Such an app is its own Python: started as a child by ggufmoe, this does the child's task and leaves the process. In
    any other process it does nothing.
    """
    _Frozen.is_prepared = True
    if getattr(sys, "frozen", False) and sys.argv[1:2] == [_FLAG]:
        run_task(sys.argv[2])
        sys.exit(0)


def run_task(task: str) -> None:
    """In the child: what it was started for; returns when it is done."""
    if task == "engine":
        from ggufmoe.remote.host import host_engine

        host_engine(*child_pipes())
    elif task == "worker":
        from ggufmoe.remote.worker import serve_here

        serve_here(*child_pipes())
    else:
        raise EngineError(f"a process of ggufmoe was started for {task!r}, which is no task")


def child_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """In the child: where messages come from and go to. What native code prints goes to stderr from now on."""
    incoming = os.fdopen(os.dup(0), "rb")
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _let_go(incoming, outgoing))
    return incoming, outgoing


def _let_go(*pipes: IO[bytes]) -> None:
    """In a process that the child has forked: it must not hold the pipes of the parent open."""
    for pipe in pipes:
        with contextlib.suppress(OSError, ValueError):
            os.close(pipe.fileno())


def _command(task: Task) -> list[str]:
    if getattr(sys, "frozen", False):
        if not _Frozen.is_prepared:
            raise EngineError(
                "a frozen app that uses workers must call ggufmoe.remote.process.freeze_support() first in its main "
                "script, because it is started again as the process that computes"
            )
        return [sys.executable, _FLAG, task]
    # a program that embeds Python names it with multiprocessing.set_executable
    executable = os.fsdecode(multiprocessing.spawn.get_executable() or sys.executable)
    return [executable, "-c", _CODE, os.pathsep.join(sys.path), task]


class ChildProcess:
    """A started child: messages to and from it, and what it said on stderr. Ends with this process, or by ``end``."""

    def __init__(self, task: Task) -> None:
        flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # Windows would open a console beside a desktop app
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            _command(task), stdin=pipe, stdout=pipe, stderr=pipe, env=os.environ | _ENVIRONMENT, creationflags=flags
        )
        self._is_read = False
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
        return self._process.pid

    @property
    def is_ours(self) -> bool:
        """False in a process that was forked afterwards: it has no threads here, and the child is its parent's."""
        return os.getpid() == self._parent

    def send(self, message: Any) -> None:
        """Pass a message on, without waiting; to a child that has ended it is lost. May be called by finalizers."""
        if not self.is_ours:
            return
        self._outbox.put(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def messages(self) -> Iterator[Any]:
        """What the child sends, until it ends."""
        assert self._process.stdout is not None
        self._is_read = True
        with self._process.stdout as stdout:
            yield from read_messages(stdout)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended by then."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self, grace_s: float = 0.0) -> None:
        """Close its stdin, which is its sign to leave, and kill it if it has not left in time. May be called again."""
        if not self.is_ours:
            return
        self._outbox.put(None)
        if not self.wait(grace_s):
            self._process.kill()
        self.wait(_KILLED_S)
        for thread in self._threads:
            if thread is not threading.current_thread():  # a finalizer may run in any of them
                thread.join(_GRACE_S)
        if not self._is_read and self._process.stdout is not None:
            self._process.stdout.close()

    def abort_message(self) -> str:
        """Why native code ended the process, if it did; for a child that has ended."""
        return next((match[1] for line in self._lines if (match := _NATIVE_ABORT.search(line))), "")

    def how_it_ended(self) -> str:
        """In a few words, with what it said last; for a child that has ended."""
        code = self._process.returncode
        was_killed = code in (-signal.SIGTERM, -getattr(signal, "SIGKILL", 0))  # what it said last is not why
        said = self.abort_message() or ("" if was_killed or not self._lines else self._lines[-1])
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
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


@dataclass(frozen=True)
class Packed:
    """A value on its way to the other process. It is pickled by itself, so that one which cannot be made again there
    spoils nothing but its own message."""

    data: bytes

    @classmethod
    def of(cls, value: Any, what: str) -> Packed:
        """Raises EngineError for what cannot be pickled; ``what`` names it there."""
        try:
            return cls(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
        except Exception as error:  # what classes raise here is up to them
            raise EngineError(f"{what} cannot be sent to another process: {error}") from error

    def unpacked(self, what: str) -> Any:
        """The value, which errors call ``what``.

        Raises EngineError where it cannot be made, for example for a function of ``__main__``.
        """
        try:
            return pickle.loads(self.data)
        except Exception as error:  # as above
            raise EngineError(f"{what} cannot be made in another process: {error}") from error


def read_messages(stream: IO[bytes]) -> Iterator[Any]:
    """Messages from the other end of a pipe, until it is closed or broken off."""
    while True:
        try:
            message = pickle.load(stream)
        except (EOFError, OSError, pickle.UnpicklingError):
            return
        yield message


def leave_with_parent() -> None:
    """In the child: from now on leave at once, whatever native code is doing, when the parent has gone.

    The pipe from it tells as well, but processes that the parent has forked may hold that open.
    """
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=follow, name="ggufmoe-parent", daemon=True).start()
