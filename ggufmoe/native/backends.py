"""The devices that ggml has registered in this process: their kinds, memory and buffers, and what this CPU can do."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum

from ggufmoe.native.library import backend_function, library
from ggufmoe.native.wording import CPU_BACKEND

_VOID = ctypes.c_void_p
_SIZE = ctypes.c_size_t


class DeviceType(IntEnum):
    """``enum ggml_backend_dev_type``."""

    CPU = 0
    GPU = 1
    IGPU = 2
    ACCEL = 3
    META = 4


@dataclass(frozen=True)
class Device:
    """A device that ggml has registered in this process; ``handle`` is its ``ggml_backend_dev_t``."""

    handle: int
    name: str
    type: DeviceType
    backend: str


def devices() -> tuple[Device, ...]:
    """All devices of ggml's registry, in its order (RPC servers that were registered included)."""
    return tuple(_device(library().ggml_backend_dev_get(i)) for i in range(library().ggml_backend_dev_count()))


def _device(handle: int) -> Device:
    lib = library()
    backend = lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(handle)).decode()
    name = lib.ggml_backend_dev_name(handle).decode()
    return Device(handle, name, DeviceType(lib.ggml_backend_dev_type(handle)), backend)


class _DeviceProps(ctypes.Structure):
    """``struct ggml_backend_dev_props`` (ggml-backend.h) at the pinned commit; the last five are its ``caps``."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", _SIZE),
        ("memory_total", _SIZE),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("is_async", ctypes.c_bool),
        ("host_buffer", ctypes.c_bool),
        ("buffer_from_host_ptr", ctypes.c_bool),
        ("events", ctypes.c_bool),
        ("mmap_support", ctypes.c_bool),
    )


@dataclass(frozen=True)
class BufferType:
    """A kind of memory that weights can lie in; ``handle`` is its ``ggml_backend_buffer_type_t``."""

    handle: int
    name: str
    alignment: int


@dataclass(frozen=True)
class DeviceFacts:
    """What a device reports. ``host_buffer`` is main memory that the device can read by itself, if there is such.

    ``maps_files``: the device computes with weights in a mapped file without copying them (Metal, the CPU).
    """

    description: str
    free_bytes: int
    total_bytes: int
    buffer: BufferType
    host_buffer: BufferType | None
    maps_files: bool
    supports_mmap: bool


def device_facts(device: Device) -> DeviceFacts:
    """Memory and buffers of a device. For a worker's device this waits for the network, without a limit."""
    lib, props = library(), _DeviceProps()
    lib.ggml_backend_dev_get_props(device.handle, ctypes.addressof(props))
    host = lib.ggml_backend_dev_host_buffer_type(device.handle)
    return DeviceFacts(
        (props.description or b"").decode("utf-8", "replace"),
        props.memory_free,
        props.memory_total,
        _buffer_type(lib.ggml_backend_dev_buffer_type(device.handle)),
        _buffer_type(host) if host else None,
        props.buffer_from_host_ptr,
        props.mmap_support,
    )


def _buffer_type(handle: int) -> BufferType:
    lib = library()
    name = lib.ggml_backend_buft_name(handle).decode("utf-8", "replace")
    return BufferType(handle, name, lib.ggml_backend_buft_get_alignment(handle))


class _Feature(ctypes.Structure):
    """``struct ggml_backend_feature`` (ggml-backend.h): a name and a value, ``{"AVX2", "1"}``."""

    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_char_p))


def cpu_has(feature: str) -> bool:
    """Whether ggml's CPU backend was built for a feature (``AVX2``, ``NEON``, ``DOTPROD``) and this CPU has it."""
    address = backend_function(CPU_BACKEND, "ggml_backend_get_features")
    if address is None:
        return False
    # struct ggml_backend_feature * ggml_backend_get_features(ggml_backend_reg_t); ends with a name that is NULL
    entry = ctypes.CFUNCTYPE(_VOID, _VOID)(address)(library().ggml_backend_reg_by_name(CPU_BACKEND.encode()))
    while entry and (found := _Feature.from_address(entry)).name:
        if found.name.decode() == feature:
            return bool(found.value == b"1")
        entry += ctypes.sizeof(_Feature)
    return False


def has_broken_amx() -> bool:
    """Whether this engine was compiled with AMX, whose matrix code ends the process when GCC compiled it.

    llama.cpp#20824 and #26954; open at commit 0c1e57098. The code runs only for weights in the CPU's extra buffers.
    """
    return cpu_has("AMX_INT8")
