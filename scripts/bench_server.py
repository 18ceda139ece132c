"""``ggufmoe serve`` against llama-server: 1, 2, 4 and 8 clients that read streams, the same prompts, in turn.

    python scripts/bench_server.py --build DIR                  # compiles llama-server: the command below names it
    python scripts/bench_server.py MODEL.gguf --llama-server DIR/llama-server [--clients 1,2,4,8] [--rounds 5]

Both servers compute with the same libllama, with as many slots, threads and cells, and draw greedily. Every prompt is
new, so nothing of it is cached. Each round measures both servers with each number of clients; the clients are a process
of their own (``stream_clients.py``). Printed are, for each server: tokens a second of all clients together; the time to
the first token and between two tokens, as clients see them, in the median and for 95 of 100; processor time a token,
which other work on the machine disturbs less; resident memory; and the ratio of tokens a second with what the middle
half of the rounds showed. ``--before`` measures another checkout of ggufmoe in turn. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.util
import json
import os
import random
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import setup_environment as setup

ROOT = setup.ROOT
_START_S = 300
_REST_S = 0.3
"""Between two measurements: the threads of the other server spin for a while before they sleep."""
_WORDS = ("old", "man", "sea", "red", "boat", "and", "small", "dog", "was", "cold", "fell", "green", "hill")


@dataclass
class Measured:
    """What one server did with one number of clients, in all rounds."""

    tokens_per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    """Processor time for each token, one number a round."""
    first_ms: list[float] = field(default_factory=list)
    between_ms: list[float] = field(default_factory=list)
    resident_mib: float = 0.0
    texts: list[str] = field(default_factory=list)


class Server:
    """A server that listens at a port of this machine, once this returns. It writes into ``log``."""

    def __init__(self, name: str, command: Sequence[str], port: int, log: Path, package: Path | None = None) -> None:
        self.name = name
        self.port = port
        self._log = log
        self._environment = dict(os.environ) if package is None else os.environ | {"PYTHONPATH": str(package)}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environment
            )
        self._wait_until_loaded()

    def _wait_until_loaded(self) -> None:
        until = time.monotonic() + _START_S
        while time.monotonic() < until and self._process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.1)
        self.close()
        sys.exit(f"{self.name} did not start:\n{self._log.read_text(errors='replace')[-3000:]}")

    def cpu_s(self) -> float:
        """Processor time of all its threads so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mib(self) -> float:
        """Resident memory now, the pages of the model's file included."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Clients:
    """The process that sends requests."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("stream_clients.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, server: Server, path: str, bodies: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """What ``stream_clients`` says of these requests."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        time.sleep(_REST_S)
        self._process.stdin.write(json.dumps({"port": server.port, "path": path, "clients": bodies}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the clients of {server.name} failed")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> int:
    """Build, or measure and print."""
    options = _options()
    if options.build is not None:
        print(build(options.build, options.jobs))
        return 0
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(contextlib.closing(server)) for server in _servers(options, stack)]
        clients = stack.enter_context(contextlib.closing(Clients()))
        found = _rounds(servers, clients, options)
    _print_table(found, [server.name for server in servers])
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure ggufmoe serve against llama-server.")
    parser.add_argument("model", type=Path, nargs="?", help="GGUF file")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="the program to compare with")
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout of ggufmoe to compare with")
    parser.add_argument("--clients", default="1,2,4,8", help="numbers of clients, default %(default)s")
    parser.add_argument("--requests", type=int, default=2, help="requests of each client in a round, default 2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-n", "--tokens", type=int, default=64, help="tokens of an answer, default 64")
    parser.add_argument("-p", "--words", type=int, default=100, help="words of a prompt, default 100")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-c", "--ctx-size", type=int, default=4096, help="cells for all slots together, default 4096")
    parser.add_argument("--chat", action="store_true", help="ask for chat completions; the model needs a template")
    parser.add_argument("--sampled", action="store_true", help="draw with the servers' default samplers, not greedily")
    parser.add_argument("--ggufmoe-flags", default="", help="more flags of ggufmoe serve")
    parser.add_argument("--llama-server-flags", default="--kv-unified", help="of llama-server, default %(default)s")
    parser.add_argument("--build", type=Path, metavar="DIR", help="compile llama-server there, nothing else")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="files compiled at the same time")
    options = parser.parse_args()
    if options.build is None and (options.model is None or not (options.llama_server or options.before)):
        parser.error("give a model, and --llama-server or --before; or --build")
    return options


def build(folder: Path, jobs: int) -> Path:
    """Compile llama-server from the pinned sources, linked with the engine's libraries; gives the program."""
    setup.check_tools()
    sources = setup.llama_cpp_sources(setup.read_pin(setup.PIN_FILE, None))
    found = importlib.util.find_spec("llama_cpp")
    assert found is not None
    assert found.origin is not None, "the engine is installed"
    libraries = Path(found.origin).parent / "lib"
    defines = [f"-DSOURCES={sources}", f"-DLIBRARIES={libraries}", "-DCMAKE_BUILD_TYPE=Release"]
    source = Path(__file__).with_name("llama_server")
    subprocess.run(["cmake", "-S", str(source), "-B", str(folder), *defines], check=True, stdout=sys.stderr)
    compiling = ["cmake", "--build", str(folder), "--target", "llama-server", "-j", str(jobs)]
    subprocess.run(compiling, check=True, stdout=sys.stderr)
    return folder / "llama-server"


