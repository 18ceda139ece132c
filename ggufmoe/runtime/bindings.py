"""The low-level bindings of llama.cpp, loaded on first use, and llama.cpp's log, of which a process has one."""

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
    """The module ``llama_cpp.llama_cpp``, or what stands in for it; log lines and aborts come to ggufmoe.

    Raises EngineMissingError if there is no engine.
    """
    native.library()
    api = native.found_library().api
    native_log().attach(api)
    abort_watch().attach()
    api.llama_backend_init()
    return api
