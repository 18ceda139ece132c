"""Workers for tests: real ones on loopback, and servers that only pretend."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ggufmoe import WorkerOptions
from ggufmoe.remote.worker import Worker

PATIENT_S = 30.0
"""What "within seconds" may take on a machine with much else to do."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def nobody_there() -> Iterator[str]:
    """HOST:PORT that refuses connections, and that nobody else can get meanwhile: it is bound and does not listen."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"


def start_worker() -> Worker:
    return Worker(WorkerOptions(port=free_port(), n_threads=1))


@contextmanager
def pretender(behave: Callable[[socket.socket], object]) -> Iterator[str]:
    """HOST:PORT of a server that does ``behave`` with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_accept, args=(server, behave), daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        # closing alone does not wake a thread that waits for a caller
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
    thread.join()


def _accept(server: socket.socket, behave: Callable[[socket.socket], object]) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_behave, args=(connection, behave), daemon=True).start()


def _behave(connection: socket.socket, behave: Callable[[socket.socket], object]) -> None:
    with contextlib.suppress(OSError), connection:
        behave(connection)


def never_answer(connection: socket.socket) -> None:
    """Takes everything, says nothing."""
    while connection.recv(4096):
        pass


def talk_garbage(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    connection.recv(4096)


def hang_up(connection: socket.socket) -> None:
    connection.recv(4096)


def speak_version(major: int, minor: int, patch: int) -> Callable[[socket.socket], None]:
    """Greets as a worker of this version; then offers a device of 3 GiB, 2 of them free."""

    def behave(connection: socket.socket) -> None:
        answers = {14: struct.pack("<BBBx24x", major, minor, patch), 15: struct.pack("<I", 1)}
        answers |= {11: struct.pack("<QQ", 2 << 30, 3 << 30), 1: struct.pack("<Q", 64)}
        while head := connection.recv(9, socket.MSG_WAITALL):
            command, size = struct.unpack("<BQ", head)
            connection.recv(size, socket.MSG_WAITALL) if size else None
            connection.sendall(struct.pack("<Q", len(answers[command])) + answers[command])

    return behave


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and waits to be noticed."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return True  # no /proc on this system
    except ProcessLookupError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.05)


def pause(pid: int) -> None:
    """Stop a child of this process; when this returns, none of its threads computes any more."""
    os.kill(pid, signal.SIGSTOP)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


@contextmanager
def paused(pid: int) -> Iterator[None]:
    """A process that does nothing while this lasts, though its connections stay open."""
    pause(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