def _servers(options: argparse.Namespace, stack: contextlib.ExitStack) -> Iterator[Server]:
    """All servers, ours first, with the same model, threads, slots and cells."""
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    slots = str(max(_numbers(options)))
    common = ["-t", str(options.threads), "-c", str(options.ctx_size), "--parallel", slots]

    def command(*program: str) -> tuple[list[str], int]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        return [*program, *common, "--host", "127.0.0.1", "--port", str(port)], port

    ours = [sys.executable, "-m", "ggufmoe", "serve", str(options.model), *shlex.split(options.ggufmoe_flags)]
    yield Server("ggufmoe", *command(*ours), logs / "ggufmoe", ROOT)
    if options.before is not None:
        yield Server("before", *command(*ours), logs / "before", options.before)
    if options.llama_server is not None:
        theirs = [str(options.llama_server), "-m", str(options.model), *shlex.split(options.llama_server_flags)]
        yield Server("llama-server", *command(*theirs), logs / "llama-server")


def _numbers(options: argparse.Namespace) -> list[int]:
    return [int(number) for number in options.clients.split(",")]


# ---- measuring


def _rounds(
    servers: Sequence[Server], clients: Clients, options: argparse.Namespace
) -> dict[tuple[int, str], Measured]:
    path = "/v1/chat/completions" if options.chat else "/v1/completions"
    numbers = _numbers(options)
    prompts = _prompts(options.words)
    for server in servers:  # once without being counted
        clients.measure(server, path, _bodies(prompts, max(numbers), options))
    found = {(number, server.name): Measured() for number in numbers for server in servers}
    for turn in range(options.rounds):
        for number in numbers:
            bodies = _bodies(prompts, number, options)
            for server in servers if turn % 2 else reversed(servers):
                _measure(server, clients, path, bodies, found[number, server.name])
        print(f"round {turn + 1} of {options.rounds}", file=sys.stderr, flush=True)
    return found


def _prompts(n_words: int) -> Iterator[str]:
    """Prompts that differ from their first word on, so that no server has computed a beginning of them."""
    generator = random.Random(0)
    number = 0
    while True:
        number += 1
        yield " ".join([str(1000 + 7919 * number), *generator.choices(_WORDS, k=n_words - 1)])


def _bodies(prompts: Iterator[str], n_clients: int, options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    common: dict[str, Any] = {"max_tokens": options.tokens, "stream": True, "stream_options": {"include_usage": True}}
    common |= {"seed": 1} if options.sampled else {"temperature": 0}

    def body() -> dict[str, Any]:
        prompt = next(prompts)
        asked = {"messages": [{"role": "user", "content": prompt}]} if options.chat else {"prompt": prompt}
        return asked | common

    return [[body() for _ in range(options.requests)] for _ in range(n_clients)]


def _measure(server: Server, clients: Clients, path: str, bodies: list[list[dict[str, Any]]], found: Measured) -> None:
    cpu_s = server.cpu_s()
    result = clients.measure(server, path, bodies)
    answers = result["answers"]
    n_tokens = sum(answer["n_tokens"] for answer in answers)
    found.tokens_per_s.append(n_tokens / result["seconds"])
    found.cpu_ms.append(1000 * (server.cpu_s() - cpu_s) / n_tokens)
    found.first_ms += [1000 * answer["first_s"] for answer in answers]
    found.between_ms += [1000 * seconds for answer in answers for seconds in answer["between_s"]]
    found.resident_mib = max(found.resident_mib, server.resident_mib())
    found.texts += [answer["text"] for answer in answers]


# ---- printing


def _print_table(found: dict[tuple[int, str], Measured], names: Sequence[str]) -> None:
    """A table in Markdown with a line for each number of clients and server."""
    _print_row("clients", "server", "tokens/s", "ratio", "first token, ms", "between tokens, ms", "CPU ms/token", "MiB")
    _print_row(*["---"] * 8)
    for (number, name), one in found.items():
        ratio = "" if name == names[0] else _ratio(found[number, names[0]], one)
        times = [_median_and_95(one.first_ms), _median_and_95(one.between_ms)]
        speed, cpu_ms = statistics.median(one.tokens_per_s), statistics.median(one.cpu_ms)
        _print_row(number, name, f"{speed:.1f}", ratio, *times, f"{cpu_ms:.2f}", f"{one.resident_mib:.0f}")
    for name in names[1:]:
        numbers = [number for number, other in found if other == name]
        same = [a == b for n in numbers for a, b in zip(found[n, names[0]].texts, found[n, name].texts, strict=True)]
        print(f"\n{sum(same)} of {len(same)} answers of {names[0]} have the text of those of {name}")


def _print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|")


def _ratio(ours: Measured, theirs: Measured) -> str:
    """Our tokens a second as a multiple of theirs: the median of the rounds, and their middle half."""
    ratios = sorted(a / b for a, b in zip(ours.tokens_per_s, theirs.tokens_per_s, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def _median_and_95(times: list[float]) -> str:
    ordered = sorted(times) or [0.0]
    return f"{statistics.median(ordered):.1f}, {ordered[int(0.95 * (len(ordered) - 1))]:.1f}"


if __name__ == "__main__":
    sys.exit(main())
