"""Texts of llama.cpp that decisions depend on: log lines, aborts, names of backends, buffers and graph nodes.

They are those of the pinned commit (0c1e57098); the tests compare every one with the installed engine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# ---- where a load has put things

PLACEMENT_LINES = re.compile(r"buffer size = |buffer type overridden to |: offloaded \d+/\d+ layers")
"""The log lines that ``buffer_size``, ``overridden_tensor`` and ``offloaded_layers`` read."""
SIZE_STEP_BYTES = 0.005 * 2**20
"""Sizes are logged in MiB with two decimals: by so much they may be wrong."""

_BUFFER = re.compile(r": +(?P<name>\S+) +(?P<content>model|KV|RS|compute) buffer size = +(?P<mib>[\d.]+) MiB")
_OVERRIDDEN = re.compile(r"tensor (\S+) .*buffer type overridden to (\S+)")
_OFFLOADED = re.compile(r": offloaded (\d+)/\d+ layers")

Content = Literal["model", "KV", "RS", "compute"]
"""What a buffer is for: weights, keys and values, recurrent states, or intermediate results."""


@dataclass(frozen=True)
class BufferSize:
    """A buffer that llama.cpp has allocated, or a range of a file that it has mapped."""

    name: str
    content: Content
    n_bytes: int


def buffer_size(line: str) -> BufferSize | None:
    """Name, content and size of the buffer in a log line about one; None for other lines."""
    found = _BUFFER.search(line)
    if found is None:
        return None
    content: Content = found["content"]  # type: ignore[assignment]  # one of them by the pattern
    return BufferSize(found["name"], content, round(float(found["mib"]) * 2**20))


def overridden_tensor(line: str) -> tuple[str, str] | None:
    """Name of the tensor, and of its buffer, in a log line about an override; None for other lines."""
    found = _OVERRIDDEN.search(line)
    return (found[1], found[2]) if found else None


def offloaded_layers(line: str) -> int | None:
    """Number of layers on GPUs, the output included, in the log line about it; None for other lines."""
    found = _OFFLOADED.search(line)
    return int(found[1]) if found else None


# ---- names of backends and buffers

CPU_BACKEND = "CPU"
RPC_BACKEND = "RPC"


def mapped_buffer(buffer: str) -> str:
    """Name in the log of the mapped range of a file that takes the place of a buffer."""
    return f"{buffer}_Mapped"


def repack_buffer(buffer: str) -> str:
    """Name of the buffer for weights that the CPU's backend rearranges for its vector units."""
    return f"{buffer}_REPACK"


def is_repack_buffer(buffer: str) -> bool:
    """Whether weights in this buffer are a rearranged copy."""
    return buffer.endswith("_REPACK")


def rpc_device(number: int) -> str:
    """Name of a worker's device; devices are numbered over all workers."""
    return f"RPC{number}"


def rpc_buffer(index: int, endpoint: str) -> str:
    """Name of the buffer of a worker's device; ``index`` counts the devices of this worker."""
    return f"RPC{index}[{endpoint}]"


# ---- names in graphs

ROUTING_NODES = ("probs", "topk", "weights", "weights_softmax", "weights_norm", "weights_scaled")
"""Steps of a router. Experts' outputs are multiplied by the last of the weights that a model's graph computes."""

ROUTING_PREFIX = b"ffn_moe_"
"""What the names of all nodes of a router and its experts begin with."""
_ROUTING_NODE = re.compile(ROUTING_PREFIX + rb"(%s)-(\d+)" % "|".join(ROUTING_NODES).encode())
_COPY = re.compile(r"[^#]*#([^#]*)(?:#.*)?")


def routing_node(name: bytes) -> tuple[str, int] | None:
    """Step and layer of a router's node in a graph (``ffn_moe_topk-3``); None for other nodes. Cheap for those."""
    if not name.startswith(ROUTING_PREFIX):
        return None
    found = _ROUTING_NODE.fullmatch(name)
    return (found[1].decode(), int(found[2])) if found else None


def weight_of_copy(name: str) -> str:
    """The weight's name for a graph tensor's name: ``blk.0.attn_k.weight`` of ``CUDA0#blk.0.attn_k.weight#0``.

    The scheduler names its copies DEVICE#NAME#NUMBER; any other name is returned as it is.
    """
    found = _COPY.fullmatch(name)
    return found[1] if found else name


# ---- what went wrong

_VAGUE = ("failed to load model",)
"""Ends of error lines that follow a line with the cause."""
_SOURCE_LINE = re.compile(r"\.(?:c|cc|cpp|cu|h|hpp|m|mm):\d+: (.+)$")


def is_vague(error: str) -> bool:
    """Whether an error line only repeats that something went wrong."""
    return error.endswith(_VAGUE)


def without_function(line: str) -> str:
    """A log line without the name of a C++ function at its beginning."""
    function, separator, message = line.partition(": ")
    return message.strip() if separator and function.replace("_", "").replace(":", "").isalnum() else line


def lacks_pinned_memory(error: str) -> bool:
    """Whether a load failed to allocate memory that a GPU reads by itself (``CUDA_Host``), which is optional."""
    return "_Host buffer" in error


def abort_message(line: str) -> str:
    """The message in a line of stderr about an abort or a failed assertion; empty for other lines."""
    found = _SOURCE_LINE.search(line)
    return found[1] if found else ""


def is_worker_abort(message: str) -> bool:
    """Whether the message of an abort says that a worker was lost, or could not be reached."""
    return "RPC" in message or "Failed to connect" in message


def is_refusal(error: str) -> bool:
    """Whether the text of a ValueError of llama-cpp-python says that llama.cpp made no model or context."""
    return error.startswith("Failed to ")
