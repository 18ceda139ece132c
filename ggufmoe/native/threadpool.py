"""ggml's own threads, kept from one computation to the next, for engines that were built without OpenMP.

Those would start threads for each graph and end them again. llama.cpp's programs keep a pool as well. Source:
``ggml.h`` and ``ggml-cpu.h`` of commit 0c1e57098; the pool's functions may be in a library of their own.
"""

from __future__ import annotations

import ctypes
from typing import Any

from ggufmoe.native.backends import cpu_has
from ggufmoe.native.library import backend_function, library
from ggufmoe.native.wording import CPU_BACKEND

_VOID = ctypes.c_void_p
_MAX_THREADS = 512
"""GGML_MAX_N_THREADS"""


class _Params(ctypes.Structure):
    """``struct ggml_threadpool_params`` (ggml.h)."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * _MAX_THREADS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class ThreadPool:
    """Threads for the graphs of one context, the thread that computes among them. ``free`` it after the context."""

    def __init__(self, n_threads: int) -> None:
        params = _Params()
        library().ggml_threadpool_params_init(ctypes.addressof(params), n_threads)
        # struct ggml_threadpool * ggml_threadpool_new(struct ggml_threadpool_params * params)
        self._handle: int | None = _function("ggml_threadpool_new", _VOID)(ctypes.addressof(params))

    def attach(self, context: Any) -> None:
        """Let a ``llama_context *`` compute prompts and tokens with these threads."""
        library().llama_attach_threadpool(context, self._handle, self._handle)

    def free(self) -> None:
        """End the threads."""
        handle, self._handle = self._handle, None
        if handle:
            # void ggml_threadpool_free(struct ggml_threadpool * threadpool)
            _function("ggml_threadpool_free", None)(handle)


def thread_pool(n_threads: int) -> ThreadPool | None:
    """A pool, if there is more than one thread, and OpenMP does not keep threads itself."""
    if n_threads < 2 or cpu_has("OPENMP") or backend_function(CPU_BACKEND, "ggml_threadpool_new") is None:
        return None
    return ThreadPool(n_threads)


def _function(name: str, restype: Any) -> Any:
    return ctypes.CFUNCTYPE(restype, _VOID)(backend_function(CPU_BACKEND, name) or 0)
