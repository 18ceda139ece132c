"""Workers on other machines, seen by the program that uses them: what they offer, and connections to lost machines.

llama.cpp ends its process when a worker cannot be reached, and waits without end for one that is silent. So the first
messages of its RPC protocol (ggml-rpc.cpp and ggml-rpc.h at commit 0c1e57098) are exchanged here before, in Python and
with a time limit; they also tell the devices of a worker. Serving is ``worker``'s; ``host`` is the process that
llama.cpp may end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ggufmoe.errors import WorkerError
from ggufmoe.native import rpc_calls
from ggufmoe.native.wording import rpc_buffer, rpc_device
from ggufmoe.options import OffloadOptions
from ggufmoe.options.limits import MAX_DEVICES
from ggufmoe.placement.offload_plan import Place

ANSWER_S = 5.0
"""Time limit for each of: resolving a worker's name, connecting to it, its answers."""

_PROTOCOL = (7, 0, 0)
"""RPC_PROTO_MAJOR_VERSION, _MINOR_, _PATCH_ of the pinned llama.cpp."""
_GET_ALIGNMENT, _GET_DEVICE_MEMORY, _HELLO, _DEVICE_COUNT = 1, 11, 14, 15
_CAPABILITIES = bytes(24)
"""No transport but TCP."""
_HELLO_REPLY = struct.Struct("<BBBx24x")
_OLD_HELLO_REPLY = struct.Struct("<BBB")
_MAX_ALIGNMENT = 1 << 20

_logger = logging.getLogger("ggufmoe")


@dataclass(frozen=True)
class RemoteDevice:
    """A device of a worker. ``worker`` is HOST:PORT as the user gave it, ``endpoint`` IPv4:PORT as llama.cpp needs it.

    ``index`` counts the devices of this worker, ``name`` (RPC0, RPC1, ...) those of all workers.
    """

    name: str
    worker: str
    endpoint: str
    index: int
    free_bytes: int
    total_bytes: int
    alignment: int

    @property
    def place(self) -> Place:
        """The device for the planner, with the names that llama.cpp will give it."""
        buffer = rpc_buffer(self.index, self.endpoint)
        return Place(self.name, buffer, self.free_bytes, self.total_bytes, alignment=self.alignment)


@dataclass(frozen=True)
class _Answer:
    endpoint: str
    devices: tuple[tuple[int, int, int], ...]
    """(free, total, alignment) in bytes."""


def find_workers(workers: Sequence[tuple[str, int]], answer_s: float = ANSWER_S) -> tuple[RemoteDevice, ...]:
    """The devices of workers, given as host and port. All are asked at once; ``answer_s`` limits each step.

    Raises WorkerError that names every worker that cannot be used, and why: not reachable, silent or busy, no worker,
    another version.
    """
    answers = _ask_all(workers, answer_s)
    wrong = [str(answer) for answer in answers if isinstance(answer, WorkerError)]
    if wrong:
        raise WorkerError("; ".join(wrong))
    found: list[RemoteDevice] = []
    for (host, port), answer in zip(workers, answers, strict=True):
        assert isinstance(answer, _Answer), "errors have been raised"
        for index, facts in enumerate(answer.devices):
            found.append(RemoteDevice(rpc_device(len(found)), f"{host}:{port}", answer.endpoint, index, *facts))
    if len(found) > MAX_DEVICES:
        raise WorkerError(f"the workers have {len(found)} devices, and llama.cpp takes {MAX_DEVICES}: name fewer")
    return tuple(found)


def answer_seconds(offload: OffloadOptions) -> float:
    """``ANSWER_S``, or less where the user has less patience."""
    return min(ANSWER_S, offload.rpc_timeout)


def lost_workers(workers: Sequence[tuple[str, int]], answer_s: float) -> list[str]:
    """For each worker that does not answer, a sentence that tells why."""
    return [str(answer) for answer in _ask_all(workers, answer_s) if isinstance(answer, WorkerError)]


def register_workers(endpoints: Sequence[str]) -> None:
    """Register the workers' devices with llama.cpp, which may end this process from now on. Raises EngineError."""
    for endpoint in endpoints:
        rpc_calls.register_rpc_server(endpoint)


