"""llama.cpp's RPC: using the devices of other machines, and serving the devices of this one.

Only engines that were built with RPC have these functions.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

from ggufmoe.errors import EngineError
from ggufmoe.native.backends import Device
from ggufmoe.native.library import backend_function, library
from ggufmoe.native.wording import RPC_BACKEND

_VOID = ctypes.c_void_p
_SIZE = ctypes.c_size_t

_PROTOTYPES: dict[str, Any] = {
    # ggml_backend_reg_t ggml_backend_rpc_add_server(const char * endpoint); NULL for a worker without devices
    "ggml_backend_rpc_add_server": ctypes.CFUNCTYPE(_VOID, ctypes.c_char_p),
    # void ggml_backend_rpc_start_server(const char * endpoint, const char * cache_dir, size_t n_threads,
    #                                    size_t n_devices, ggml_backend_dev_t * devices)
    "ggml_backend_rpc_start_server": ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, _SIZE, _SIZE, _VOID),
}
"""What only an engine has that was built with RPC."""


def has_rpc() -> bool:
    """Whether the engine was built with RPC. Raises EngineMissingError."""
    return backend_function(RPC_BACKEND, "ggml_backend_rpc_add_server") is not None


def rpc_function(name: str) -> Any:
    """One of llama.cpp's RPC functions by name. Raises EngineError for an engine that was built without RPC."""
    address = backend_function(RPC_BACKEND, name)
    if address is None:
        raise EngineError(
            "this llama-cpp-python was built without RPC and cannot use other machines: install it again with "
            'CMAKE_ARGS="-DGGML_RPC=ON", as vendor/README.md describes'
        )
    return _PROTOTYPES[name](address)


def register_rpc_server(endpoint: str) -> None:
    """Register the devices of the worker at ``endpoint`` (IPv4:PORT) in this process; they stay until it ends.

    ggml ends the process if the worker cannot be reached, and waits without a limit for one that is silent.
    Raises EngineError.
    """
    add = rpc_function("ggml_backend_rpc_add_server")
    registry = add(endpoint.encode())
    if not registry:
        raise EngineError(f"the worker at {endpoint} has no devices")
    library().ggml_backend_register(registry)


def start_rpc_server(endpoint: str, cache_dir: str | None, n_threads: int, served: Sequence[Device]) -> None:
    """Serve devices at ``endpoint`` (IPv4:PORT), one client after the other; returns only when serving fails.

    ggml prints its progress to stdout. Raises EngineError for an engine that was built without RPC.
    """
    start = rpc_function("ggml_backend_rpc_start_server")
    handles = (_VOID * len(served))(*(device.handle for device in served))
    start(endpoint.encode(), os.fsencode(cache_dir) if cache_dir else None, n_threads, len(handles), handles)
