"""Judge servers by calls of OpenAI's client; prints what came of each call, and a table by group.

usage: openai_calls.py [MODEL] [--chat-template NAME] [--llama-server PROGRAM] [--only WORD]
       openai_calls.py --server NAME=URL [--server NAME=URL] [--only WORD]

``ggufmoe serve`` is started with MODEL, a GGUF file, or with a tiny model that says random words in ChatML, and so is
llama.cpp's server where a program is given. Each call is compared with what OpenAI's API reference documents. Answers
to one question are compared with each other: let MODEL's weights be F32, because kernels for other types round so much
that two tokens of nearly the same probability can change places. Exit code 1 when a call to the first server fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai_chat_calls
import openai_responses_calls
import openai_stream_calls
import openai_text_calls
import openai_tool_calls
from openai_asking import CALLS, Asking, Call, Outcome, Verdict, judge

from tests.scripted import Scripted

LISTED = (
    openai_chat_calls,
    openai_stream_calls,
    openai_tool_calls,
    openai_text_calls,
    openai_responses_calls,
)
"""The modules whose calls are made."""
_READY_S = 60.0
_N_CTX, _N_SLOTS = 8192, 4
_SAME = ["-np", str(_N_SLOTS), "--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"]
"""Flags of both servers; the last three keep rounding from choosing between two tokens that are equally likely."""
_TEMPLATE = """{%- if tools %}<|im_start|>system
You may call these functions: <tools>{{ tools | tojson }}</tools>
Write a call as <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def talkative() -> Scripted:
    """A model that says words without an end; which of them depends on all of the text before."""
    random, words = np.random.default_rng(5), [f" w{n}" for n in range(30)]
    controls = ["<|im_start|>", "<|im_end|>"]
    pieces = [*words, "system", "user", "assistant", "tool", "A", "is", " ", "<tool_call>", "</tool_call>"]
    everything = Scripted(pieces=pieces, controls=controls).vocab
    follows = {piece: dict(zip(words, random.normal(0, 9, len(words)).tolist(), strict=True)) for piece in everything}
    return Scripted(follows, controls=controls, chat_template=_TEMPLATE, n_ctx_train=8192, random_layers=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the calls and print what came of them."""
    asked = _parser().parse_args(arguments)
    calls = [one for one in CALLS if asked.only in f"{one.group}: {one.name}"]
    found: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as folder:
        asked.model = asked.model or talkative().write(Path(folder) / "talkative.gguf")
        for name, running in _servers(asked).items():
            with running as url:
                print(f"\n== {name}, {len(calls)} calls", flush=True)
                found[name] = list(_outcomes(calls, url))
    print()
    for line in table(calls, found):
        print(line)
    first = next(iter(found.values()))
    return int(not all(outcome.is_good for outcome in first))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="GGUF file of a chat model")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server")
    parser.add_argument("--chat-template", help="name of a chat template for both, such as chatml; the model's own")
    parser.add_argument("--server", action="append", default=[], metavar="NAME=URL", help="a server that runs")
    parser.add_argument("--only", default="", help="calls whose group and name contain this")
    return parser


def _servers(asked: argparse.Namespace) -> dict[str, contextlib.AbstractContextManager[str]]:
    if asked.server:
        pairs = [server.partition("=") for server in asked.server]
        return {name: contextlib.nullcontext(url.rstrip("/")) for name, _, url in pairs}
    same = [*_SAME, *(["--chat-template", asked.chat_template] if asked.chat_template else [])]
    ours = [sys.executable, "-m", "ggufmoe", "serve", str(asked.model), "-c", str(_N_CTX)]
    servers: dict[str, contextlib.AbstractContextManager[str]] = {"ggufmoe serve": started([*ours, *same])}
    if asked.llama_server is not None:
        theirs = [str(asked.llama_server), "-m", str(asked.model), "--jinja", "-c", str(_N_CTX * _N_SLOTS)]
        theirs += ["--embeddings", "--pooling", "mean"]  # without, it refuses embeddings
        servers["llama-server"] = started([*theirs, *same])  # it divides the context among its slots
    return servers


@contextmanager
def started(command: Sequence[str], *, timeout_s: float = _READY_S) -> Iterator[str]:
    """The URL of a server that ``command`` starts, once it is ready. It is ended with the block."""
    port = _free_port()
    with tempfile.TemporaryFile() as said, ExitStack() as stack:
        environment = {**os.environ, "NO_COLOR": "1"}
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=said, stderr=subprocess.STDOUT, env=environment
        )
        stack.callback(_end, process)
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + timeout_s
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > end:
                said.seek(0)
                raise SystemExit(f"{command[0]} does not answer:\n{said.read()[-4000:].decode(errors='replace')}")
            time.sleep(0.1)
        yield url


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _outcomes(calls: Sequence[Call], url: str) -> Iterator[Outcome]:
    model = httpx.get(f"{url}/v1/models", timeout=30, trust_env=False).json()["data"][0]["id"]
    asking = Asking(f"{url}/v1", model)
    try:
        for one in calls:
            outcome = judge(one, asking)
            print(f"{outcome.verdict:8} {one.group}: {one.name}" + (f"  [{outcome.what}]" if outcome.what else ""))
            yield outcome
    finally:
        asking.close()


def table(calls: Sequence[Call], found: dict[str, list[Outcome]]) -> Iterator[str]:
    """Lines of a table in Markdown: the calls of each group, and the numbers of each verdict for each server."""
    yield "| calls | number | " + " | ".join(found) + " |"
    yield "|---|---|" + "---|" * len(found)
    for group in [*dict.fromkeys(one.group for one in calls), ""]:
        cells = []
        for outcomes in found.values():
            kinds: Counter[Verdict] = Counter(
                outcome.verdict for one, outcome in zip(calls, outcomes, strict=True) if group in ("", one.group)
            )
            order: tuple[Verdict, ...] = ("ok", "refused", "wrong", "error")
            cells.append(", ".join(f"{kinds[kind]} {kind}" for kind in order if kinds[kind]))
        n_calls = sum(group in ("", one.group) for one in calls)
        yield f"| {group or 'all'} | {n_calls} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
