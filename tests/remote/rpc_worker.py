"""Run in a process of its own: llama.cpp's RPC worker with this machine's CPU, at the endpoint given."""

from __future__ import annotations

import sys

from ggufmoe.native import backends, rpc_calls

if __name__ == "__main__":
    rpc_calls.start_rpc_server(sys.argv[1], None, 1, backends.devices()[:1])
