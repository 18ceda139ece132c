"""A worker: this machine's devices, served to other machines by llama.cpp's RPC in a child process.

llama.cpp's server prints to stdout, never returns, and ends its process when a client sends something that it cannot
compute. Owns starting it, waiting until it serves, and ending it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from ggufmoe.errors import EngineError, OptionError, WorkerError
from ggufmoe.native import backends, rpc_calls
from ggufmoe.options import WorkerOptions
from ggufmoe.placement.cpu import default_threads
from ggufmoe.remote.process import ChildProcess, leave_with_parent
from ggufmoe.remote.rpc import find_workers
from ggufmoe.remote.wire import read_messages

_START_S = 60.0
_POLL_S = 0.2
_START_POLL_S = 0.05
_ANYWHERE = "0.0.0.0"
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServedDevice:
    """A device that a worker serves, with its memory when the worker started."""

    name: str
    description: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class _Serve:
    """The message to the child: serve these devices at ``endpoint``."""

    endpoint: str
    cache_dir: str | None
    n_threads: int
    device_names: tuple[str, ...]


class Worker:
    """Serves devices of this machine until ``close``, to one client at a time.

    With ``cache_dir``, llama.cpp keeps tensors of more than 10 MiB there. Raises OptionError for devices and addresses
    that this machine does not have, WorkerError when it cannot listen on the port, EngineError when the engine was
    built without RPC.
    """

    def __init__(self, options: WorkerOptions | None = None, *, cache_dir: Path | None = None) -> None:
        options = options or WorkerOptions()
        rpc_calls.rpc_function("ggml_backend_rpc_start_server")
        devices = _served(options.device)
        address = _address(options.host)
        _check_port(address, options.port)
        self.endpoint = f"{address}:{options.port}"
        """The address that it listens at, as IPv4:PORT."""
        self.n_threads = options.n_threads or default_threads()
        facts = [(device.name, backends.device_facts(device)) for device in devices]
        self.devices = tuple(
            ServedDevice(name, about.description, about.free_bytes, about.total_bytes) for name, about in facts
        )
        self._client_host = _LOOPBACK if address == _ANYWHERE else address
        self._port = options.port
        names = tuple(device.name for device in devices)
        self._process = ChildProcess("worker")
        try:
            self._process.send(_Serve(self.endpoint, str(cache_dir) if cache_dir else None, self.n_threads, names))
            self._wait_until_it_serves()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the child that serves."""
        return self._process.pid

    def wait(self) -> None:
        """Wait until the worker ends by itself; then raise EngineError that tells why."""
        while not self._process.wait(_POLL_S):
            pass
        self._process.end()
        raise EngineError(f"the worker at {self.endpoint} has ended: {self._process.how_it_ended()}")

    def close(self) -> None:
        """End the worker at once; its client loses it. May be called again."""
        self._process.end()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait_until_it_serves(self) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(WorkerError):
                find_workers([(self._client_host, self._port)], answer_s=1.0)
                return
            if self._process.wait(_START_POLL_S):
                self.wait()
        raise WorkerError(f"the worker at {self.endpoint} does not serve after {_START_S:.0f} s")


def is_local_only(host: str) -> bool:
    """Whether only this machine can reach what listens at ``host``."""
    with contextlib.suppress(OptionError):
        return ipaddress.ip_address(_address(host)).is_loopback
    return False


def _address(host: str) -> str:
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise OptionError(
            f"--host {host}: not an IPv4 address of this machine, nor a name of one (llama.cpp's RPC knows only IPv4)"
        ) from error
    return str(found[0][4][0])


def _check_port(address: str, port: int) -> None:
    try:
        socket.create_server((address, port)).close()
    except OSError as error:
        why, _, _ = str(error.strerror).partition(" (")  # Python repeats the address there
        raise WorkerError(
            f"the worker cannot listen at {address}:{port}: {why}; choose another --port, "
            "or an address of this machine as --host"
        ) from error


def _served(named: str | None) -> list[backends.Device]:
    """The devices to serve, as llama.cpp's server chooses them: those named, else all GPUs, else the CPU."""
    there = backends.devices()
    if named is not None:
        by_name = {device.name: device for device in there}
        names = [name for name in named.replace("/", ",").split(",") if name]
        for name in names:
            if name not in by_name:
                raise OptionError(f"--device {name}: there is no such device; there is {', '.join(by_name)}")
        if not names:
            raise OptionError(f"--device {named!r} names no device")
        return [by_name[name] for name in names]
    plain = (backends.DeviceType.CPU, backends.DeviceType.ACCEL)
    gpus = [device for device in there if device.type not in plain]
    return gpus or [device for device in there if device.type is backends.DeviceType.CPU]


def serve_here(incoming: IO[bytes], _outgoing: IO[bytes]) -> None:
    """In the child: serve as the parent's first message says, until ``incoming`` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    leave_with_parent()
    messages = read_messages(incoming)
    order = next(messages, None)
    if isinstance(order, _Serve):
        threading.Thread(target=_serve, args=(order,), name="ggufmoe-serve", daemon=True).start()
        for _ in messages:
            pass
    os._exit(0)  # native code serves for ever


def _serve(order: _Serve) -> None:
    devices = {device.name: device for device in backends.devices()}
    served = [devices[name] for name in order.device_names]
    rpc_calls.start_rpc_server(order.endpoint, order.cache_dir, order.n_threads, served)
    sys.stderr.flush()
    os._exit(1)  # the reason is on stderr
