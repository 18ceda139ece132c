"""What the verbs that run a model share: loading it, streaming an answer, the line of speeds."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from ggufmoe.cli.answer import write_answer
from ggufmoe.cli.console import StatusLine
from ggufmoe.cli.jobs import interruptible
from ggufmoe.cli.progress import ProgressLine
from ggufmoe.engine import Engine
from ggufmoe.errors import OptionError
from ggufmoe.folders import user_cache_directory
from ggufmoe.options import ContextOptions, OffloadOptions, PromptOptions, SamplingOptions, TemplateOptions
from ggufmoe.runtime.chat import Chat
from ggufmoe.runtime.events import ChatEvent, Finished, Timing
from ggufmoe.sizes import counted
from ggufmoe.work import CancelFlag

_UNSEEN_S = 0.5
"""Work that takes less is not shown."""


def load_engine(model: Path, context: ContextOptions, offload: OffloadOptions) -> Engine:
    """Load a model; a terminal shows how far the loading is."""
    with ProgressLine(f"loading {model.name}", phase="load", waiting="") as line:
        return Engine(model, context, offload, on_progress=line.update)


def waiting_shown(events: Iterator[ChatEvent]) -> Iterator[ChatEvent]:
    """Yield ``events`` and close them at the end; a terminal shows the seconds until the first one comes."""
    line, began, has_come = StatusLine(sys.stderr), time.monotonic(), threading.Event()

    def show() -> None:
        wait_s = _UNSEEN_S
        while not has_come.wait(wait_s):
            line.show(f"reading the prompt, {time.monotonic() - began:.0f} s")
            wait_s = 1.0

    watcher = threading.Thread(target=show, name="ggufmoe-waiting", daemon=True)
    watcher.start()
    try:
        first = next(events, None)
    finally:
        has_come.set()
        watcher.join()
        line.clear()
    try:
        if first is not None:
            yield first
        yield from events
    finally:
        if isinstance(events, Generator):
            events.close()


def make_chat(engine: Engine, asking: PromptOptions, variables: TemplateOptions, sampling: SamplingOptions) -> Chat:
    """A conversation with the system message, template, variables and sampling of the flags."""
    return Chat(
        engine, system=asking.system_prompt, template=asking.chat_template, sampling=sampling, variables=variables
    )


def stream_answer(
    start: Callable[[CancelFlag], Iterator[ChatEvent]], before: str = "", *, show_reasoning: bool | None = None
) -> Finished:
    """Write the answer that ``start(cancel)`` gives as it comes (``write_answer``); return the last event.

    Ctrl-C ends the answer. An error in the prompt is raised before anything is written.
    """
    events = waiting_shown(interruptible(start))
    first = next(events)
    return write_answer(itertools.chain((first,), events), before, show_reasoning=show_reasoning)


def why_ended(last: Finished, full: str, length: str = "--n-predict") -> str | None:
    """A line on why an answer was cut off, or None.

    ``full`` says what to do about a full context, ``length`` about the limit of new tokens.
    """
    if last.reason == "length":
        return f"(stopped at the limit of new tokens: {length})"
    if last.reason == "context":
        return f"(the context is full: {full})"
    return "(stopped)" if last.reason == "cancelled" else None


def speeds(timing: Timing) -> str:
    """One line for people: prompt tokens computed and reused, answer tokens, and tokens per second of both."""
    computed = timing.prompt_tokens - timing.cached_tokens
    reused = f" ({timing.cached_tokens} reused)" if timing.cached_tokens else ""
    prompt = f"prompt: {counted(computed, 'token')}{reused}{_speed(timing.prompt_tokens_per_s)}"
    return f"{prompt}; answer: {counted(timing.generated_tokens, 'token')}{_speed(timing.generated_tokens_per_s)}"


def _speed(tokens_per_s: float) -> str:
    """``, 12.3 tok/s``; empty where nothing was computed."""
    return f", {tokens_per_s:.1f} tok/s" if tokens_per_s else ""


def rpc_cache_directory() -> Path:
    """The folder in which llama.cpp's own RPC server caches tensors. Raises OptionError for a user without a home."""
    if given := os.environ.get("LLAMA_CACHE"):
        return Path(given) / "rpc"
    try:
        return user_cache_directory() / "llama.cpp" / "rpc"
    except RuntimeError as error:
        raise OptionError("--cache: this user has no home directory; name a folder in LLAMA_CACHE") from error
