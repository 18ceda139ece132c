"""llama-cpp-python's low-level bindings, loaded on first use, and llama.cpp's log, of which a process has one."""

from __future__ import annotations

from functools import cache
from typing import Any

from ggufmoe.native import library as native
from ggufmoe.native.aborts import abort_watch
from ggufmoe.native.log import NativeLog


@cache
def native_log() -> NativeLog:
    """The log of llama.cpp in this process."""
    return NativeLog()


@cache
def native_api() -> Any:
    """The module ``llama_cpp.llama_cpp``, initialized, with log lines and aborts redirected to ggufmoe.

    Raises EngineMissingError without llama-cpp-python.
    """
    native.library()
    from llama_cpp import llama_cpp

    native_log().attach(llama_cpp)
    abort_watch().attach()
    llama_cpp.llama_backend_init()
    return llama_cpp