def _ask_all(workers: Sequence[tuple[str, int]], answer_s: float) -> list[_Answer | WorkerError]:
    """The answer of each worker, or its error. Each is asked in a thread: resolving a name has no time limit."""
    inbox: queue.SimpleQueue[tuple[int, _Answer | WorkerError]] = queue.SimpleQueue()

    def ask(number: int, host: str, port: int) -> None:
        try:
            inbox.put((number, _ask(host, port, answer_s)))
        except WorkerError as error:
            inbox.put((number, error))

    for number, (host, port) in enumerate(workers):
        threading.Thread(target=ask, args=(number, host, port), name="ggufmoe-rpc", daemon=True).start()
    deadline = time.monotonic() + 3 * answer_s + 1
    answers: dict[int, _Answer | WorkerError] = {}
    while len(answers) < len(workers):
        try:
            number, answer = inbox.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        answers[number] = answer
    unresolved = (
        WorkerError(f"the worker {host}:{port}: its name takes too long to resolve") for host, port in workers
    )
    return [answers.get(number, missing) for number, missing in enumerate(unresolved)]


def _ask(host: str, port: int, answer_s: float) -> _Answer:
    worker = f"the worker {host}:{port}"
    address = _resolve(worker, host, port)
    try:
        connection = socket.create_connection(address, timeout=answer_s)
    except TimeoutError as error:
        raise WorkerError(
            f"{worker}: no connection within {answer_s:g} s: it is off, behind a firewall, or busy with other clients"
        ) from error
    except OSError as error:
        raise WorkerError(
            f"{worker}: cannot be reached: {error.strerror or error}; start it there with 'ggufmoe worker'"
        ) from error
    with connection:
        handshake = _Handshake(connection, worker, answer_s)
        handshake.greet()
        return _Answer(f"{address[0]}:{port}", tuple(handshake.devices()))


def _resolve(worker: str, host: str, port: int) -> tuple[str, int]:
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WorkerError(
            f"{worker}: its name leads to no IPv4 address, which llama.cpp's RPC needs: {reason}"
        ) from error
    return str(found[0][4][0]), port


class _Handshake:
    """The first messages of the protocol, on an open connection.

    A request is a command byte, the size of its data (8 bytes) and the data; a reply is a size and data.
    """

    def __init__(self, connection: socket.socket, worker: str, answer_s: float) -> None:
        self._connection = connection
        self._worker = worker
        self._answer_s = answer_s
        self._deadline = time.monotonic() + answer_s

    def greet(self) -> None:
        """Exchange versions, as llama.cpp's client does. Raises WorkerError for a version that does not fit."""
        self._send(_HELLO, _CAPABILITIES)
        size = self._receive_size()
        if size not in (_HELLO_REPLY.size, _OLD_HELLO_REPLY.size):
            raise self._not_a_worker()
        reply = _HELLO_REPLY if size == _HELLO_REPLY.size else _OLD_HELLO_REPLY
        major, minor, patch = reply.unpack(self._receive(size))
        if reply is _OLD_HELLO_REPLY or major != _PROTOCOL[0] or minor > _PROTOCOL[1]:
            raise WorkerError(
                f"{self._worker}: speaks version {major}.{minor}.{patch} of llama.cpp's RPC, and this engine "
                f"{'.'.join(map(str, _PROTOCOL))}: run the same version of ggufmoe (or of llama.cpp) on both machines"
            )
        if patch != _PROTOCOL[2]:
            _logger.warning(
                "%s: version %d.%d.%d of llama.cpp's RPC, here %d.%d.%d: operations may differ",
                self._worker, major, minor, patch, *_PROTOCOL,
            )  # fmt: skip

    def devices(self) -> Iterator[tuple[int, int, int]]:
        """Free and total bytes and the alignment of each device."""
        (count,) = self._ask(_DEVICE_COUNT, b"", "<I")
        if not 1 <= count <= MAX_DEVICES:
            raise WorkerError(f"{self._worker}: offers {count} devices; expected 1 to {MAX_DEVICES}")
        for index in range(count):
            request = struct.pack("<I", index)
            free, total = self._ask(_GET_DEVICE_MEMORY, request, "<QQ")
            (alignment,) = self._ask(_GET_ALIGNMENT, request, "<Q")
            if not 1 <= alignment <= _MAX_ALIGNMENT:
                raise self._not_a_worker()
            yield free, total, alignment

    def _ask(self, command: int, request: bytes, reply: str) -> tuple[int, ...]:
        self._send(command, request)
        if self._receive_size() != struct.calcsize(reply):
            raise self._not_a_worker()
        return struct.unpack(reply, self._receive(struct.calcsize(reply)))

    def _send(self, command: int, request: bytes) -> None:
        try:
            self._connection.sendall(struct.pack("<BQ", command, len(request)) + request)
        except OSError as error:
            raise self._hung_up() from error

    def _receive_size(self) -> int:
        (size,) = struct.unpack("<Q", self._receive(8))
        return int(size)

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise self._no_answer()
            self._connection.settimeout(left)
            try:
                part = self._connection.recv(size - len(data))
            except TimeoutError as error:
                raise self._no_answer() from error
            except OSError as error:
                raise self._hung_up() from error
            if not part:
                raise self._hung_up()
            data += part
        return data

    def _no_answer(self) -> WorkerError:
        return WorkerError(
            f"{self._worker}: does not answer within {self._answer_s:g} s: it is busy with another client "
            "(a worker serves one at a time), or hangs"
        )

    def _hung_up(self) -> WorkerError:
        return WorkerError(
            f"{self._worker}: closes the connection at once: it is ending, or of another version of llama.cpp, or no "
            "worker"
        )

    def _not_a_worker(self) -> WorkerError:
        return WorkerError(f"{self._worker}: what answers there is no worker of llama.cpp: check host and port")


