"""Run in a process of its own: llama.cpp's RPC worker with this machine's CPU, at the endpoint given."""

from __future__ import annotations

import ctypes
import sys

from ggufmoe.native import backends
from ggufmoe.native import library as native


def serve(endpoint: str) -> None:
    function = native.library().ggml_backend_rpc_start_server
    function.restype = None
    function.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p)
    handles = [device.handle for device in backends.devices()][:1]
    function(endpoint.encode(), None, 1, len(handles), (ctypes.c_void_p * len(handles))(*handles))


if __name__ == "__main__":
    serve(sys.argv[1])
