"""Ctrl-C while something runs."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Press Ctrl-C after some seconds, unless the block has ended by then."""
    timer = threading.Timer(seconds, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def interrupting(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, whose first call presses Ctrl-C and goes on."""
    presses = iter([signal.SIGINT])

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for press in presses:
            signal.raise_signal(press)
        return function(*args, **kwargs)

    return call
