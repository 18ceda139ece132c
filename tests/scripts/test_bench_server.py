"""scripts/bench_server: it measures two servers in turn, and reads their streams wherever packets cut them."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.scripted import Scripted

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ENDS = {f"<0x{ord(letter):02X}>": " a" for letter in string.ascii_lowercase}
"""The prompts end in words."""
FAKE = '''"""Answers every request with three tokens, as llama-server frames them."""
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (asked["max_tokens"], asked["temperature"]) == (3, 0)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        usage = {"choices": [], "usage": {"completion_tokens": 3}}
        for content in [*({"choices": [{"text": text}]} for text in (" a", " b", " c")), usage]:
            self.chunk("data: " + json.dumps(content))
        self.chunk("data: [DONE]")
        self.wfile.write(b"0\\r\\n\\r\\n")
    def chunk(self, line):
        data = line.encode() + b"\\n\\n"
        self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(data), data))
assert sys.argv[sys.argv.index("--parallel") + 1] == "2"
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
'''


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that reads streams."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("stream_clients")


def test_both_servers_are_measured_with_each_number_of_clients(
    write_model: Callable[[Scripted], Path], tmp_path: Path
) -> None:
    model = write_model(Scripted({**ENDS, " a": " b", " b": " a"}))
    server = tmp_path / "server.py"
    server.write_text(FAKE, encoding="utf-8")
    fake = tmp_path / "llama-server"  # a line "#!" has no room for every path
    fake.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(server))} "$@"\n', encoding="utf-8"
    )
    fake.chmod(0o755)
    flags = ["--clients", "1,2", "--requests", "1", "--rounds", "1", "-n", "3", "-p", "4", "-t", "1", "-c", "256"]
    command = [sys.executable, str(SCRIPTS / "bench_server.py"), str(model), "--llama-server", str(fake), *flags]
    environment = {**os.environ, "NO_PROXY": "*"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[:2] for row in rows[2:]] == [
        [number, name] for number in ("1", "2") for name in ("ggufmoe", "llama-server")
    ]
    for row in rows[2:]:
        assert float(row[2]) > 0
        assert float(row[7]) > 0
        assert (row[3] == "") == (row[1] == "ggufmoe")
    assert "of 3 answers of ggufmoe have the text of those of llama-server" in done.stdout


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_streams_are_read_however_they_are_cut(size: int, clients: Any) -> None:
    contents = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": " Zürich"}}], "usage": None},
        {"choices": [{"delta": {"content": "\n\n"}}]},
        {"choices": [], "usage": {"completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}},
    ]
    body = b"".join(b"data: " + json.dumps(one, ensure_ascii=False).encode() + b"\n\n" for one in contents)
    parts = [body[begin : begin + 50] for begin in range(0, len(body), 50)]
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw += b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b"data: [DONE]\n\n", b""])
    packets = [(float(begin), raw[begin : begin + size]) for begin in range(0, len(raw), size)]
    answer = clients.read_answer(-1.0, packets)
    assert (answer.text, answer.n_tokens, answer.n_cached) == (" Zürich\n\n", 2, 1)
    found = [at for at, _ in clients.events(packets)]
    assert found == sorted(found)
    assert answer.first_s == found[1] + 1
    assert answer.between_s == [found[2] - found[1]]


def test_an_error_in_a_stream_is_told(clients: Any) -> None:
    raw = b'HTTP/1.1 200 OK\r\n\r\n20\r\ndata: {"error": "out of room"}\n\n\r\n0\r\n\r\n'
    with pytest.raises(RuntimeError, match="out of room"):
        clients.read_answer(0.0, [(1.0, raw)])
