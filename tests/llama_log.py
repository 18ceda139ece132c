"""llama.cpp's log in the hands of a test, and given back: a process has one, and the engine listens to it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def llama_log_to(receive: Callable[[str], object]) -> Iterator[None]:
    """While this lasts every piece of llama.cpp's log goes to ``receive`` and nowhere else."""
    from llama_cpp import llama_cpp as lib

    previous, user_data = lib.llama_log_callback(), ctypes.c_void_p()
    lib.llama_log_get(ctypes.byref(previous), ctypes.byref(user_data))

    def pass_on(_level: int, text: bytes, _user_data: object) -> None:
        receive(text.decode("utf-8", "replace"))

    callback = lib.llama_log_callback(pass_on)
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield
    finally:
        lib.llama_log_set(previous, user_data)
