"""``ggufmoe worker`` as a process, and the verbs that use one."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ggufmoe import OptionError, WorkerError, WorkerOptions
from ggufmoe.cli.app import exit_code
from ggufmoe.remote.rpc import find_workers
from ggufmoe.remote.worker import Worker, is_local_only
from tests.remote.workers import PATIENT_S, free_port, nobody_there, pretender, speak_version, start_worker, wait_until
from tests.scripted import Scripted

COMMAND = [sys.executable, "-m", "ggufmoe"]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with start_worker() as worker:
        yield worker.endpoint


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = Scripted({" once": " upon", " upon": " a", " a": " time"})
    return spec.write(tmp_path_factory.mktemp("model") / "story.gguf")


def answers(port: int) -> Callable[[], bool]:
    def ask() -> bool:
        try:
            return bool(find_workers([("127.0.0.1", port)], answer_s=1.0))
        except WorkerError:
            return False

    return ask


def test_it_says_what_it_serves_until_ctrl_c(tmp_path: Path) -> None:
    port = free_port()
    arguments = ["worker", "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until(answers(port), 4 * PATIENT_S)
        assert process.stderr is not None
        said = [process.stderr.readline() for _ in range(3)]
        main_thread = psutil.Process(process.pid)
        # Python writes a line twice if Ctrl-C comes before the write has returned
        wait_until(lambda: main_thread.status() == psutil.STATUS_SLEEPING)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=PATIENT_S)
        assert time.monotonic() - started < PATIENT_S
    assert process.returncode == 0
    assert out == rest == "", said
    assert said[0].startswith("serving CPU: ")
    assert said[1] == f"at 127.0.0.1:{port}, 1 thread\n"
    assert said[2] == f"use it with --rpc 127.0.0.1:{port}; Ctrl-C ends it\n"
    with pytest.raises(WorkerError, match="cannot be reached"):
        find_workers([("127.0.0.1", port)])


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert exit_code(["worker", "-p", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: the worker cannot listen at 127.0.0.1:{port}: ")
    assert "choose another --port" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (WorkerOptions(host="::1"), "knows only IPv4"),
        (WorkerOptions(host="no-such-host.invalid"), "not an IPv4 address of this machine"),
        (WorkerOptions(device="CUDA7"), "--device CUDA7: there is no such device; there is CPU"),
        (WorkerOptions(device=","), "names no device"),
    ],
)
def test_what_cannot_be_served(options: WorkerOptions, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Worker(options)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(WorkerError, match=r"cannot listen at 192\.0\.2\.1:"):
        Worker(WorkerOptions(host="192.0.2.1", port=free_port()))


def test_only_loopback_comes_without_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_local_only("127.0.0.1")
    assert is_local_only("localhost")
    assert not is_local_only("0.0.0.0")
    monkeypatch.setattr(Worker, "wait", lambda _: None)
    assert exit_code(["worker", "--host", "0.0.0.0", "-p", str(free_port())]) == 0
    warned = capsys.readouterr().err
    assert "warning: 0.0.0.0 can be reached from other machines" in warned
    assert "Never expose it to an open network" in warned
    assert "use it with --rpc ADDRESS-OF-THIS-MACHINE:" in warned
    assert exit_code(["worker", "-p", str(free_port())]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("host", ["BAD", "192.0.2.1"])
def test_nothing_is_warned_of_that_does_not_serve(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["worker", "--host", host, "-p", str(free_port())]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


def test_wrong_numbers_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["worker", "-p", "0"]) == 2
    assert "--port must be between 1 and 65535" in capsys.readouterr().err
    assert exit_code(["run", "m.gguf", "hello", "--rpc", "[::1]:50052"]) == 2
    assert "knows only IPv4" in capsys.readouterr().err


def test_run_answers_with_a_worker(story: Path, endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["run", str(story), " once", "--raw", "--temp", "0", "--rpc", endpoint, "--quiet"]) == 0
    assert capsys.readouterr().out == " once upon a time\n"


def test_a_missing_worker_is_one_line(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nobody_there() as gone:
        assert exit_code(["run", str(story), " once", "--rpc", gone]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: the worker {gone}: cannot be reached")
    assert error.count("\n") == 1


def test_plan_spreads_layers_over_workers(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pretender(speak_version(7, 0, 0)) as first, pretender(speak_version(7, 0, 0)) as second:
        assert exit_code(["plan", str(story), "--rpc", f"{first},{second}", "--json"]) == 0
    shares = json.loads(capsys.readouterr().out)["shares"]
    assert [share["device"] for share in shares] == ["RPC0", "RPC1", "CPU"]
    assert shares[0]["layers"] + shares[1]["layers"] == [0, 1]
    assert shares[0]["free_bytes"] == 2 << 30
    assert exit_code(["plan", str(story), "--rpc", "a:1", "--vram", "8G"]) == 2
    assert "leave out --rpc" in capsys.readouterr().err
