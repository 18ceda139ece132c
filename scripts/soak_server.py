"""Soak ``ggufmoe serve``: clients that stream, leave, send rubbish, huge bodies and half requests, for minutes.

    python scripts/soak_server.py MODEL.gguf --minutes 20 [--clients 16] [--parallel 4] [--seed 1]

A line a minute says what was done and what the server's process holds. Exit code 1, with the reasons, when a status is
one that the act may not have, when the medians of resident memory in each quarter of the time, after 1000 acts and a
minute, differ by more than 5 % (buffers that come and go make up more than that for seconds), when threads,
descriptors or answers are left at the end, when greedy answers at the end differ from those at the beginning, or when
the server does not end with status 0. Let the weights be F32, so that answers do not hang on rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

_FLAT = 0.05
_WARM_ACTS = 1000
"""After so many acts on top of the first minute, buffers have the size that they keep."""
_QUIET_S = 90.0
"""Idle connections are closed within a minute."""
_CALM_S = 5
_N_POOLED = min(32, (os.cpu_count() or 1) + 4)
"""Threads that asyncio keeps for work outside its loop, and starts when they are needed first."""
_END_S = 20.0
_TIMEOUT_S = 120.0
_STORY = "Once upon a time there was a captain who sailed the sea"
_CALM: Sequence[dict[str, Any]] = [
    {"prompt": text, "temperature": 0, "max_tokens": 24} for text in (_STORY, "One day", "A")
]
_SCHEMA = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"]}
_TOOL = {"type": "function", "function": {"name": "weather", "parameters": _SCHEMA}}
_FORM = {"type": "json_schema", "json_schema": {"name": "w", "schema": _SCHEMA}}
_BUSY = {200, 429}
"""Of a good request: an answer, or the queue is full."""


@dataclass
class Server:
    """The server under soak, seen from outside."""

    url: str
    process: psutil.Process
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        url = httpx.URL(self.url)
        return url.host, url.port or 80

    def check(self, act: str, status: int, permitted: set[int], said: str = "") -> None:
        """Count an act; a status that it may not have is a fault."""
        self.counts[f"{act} {status}"] += 1
        if status not in permitted:
            self.faults.append(f"{act}: status {status}, not {sorted(permitted)}: {said[:200]}")

    def holds(self) -> tuple[float, int, int]:
        """Resident memory in MiB, threads, and descriptors."""
        return self.process.memory_info().rss / 2**20, self.process.num_threads(), self.process.num_fds()

    def answers(self) -> list[str]:
        """The greedy answers by which the server is known to be in order."""
        found = [httpx.post(f"{self.url}/v1/completions", json=one, timeout=_TIMEOUT_S).json() for one in _CALM]
        return [one["choices"][0]["text"] for one in found]

    def n_under_way(self) -> int:
        """How many answers wait or are being computed."""
        text = httpx.get(f"{self.url}/metrics", timeout=_TIMEOUT_S).text
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("ggufmoe_answers_under_way "))


Act = Callable[[Server, httpx.Client, random.Random], None]


def _prompt(chance: random.Random) -> str:
    words = _STORY.split()
    return " ".join(chance.choice(words) for _ in range(chance.randint(1, 120)))


def whole(server: Server, client: httpx.Client, chance: random.Random) -> None:
    """An answer as one object, of one of several kinds."""
    message = {"messages": [{"role": "user", "content": _prompt(chance)}], "max_tokens": chance.randint(1, 48)}
    more: dict[str, Any] = chance.choice(
        [
            {},
            {"n": 3, "temperature": 1},
            {"logprobs": True, "top_logprobs": 5},
            {"response_format": _FORM},
            {"tools": [_TOOL], "tool_choice": "required"},
            {"stop": [" the", "a"]},
        ]
    )
    answer = client.post("/v1/chat/completions", json=message | more)
    server.check("whole", answer.status_code, _BUSY, answer.text)


def echo(server: Server, client: httpx.Client, chance: random.Random) -> None:
    """Probabilities of a prompt."""
    body = {"prompt": _prompt(chance), "echo": True, "logprobs": 2, "max_tokens": 2}
    answer = client.post("/v1/completions", json=body)
    server.check("echo", answer.status_code, _BUSY, answer.text)


def other(server: Server, client: httpx.Client, chance: random.Random) -> None:
    """Responses and embeddings."""
    if chance.random() < 0.5:
        answer = client.post("/v1/embeddings", json={"input": [_prompt(chance), "A"]})
    else:
        is_stream = chance.random() < 0.5
        body = {"input": _prompt(chance), "max_output_tokens": 16, "stream": is_stream}
        answer = client.post("/v1/responses", json=body)
    server.check("other", answer.status_code, _BUSY, answer.text)


def stream(server: Server, client: httpx.Client, chance: random.Random) -> None:
    """A stream that is read to its end, or left; some readers are slow."""
    body = {"prompt": _prompt(chance), "max_tokens": chance.choice([8, 64, 400]), "stream": True}
    n_read, pause_s = chance.choice([2, 10, 10_000]), chance.choice([0.0, 0.0, 0.05])
    with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            answer.read()
            server.check("stream", answer.status_code, _BUSY, answer.text)
            return
        lines = []
        for line in answer.iter_lines():
            lines.append(line)
            if len(lines) > n_read or server.done.is_set():
                server.check("stream left", 200, {200})
                return
            time.sleep(pause_s)
    server.check("stream", 200 if "data: [DONE]" in lines else 0, {200}, "".join(lines)[-200:])


def leave(server: Server, client: httpx.Client, chance: random.Random) -> None:
    """Ask, and leave before the answer comes."""
    try:
        body = {"prompt": _prompt(chance), "max_tokens": 400}
        answer = client.post("/v1/completions", json=body, timeout=chance.choice([0.01, 0.1, 0.5]))
        server.check("left", answer.status_code, _BUSY, answer.text)
    except httpx.TimeoutException:
        server.counts["left"] += 1


def bad(server: Server, client: httpx.Client, chance: random.Random) -> None:
    """A request that is wrong in one of many ways."""
    path, permitted, content = chance.choice(
        [
            ("/v1/chat/completions", {400}, b"{"),
            ("/v1/chat/completions", {400}, b'{"messages": []}'),
            ("/v1/chat/completions", {400}, b'{"messages": [{"role": "user", "content": "x"}], "temperatur": 1}'),
            ("/v1/completions", {400}, b'{"prompt": ' + b"[" * 100_000),
            ("/v1/completions", {404}, b'{"prompt": "x", "model": "none"}'),
            ("/v1/completions", {400, 429}, b'{"prompt": "x", "grammar": "root ::= ("}'),
            ("/v1/completions", {400, 429}, json.dumps({"prompt": "very long " * 100_000}).encode()),
            ("/v1/completions", {413}, b" " * (9 << 20)),
            ("/v1/none", {404}, b"{}"),
        ]
    )
    answer = client.post(path, content=content)
    server.check("bad", answer.status_code, permitted, answer.text)


def rubbish(server: Server, client: httpx.Client, chance: random.Random) -> None:
    """Bytes that are no HTTP, headers without an end, half a body; then the connection is closed, now or later."""
    del client
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    parts = [chance.randbytes(300), b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000, head + b'{"prompt": ', b"POST /v1"]
    with socket.create_connection(server.address, timeout=10) as sock:
        try:
            sock.sendall(chance.choice(parts))
            if chance.random() < 0.5:
                server.done.wait(chance.choice([0.1, 1, 3]))
        except OSError:  # the server has closed it
            pass
    server.counts["rubbish"] += 1


def small(server: Server, client: httpx.Client, chance: random.Random) -> None:
    """What costs nothing: names, health, numbers, tokens."""
    if chance.random() < 0.5:
        status = client.get(chance.choice(["/health", "/v1/models", "/metrics"])).status_code
    else:
        status = client.post("/tokenize", json={"content": _prompt(chance), "with_pieces": True}).status_code
    server.check("small", status, {200})


_ACTS: Sequence[Act] = (whole, whole, echo, other, stream, stream, stream, leave, bad, rubbish, small)


def behave(server: Server, seed: int) -> None:
    """What one client does until the soak is over."""
    chance = random.Random(seed)
    while not server.done.is_set():
        with httpx.Client(base_url=server.url, timeout=_TIMEOUT_S, trust_env=False) as client:
            for _ in range(chance.randint(1, 20)):
                if server.done.is_set():
                    break
                act = chance.choice(_ACTS)
                try:
                    act(server, client, chance)
                except (httpx.HTTPError, OSError) as error:
                    server.faults.append(f"{act.__name__}: {type(error).__name__}: {error}")


@contextmanager
def crowd(server: Server, n_clients: int, seed: int) -> Iterator[None]:
    """Clients in threads, for as long as the block runs."""
    server.done.clear()
    threads = [threading.Thread(target=behave, args=(server, seed + n)) for n in range(n_clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        server.done.set()
        for thread in threads:
            thread.join()


def settle(server: Server, at_most: tuple[int, int] = (10_000, 10_000)) -> tuple[int, int]:
    """Threads and descriptors once nothing changes: as few as ``at_most``, or what is there after _QUIET_S."""
    end, calm_s, last = time.monotonic() + _QUIET_S, 0, (0, 0)
    while calm_s < _CALM_S and time.monotonic() < end:
        _, n_threads, n_files = server.holds()
        is_calm = server.n_under_way() == 0 and n_threads <= at_most[0] and n_files <= at_most[1]
        calm_s = calm_s + 1 if is_calm and (n_threads, n_files) == last else 0
        last = (n_threads, n_files)
        time.sleep(1)
    return last


def soak(server: Server, minutes: float, n_clients: int, seed: int) -> None:
    """Soak the server; what is wrong comes into its ``faults``."""
    before = server.answers()
    with crowd(server, n_clients, seed + 1000):
        while sum(server.counts.values()) < _WARM_ACTS and server.process.is_running():
            time.sleep(1)
    quiet = settle(server)
    print(f"at rest: {quiet[0]} threads, {quiet[1]} descriptors, {server.holds()[0]:.0f} MiB", flush=True)
    began, seen = time.monotonic(), list[tuple[float, float]]()
    with crowd(server, n_clients, seed):
        while (now := time.monotonic() - began) < 60 * minutes and server.process.is_running():
            memory, threads, files = server.holds()
            seen.append((now, memory))
            if len(seen) % 60 == 0:
                held = f"{memory:.0f} MiB, {threads} threads, {files} descriptors"
                print(f"{now / 60:5.1f} min  {held}, {sum(server.counts.values())} acts", flush=True)
            time.sleep(1)
    server.faults += _moved(seen)
    left = settle(server, (quiet[0] + _N_POOLED, quiet[1]))
    print(f"at rest: {left[0]} threads, {left[1]} descriptors, {server.holds()[0]:.0f} MiB", flush=True)
    if left[0] > quiet[0] + _N_POOLED or left[1] > quiet[1]:
        server.faults.append(f"left at the end: {left} threads and descriptors; {quiet} were there before")
    if (n := server.n_under_way()) != 0:
        server.faults.append(f"{n} answers are under way at the end")
    if (after := server.answers()) != before:
        server.faults.append(f"other answers than before: {after} and {before}")


def _moved(seen: Sequence[tuple[float, float]]) -> Iterator[str]:
    """The fault of memory that moves: the medians of the quarters after the first minute."""
    quarters: dict[int, list[float]] = {}
    for second, memory in seen:
        if second >= 60:
            quarters.setdefault(int(4 * (second - 60) / (seen[-1][0] - 60 + 1)), []).append(memory)
    medians = [median(quarter) for quarter in quarters.values()]
    if medians:
        print("resident memory after the first minute, by quarters:", ", ".join(f"{one:.0f} MiB" for one in medians))
        if max(medians) > min(medians) * (1 + _FLAT):
            yield f"resident memory went from {min(medians):.0f} to {max(medians):.0f} MiB"


@contextmanager
def running(command: Sequence[str]) -> Iterator[Server]:
    """A server that ``command`` starts; it is ended by SIGTERM, and its status is judged."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryFile() as said:
        started = subprocess.Popen([*command, "--port", str(port)], stdout=said, stderr=subprocess.STDOUT)
        server = Server(f"http://127.0.0.1:{port}", psutil.Process(started.pid))
        try:
            while not _is_ready(server.url) and started.poll() is None:
                time.sleep(0.2)
            if started.poll() is None:
                yield server
        finally:
            started.send_signal(signal.SIGTERM)
            try:
                status = started.wait(_END_S)
            except subprocess.TimeoutExpired:
                started.kill()
                status = started.wait()
            said.seek(0)
            lines = said.read().decode(errors="replace").splitlines()
            print("\n".join(lines[-20:]))
            if status != 0:
                server.faults.append(f"the server ended with status {status}")
            if any("Traceback" in line for line in lines):
                server.faults.append("the server has printed a traceback")


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def main() -> int:
    """Start the server, soak it, and say what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--parallel", type=int, default=4, help="answers at a time")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    # copies of conversations fill 32 MiB in the first minute; what they may take is no leak
    size = ["-np", str(asked.parallel), "-c", "2048", "--cache-ram", "32", "--queue", "16"]
    exact = ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"]
    command = [sys.executable, "-m", "ggufmoe", "serve", str(asked.model), *size, *exact, "--chat-template", "chatml"]
    with running(command) as server:
        soak(server, asked.minutes, asked.clients, asked.seed)
    for act, n in sorted(server.counts.items()):
        print(f"{n:8} {act}")
    faults = Counter(server.faults)
    for fault, n in faults.most_common(20):
        print(f"WRONG ({n} times): {fault}")
    print("nothing was wrong" if not faults else f"{sum(faults.values())} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
