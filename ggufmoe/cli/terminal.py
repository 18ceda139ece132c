"""What the verbs that talk to a person share: streaming that Ctrl-C can stop, the line of speeds, the state folder."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import typer

from ggufmoe.runtime.events import CancelFlag, Event, Finished, Timing

ItemT = TypeVar("ItemT")


def interruptible(start: Callable[[CancelFlag], Iterator[ItemT]]) -> Iterator[ItemT]:
    """The events of ``start(cancel)``, or what else comes step by step, computed in another thread.

    So Ctrl-C is noticed while llama.cpp computes. The first one sets ``cancel``, after which the events end by
    themselves; another one raises KeyboardInterrupt. What ``start`` raises is raised here.
    """
    cancel = threading.Event()
    # short, so that the answer does not run far ahead of what is shown
    inbox: queue.Queue[ItemT | Exception | None] = queue.Queue(maxsize=4)

    def work() -> None:
        try:
            for event in start(cancel):
                inbox.put(event)
            inbox.put(None)
        except Exception as error:  # for the thread that waits
            inbox.put(error)

    worker = threading.Thread(target=work, name="ggufmoe-generate", daemon=True)
    with _interrupt_sets(cancel):
        worker.start()
        try:
            while (item := _take(inbox)) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            cancel.set()
            while worker.is_alive():
                _discard(inbox)
                worker.join(0.01)


def _discard(inbox: queue.Queue[Any]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            inbox.get_nowait()


def _take(inbox: queue.Queue[Any]) -> Any:
    while True:
        # with a time limit, because Windows notices Ctrl-C only between waits
        with contextlib.suppress(queue.Empty):
            return inbox.get(timeout=0.2)


@contextlib.contextmanager
def _interrupt_sets(cancel: threading.Event) -> Iterator[None]:
    def interrupt(*_: object) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def write_answer(events: Iterator[Event]) -> Finished:
    """Stream the text of ``events`` to stdout and end the line; gives the last event."""
    text, last = "", None
    for event in events:
        if event.text:
            text = event.text
            sys.stdout.write(text)
            sys.stdout.flush()
        last = event
    if not text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    assert isinstance(last, Finished), "events end with Finished"
    return last


def speeds(timing: Timing) -> str:
    """One line: how many tokens, and how many a second, of the prompt and of the answer."""
    computed = timing.prompt_tokens - timing.cached_tokens
    reused = f" ({timing.cached_tokens} reused)" if timing.cached_tokens else ""
    return (
        f"prompt: {computed} tokens{reused}, {timing.prompt_tokens_per_s:.1f} tok/s; "
        f"answer: {timing.generated_tokens} tokens, {timing.generated_tokens_per_s:.1f} tok/s"
    )


def note(line: str) -> None:
    """A line for the person, on stderr."""
    typer.echo(line, err=True)


def state_directory() -> Path:
    """Where this system wants programs to keep what they remember, for example the history of lines."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return base / "ggufmoe"