# ---- the connections that llama.cpp has made

_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPALIVE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}
"""Seconds: a machine that confirms nothing for 14 s is lost. Linux and macOS have different names for the first."""
_LOST_MS = 14_000
"""The limit while bytes are on their way, which keep-alive does not cover. TCP_USER_TIMEOUT is not used: it would also
end a connection to a worker that confirms everything, and has no room for more bytes while it computes."""
_TCP_INFO = struct.Struct("=2xBB20xI28xI60xQQ")
"""Where Linux's ``struct tcp_info`` has what ``_TcpInfo`` holds."""


class _TcpInfo(NamedTuple):
    n_retries: int
    """How often the oldest unconfirmed bytes were sent again."""
    n_probes: int
    """Unanswered probes of whether the other side has room for bytes again."""
    n_unconfirmed: int
    """Segments that were sent and not confirmed."""
    since_confirmed_ms: int
    bytes_confirmed: int
    bytes_received: int


def guard_connections(endpoints: Sequence[str]) -> int:
    """End this process's connections to workers whose machine is lost; the bytes that all have carried so far (Linux).

    llama.cpp opens the connections without any time limit. With this, one to a machine that vanishes ends after 14 s,
    which llama.cpp treats as a lost worker. Does nothing where sockets are no file descriptors (Windows).
    """
    total = 0
    for descriptor in _descriptors():
        with contextlib.suppress(OSError, ValueError), _socket_of(descriptor) as connection:
            host, port = connection.getpeername()[:2]
            if f"{host}:{port}" in endpoints:
                _keep_alive(connection)
                info = _tcp_info(connection)
                if _is_lost(info):
                    connection.shutdown(socket.SHUT_RDWR)
                total += info.bytes_confirmed + info.bytes_received
    return total


def _descriptors() -> list[int]:
    for directory in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return [int(name) for name in os.listdir(directory) if name.isdecimal()]
    return []


def _socket_of(descriptor: int) -> socket.socket:
    """A second handle of the IPv4 socket ``descriptor``. Raises OSError for anything else."""
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        raise OSError(f"{descriptor} is no socket")
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=os.dup(descriptor))


def _keep_alive(connection: socket.socket) -> None:
    if connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _tcp_info(connection: socket.socket) -> _TcpInfo:
    """Linux's facts about a connection; zeros on other systems."""
    if sys.platform.startswith("linux"):
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        if len(info) == _TCP_INFO.size:
            return _TcpInfo(*_TCP_INFO.unpack(info))
    return _TcpInfo(0, 0, 0, 0, 0, 0)


def _is_lost(info: _TcpInfo) -> bool:
    is_asked = (info.n_unconfirmed > 0 and info.n_retries > 0) or info.n_probes > 1
    return is_asked and info.since_confirmed_ms > _LOST_MS
