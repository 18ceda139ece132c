"""Workers asked from this side: what they offer, and everything that can be wrong with them, within seconds."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from ggufmoe import EngineError, OffloadOptions, OptionError, WorkerError
from ggufmoe.native import backends, rpc_calls
from ggufmoe.placement.devices import find_devices
from ggufmoe.remote import rpc
from ggufmoe.remote.places import find_places
from ggufmoe.remote.rpc import find_workers, guard_connections, lost_workers
from ggufmoe.remote.worker import Worker
from tests.remote.workers import (
    PATIENT_S,
    hang_up,
    never_answer,
    nobody_there,
    pretender,
    speak_version,
    start_worker,
    talk_garbage,
)


def workers_of(rpc: str) -> tuple[tuple[str, int], ...]:
    return OffloadOptions(rpc=rpc).workers


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with start_worker() as served:
        yield served


def test_a_worker_tells_what_it_has(worker: Worker) -> None:
    found = find_workers(workers_of(worker.endpoint))
    assert [device.name for device in found] == ["RPC0"]
    assert found[0].worker == found[0].endpoint == worker.endpoint
    assert found[0].total_bytes == worker.devices[0].total_bytes > 2**28
    assert 0 < found[0].free_bytes <= found[0].total_bytes
    assert found[0].place.buffer == f"RPC0[{worker.endpoint}]"
    assert found[0].alignment == find_devices("none").host.alignment


def test_asking_leaves_the_worker_free_for_the_next(worker: Worker) -> None:
    for _ in range(3):
        assert len(find_workers(workers_of(worker.endpoint))) == 1


def test_devices_of_several_workers_are_counted_on() -> None:
    with pretender(speak_version(7, 0, 0)) as first, pretender(speak_version(7, 0, 0)) as second:
        found = find_workers(workers_of(f"{first},{second}"))
    assert [(d.name, d.index, d.endpoint) for d in found] == [("RPC0", 0, first), ("RPC1", 0, second)]
    assert (found[0].free_bytes, found[0].total_bytes, found[0].alignment) == (2 << 30, 3 << 30, 64)


def test_a_name_becomes_the_address_that_llama_cpp_needs(worker: Worker) -> None:
    port = worker.endpoint.rpartition(":")[2]
    (device,) = find_workers(workers_of(f"localhost:{port}"))
    assert (device.worker, device.endpoint) == (f"localhost:{port}", worker.endpoint)


@pytest.mark.parametrize(
    ("behave", "message"),
    [
        (never_answer, "does not answer within 1 s: it is busy with another client"),
        (talk_garbage, "what answers there is no worker of llama.cpp"),
        (hang_up, "closes the connection at once"),
        (speak_version(6, 0, 0), r"speaks version 6\.0\.0 of llama\.cpp's RPC, and this engine 7\.0\.0"),
        (speak_version(7, 1, 0), r"speaks version 7\.1\.0"),
    ],
)
def test_what_is_no_worker_is_told_apart(behave: Callable[[socket.socket], object], message: str) -> None:
    started = time.monotonic()
    with pretender(behave) as endpoint, pytest.raises(WorkerError, match=rf"the worker {endpoint}: {message}"):
        find_workers(workers_of(endpoint), answer_s=1.0)
    assert time.monotonic() - started < PATIENT_S


def test_an_older_worker_is_told_by_its_shorter_greeting() -> None:
    def greet(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"\3\0\0\0\0\0\0\0\3\1\0")

    with pretender(greet) as endpoint, pytest.raises(WorkerError, match=r"speaks version 3\.1\.0"):
        find_workers(workers_of(endpoint))


def test_another_patch_version_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ggufmoe"), pretender(speak_version(7, 0, 3)) as endpoint:
        assert len(find_workers(workers_of(endpoint))) == 1
    assert "version 7.0.3 of llama.cpp's RPC, here 7.0.0" in caplog.text


def test_a_worker_that_is_not_there() -> None:
    with nobody_there() as endpoint:
        expected = f"the worker {endpoint}: cannot be reached: Connection refused; start it"
        with pytest.raises(WorkerError, match=expected):
            find_workers(workers_of(endpoint))


def test_a_name_that_leads_nowhere() -> None:
    with pytest.raises(WorkerError, match="its name leads to no IPv4 address"):
        find_workers([("no-such-host.invalid", 50052)])


def test_everything_that_is_wrong_is_said_at_once(worker: Worker) -> None:
    with nobody_there() as gone, pretender(talk_garbage) as stranger:
        with pytest.raises(WorkerError) as caught:
            find_workers(workers_of(f"{gone},{worker.endpoint},{stranger}"))
        lost = lost_workers(workers_of(f"{gone},{worker.endpoint}"), 5.0)
    assert f"{gone}: cannot be reached" in str(caught.value)
    assert f"{stranger}: what answers there is no worker" in str(caught.value)
    assert worker.endpoint not in str(caught.value)
    assert len(lost) == 1


def test_a_busy_worker_serves_one_at_a_time(worker: Worker) -> None:
    host, _, port = worker.endpoint.rpartition(":")
    with socket.create_connection((host, int(port))), pytest.raises(WorkerError, match="busy with another client"):
        find_workers(workers_of(worker.endpoint), answer_s=1.0)
    assert find_workers(workers_of(worker.endpoint))


@pytest.mark.parametrize(
    ("rpc", "message"),
    [
        ("", "expected HOST:PORT"),
        ("somewhere", "expected HOST:PORT, for example"),
        ("somewhere:0", "expected HOST:PORT"),
        ("somewhere:99999", "expected HOST:PORT"),
        ("somewhere:port", "expected HOST:PORT"),
        ("a:1,,b:2", "expected HOST:PORT"),
        ("[::1]:50052", "knows only IPv4"),
        ("fe80::1:50052", "knows only IPv4"),
        ("a:1,a:1", "names a worker twice"),
        (",".join(f"a:{port}" for port in range(1, 18)), "llama.cpp takes 16 workers, not 17"),
    ],
)
def test_endpoints_that_cannot_be_are_wrong_options(rpc: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        OffloadOptions(rpc=rpc)


def test_endpoints_as_they_are_typed() -> None:
    assert OffloadOptions(rpc="10.0.0.2:50052, host.local:1").workers == (("10.0.0.2", 50052), ("host.local", 1))
    assert OffloadOptions().workers == ()


def test_places_to_plan_for_need_no_registered_device() -> None:
    with pretender(speak_version(7, 0, 0)) as endpoint:
        places, host = find_places(OffloadOptions(rpc=endpoint, device="RPC0"))
        all_places, _ = find_places(OffloadOptions(rpc=endpoint))
    assert [(place.name, place.buffer, place.free_bytes) for place in places] == [
        ("RPC0", f"RPC0[{endpoint}]", 2 << 30)
    ]
    assert all_places[0] == places[0]
    assert host.name == "CPU"
    assert not any(device.backend == "RPC" for device in backends.devices())


def test_connections_to_workers_are_watched_by_the_system() -> None:
    with pretender(speak_version(7, 0, 0)) as endpoint, pretender(never_answer) as other:
        host, port = workers_of(endpoint)[0]
        with socket.create_connection((host, port)) as ours, socket.create_connection(workers_of(other)[0]) as theirs:
            before = guard_connections([endpoint])
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert not theirs.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            ours.sendall(b"\x0e" + (24).to_bytes(8, "little") + bytes(24))
            assert ours.recv(36, socket.MSG_WAITALL)
            if sys.platform == "linux":
                assert guard_connections([endpoint]) >= before + 36
                # a worker that computes takes nothing and is alive
                assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        with contextlib.suppress(OSError):
            assert guard_connections([endpoint]) == 0


@pytest.mark.parametrize(
    ("info", "ends"),
    [
        (rpc._TcpInfo(4, 0, 2, 14_500, 10, 10), True),
        (rpc._TcpInfo(4, 0, 2, 13_500, 10, 10), False),
        (rpc._TcpInfo(0, 2, 0, 14_500, 10, 10), True),
        (rpc._TcpInfo(0, 1, 0, 25_000, 10, 10), False),  # it had no room, and has just been asked again
        (rpc._TcpInfo(0, 0, 0, 60_000, 10, 10), False),  # it computes: nothing is on its way
        (rpc._TcpInfo(0, 0, 2, 60_000, 10, 10), False),  # the first bytes after a long time
    ],
)
def test_a_machine_that_confirms_nothing_any_more(
    info: rpc._TcpInfo, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "_tcp_info", lambda _: info)
    with pretender(never_answer) as endpoint, socket.create_connection(workers_of(endpoint)[0]) as ours:
        assert guard_connections([endpoint]) == 20
        ours.settimeout(0.2)
        if ends:
            assert ours.recv(1) == b""
        else:
            with pytest.raises(TimeoutError):
                ours.recv(1)


def test_an_engine_without_rpc_says_how_to_get_it() -> None:
    with pytest.raises(EngineError, match=r'built without RPC .* CMAKE_ARGS="-DGGML_RPC=ON", as vendor/README.md'):
        rpc_calls.rpc_function("ggml_backend_rpc_of_another_build")
