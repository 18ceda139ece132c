"""``ggufmoe serve``: one model for programs that speak OpenAI's HTTP interface."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
import time
from typing import Annotated

import typer

from ggufmoe.cli.console import note
from ggufmoe.cli.jobs import Interrupt
from ggufmoe.cli.params import ModelName, with_options
from ggufmoe.cli.wanted_model import model_file
from ggufmoe.engine import Engine
from ggufmoe.errors import Cancelled, InputError
from ggufmoe.options import ModelOptions, OffloadOptions, ServeContextOptions, ServerOptions
from ggufmoe.work import OnProgress

_TURN_S = 0.0005
"""How long a thread of Python may go on while others wait for their turn; Python's own value is 5 ms.

After each batch the thread that runs llama.cpp waits for the event loop, which sends the tokens of the batch before."""

ChatTemplateFile = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        help="Chat template: a name stored in the model, chatml, llama3, mistral, or a file; default: the model's own.",
        metavar="NAME|FILE",
    ),
]


@with_options(ServerOptions, ModelOptions, ServeContextOptions, OffloadOptions)
def serve_command(
    model: ModelName,
    *,
    server: ServerOptions,
    wanted: ModelOptions,
    chat_template: ChatTemplateFile = None,
    context: ServeContextOptions,
    offload: OffloadOptions,
) -> None:
    """Answer programs that speak OpenAI's HTTP interface, until Ctrl-C. Needs the extra 'server'."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} must be installed for 'serve': pip install \"ggufmoe[server]\" "
            '(in a checkout: pip install ".[server]")'
        )
    from ggufmoe.server.modelhost import ModelHost
    from ggufmoe.server.serving import GRACE_S, HttpServer

    path = model_file(model, wanted)

    def load(on_progress: OnProgress, cancel: threading.Event) -> Engine:
        return Engine(path, context, offload, on_progress=on_progress, cancel=cancel)

    name = server.alias or path.name.removesuffix(".gguf")
    http = HttpServer(ModelHost(load, chat_template), name, server)
    note(
        f"serving {name} at {http.url}/v1; a chat is at {http.url}/; "
        f"Ctrl-C ends it, and running answers within {GRACE_S} s"
    )
    if server.no_api_key:
        note("warning: everyone who can reach this address can use the model")
    sys.setswitchinterval(_TURN_S)
    interrupt, began = Interrupt(gentle=True), time.monotonic()
    with interrupt.handled(), contextlib.suppress(Cancelled):
        http.run(interrupt, lambda: note(f"the model is loaded, {time.monotonic() - began:.1f} s"))
    if sys.stderr.isatty():
        note("")  # ends the line in which the terminal shows ^C
