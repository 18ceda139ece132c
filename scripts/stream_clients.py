"""Clients that read streams of a server with OpenAI's interface, as a process of their own for measurements.

Reads one JSON object a line: the server's ``port``, the ``path`` and ``clients``, a list of request bodies for each
client. All clients begin at once; each sends its requests one after another, each over a new connection, because
llama-server closes one after a stream. Writes one JSON object a line: ``seconds`` from the first request to the last
end, and ``answers`` (``Answer``). While streams come only the time of each packet is noted, so that the clients take
little of a processor that they share with the server.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

_END = b"0\r\n\r\n"
_DONE = b"[DONE]"


@dataclass(frozen=True)
class Answer:
    """One stream: its text, numbers of tokens, seconds until the first text, and those between two events with text."""

    text: str
    n_tokens: int
    n_cached: int
    first_s: float
    between_s: list[float]


class _Connection(asyncio.Protocol):
    """Sends ``request`` and notes packets with the time when they came; ``ended`` once the stream has ended."""

    def __init__(self, request: bytes) -> None:
        self.packets: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.packets.append((time.perf_counter(), data))
        self._tail = (self._tail + data)[-64:]
        if self._tail.endswith(_END) and _DONE in self._tail:
            self.ended.set_result(None)
        elif len(self.packets) == 1 and b" 200 " not in data[:16]:
            self.ended.set_exception(RuntimeError(f"the server refused: {data.decode('utf-8', 'replace')}"))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or RuntimeError("the server closed the connection within a stream"))


def events(packets: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The objects of a response in chunks with server-sent events, each with the time when its end came."""
    raw = b"".join(data for _, data in packets)
    ends, n_bytes = [], 0
    for _, data in packets:
        n_bytes += len(data)
        ends.append(n_bytes)
    place, held = raw.index(b"\r\n\r\n") + 4, b""
    while place < len(raw):
        begin = raw.index(b"\r\n", place) + 2
        end = begin + int(raw[place : begin - 2], 16)
        *whole, held = (held + raw[begin:end]).split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: {"):
                yield packets[bisect.bisect_left(ends, end)][0], json.loads(event[6:])
        place = end + 2


def read_answer(sent_at: float, packets: Sequence[tuple[float, bytes]]) -> Answer:
    """What came in answer to a request that was sent at ``sent_at``."""
    texts, times = [], []
    usage: dict[str, Any] = {}
    for at, content in events(packets):
        if "error" in content:
            raise RuntimeError(f"the server failed: {content['error']}")
        usage = content.get("usage") or usage
        for choice in content["choices"]:
            if text := choice["text"] if "text" in choice else choice["delta"].get("content"):
                texts.append(text)
                times.append(at)
    between = [later - earlier for earlier, later in itertools.pairwise(times)]
    n_cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    first_s = times[0] - sent_at if times else 0.0
    return Answer("".join(texts), usage["completion_tokens"], n_cached, first_s, between)


async def measure(port: int, path: str, clients: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Send all requests, and give ``seconds`` and ``answers``."""
    loop = asyncio.get_running_loop()

    async def one(requests: Sequence[bytes]) -> list[tuple[float, list[tuple[float, bytes]]]]:
        streams = []
        for request in requests:
            sent_at = time.perf_counter()
            transport, connection = await loop.create_connection(partial(_Connection, request), "127.0.0.1", port)
            await connection.ended
            transport.abort()
            streams.append((sent_at, connection.packets))
        return streams

    requests = [[_request(port, path, body) for body in bodies] for bodies in clients]
    began = time.perf_counter()
    streams = await asyncio.gather(*map(one, requests))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "answers": [asdict(read_answer(*stream)) for done in streams for stream in done]}


def _request(port: int, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(asyncio.run(measure(**json.loads(line)))), flush=True)
