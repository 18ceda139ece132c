"""Servers that tests talk to: real sockets in this process, over scripted models."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from ggufmoe import Engine
from ggufmoe.options import ContextOptions, ServerOptions
from ggufmoe.server.modelhost import Load, ModelHost
from ggufmoe.server.serving import HttpServer
from ggufmoe.work import OnProgress
from tests.scripted import Scripted
from tests.stories import ONE_THREAD

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    '{% for call in m.tool_calls or [] %}<call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</call>{% endfor %}{% endfor %}'
    "{% for tool in tools or [] %}[tool:{{ tool.function.name }}]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ ending or '' }}"
    "{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
TALKER = Scripted(
    {
        "[assistant]": " Hello",
        " Hello": " there",
        "<think>": " Hm",
        " Hm": "</think>",
        "</think>": " Hello",
        " on": " on",
        " call": "<call>",
        "<call>": '{"name": "weather", "arg',
        '{"name": "weather", "arg': 'uments": {"city": "Ro',
        'uments": {"city": "Ro': 'me"}}',
        'me"}}': "</call>",
        " again": "<call>",
        " dice": {" one": 20.0, " two": 20.0},
    },
    pieces=["[user]", "[system]", "[tool]", "[tool:weather]", "[tool:clock]", " hello"],
    controls=["<think>", "</think>", "<call>", "</call>"],
    chat_template=TEMPLATE,
    n_ctx_train=256,
)
"""Says " Hello there"; with ``ending``: " on" for ever, a call after " call", a throw of dice; thinks if told to."""
PLAIN = Scripted(
    {"[assistant]": " Hi", '{"name": "clock", "arguments": {}}': "</s>", " go": '{"name": "clock", "arguments": {}}'},
    pieces=["[user]", "[system]", " hello"],
    chat_template="{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]{{ ending or '' }}",
)
"""A model whose template knows no tools."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Oslo", "Bern"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
HELLO = [{"role": "user", "content": " hello"}]


def loading(path: Path, context: ContextOptions = ONE_THREAD) -> Load:
    """Loads the model at ``path``."""

    def load(on_progress: OnProgress, cancel: threading.Event) -> Engine:
        return Engine(path, context, on_progress=on_progress, cancel=cancel)

    return load


@contextmanager
def serving(
    load: Load, options: ServerOptions | None = None, *, wait: bool = True, idle_s: float = 30
) -> Iterator[tuple[httpx.Client, ModelHost]]:
    """A client of a server in a thread, and what the server holds; the model is loaded with ``wait``."""
    host, stop, loaded = ModelHost(load), threading.Event(), threading.Event()
    server = HttpServer(host, "talker", options or ServerOptions(port=0), grace_s=0.3, idle_s=idle_s)
    thread = threading.Thread(target=server.run, args=(stop, loaded.set))
    thread.start()
    try:
        assert not wait or loaded.wait(20)
        with httpx.Client(base_url=server.url, timeout=100, trust_env=False) as client:
            yield client, host
    finally:
        stop.set()
        thread.join()
