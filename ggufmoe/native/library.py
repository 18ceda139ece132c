"""The floor: ctypes declarations of the ggml functions that llama-cpp-python does not bind.

Every symbol is looked up through libllama's own handle, which on POSIX also searches its dependencies; loading libggml
by its file would give a second instance with a registry of its own. Callers pass numpy arrays; this module checks their
layout and keeps them alive over the call. ctypes releases the GIL, so all of this scales over threads.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import EngineError, EngineMissingError
from ggufmoe.gguf.types import GGMLType

_VOID = ctypes.c_void_p
_I64 = ctypes.c_int64
_SIZE = ctypes.c_size_t

_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    # size_t ggml_quantize_chunk(enum ggml_type, const float * src, void * dst, int64_t start, int64_t nrows,
    #                            int64_t n_per_row, const float * imatrix)
    "ggml_quantize_chunk": (_SIZE, (ctypes.c_int, _VOID, _VOID, _I64, _I64, _I64, _VOID)),
    # bool ggml_quantize_requires_imatrix(enum ggml_type)
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, (ctypes.c_int,)),
    # bool ggml_validate_row_data(enum ggml_type, const void * data, size_t nbytes)
    "ggml_validate_row_data": (ctypes.c_bool, (ctypes.c_int, _VOID, _SIZE)),
    # int64_t ggml_blck_size(enum ggml_type); size_t ggml_type_size(enum ggml_type)
    "ggml_blck_size": (_I64, (ctypes.c_int,)),
    "ggml_type_size": (_SIZE, (ctypes.c_int,)),
    # void ggml_bf16_to_fp32_row(const ggml_bf16_t *, float *, int64_t); the other three alike
    "ggml_bf16_to_fp32_row": (None, (_VOID, _VOID, _I64)),
    "ggml_fp16_to_fp32_row": (None, (_VOID, _VOID, _I64)),
    "ggml_fp32_to_bf16_row": (None, (_VOID, _VOID, _I64)),
    "ggml_fp32_to_fp16_row": (None, (_VOID, _VOID, _I64)),
    # const struct ggml_type_traits * ggml_get_type_traits(enum ggml_type)
    "ggml_get_type_traits": (_VOID, (ctypes.c_int,)),
    # size_t ggml_backend_dev_count(void); ggml_backend_dev_t ggml_backend_dev_get(size_t index)
    "ggml_backend_dev_count": (_SIZE, ()),
    "ggml_backend_dev_get": (_VOID, (_SIZE,)),
    # const char * ggml_backend_dev_name(ggml_backend_dev_t); enum ggml_backend_dev_type ggml_backend_dev_type(...)
    "ggml_backend_dev_name": (ctypes.c_char_p, (_VOID,)),
    "ggml_backend_dev_type": (ctypes.c_int, (_VOID,)),
    # void ggml_backend_dev_get_props(ggml_backend_dev_t, struct ggml_backend_dev_props *)
    "ggml_backend_dev_get_props": (None, (_VOID, _VOID)),
    # ggml_backend_buffer_type_t ggml_backend_dev_buffer_type(ggml_backend_dev_t); ..._host_buffer_type: NULL if none
    "ggml_backend_dev_buffer_type": (_VOID, (_VOID,)),
    "ggml_backend_dev_host_buffer_type": (_VOID, (_VOID,)),
    # const char * ggml_backend_buft_name(ggml_backend_buffer_type_t); size_t ggml_backend_buft_get_alignment(...)
    "ggml_backend_buft_name": (ctypes.c_char_p, (_VOID,)),
    "ggml_backend_buft_get_alignment": (_SIZE, (_VOID,)),
    # ggml_backend_reg_t ggml_backend_dev_backend_reg(ggml_backend_dev_t); const char * ggml_backend_reg_name(...)
    "ggml_backend_dev_backend_reg": (_VOID, (_VOID,)),
    "ggml_backend_reg_name": (ctypes.c_char_p, (_VOID,)),
    # void ggml_backend_tensor_get(const struct ggml_tensor *, void * data, size_t offset, size_t size)
    "ggml_backend_tensor_get": (None, (_VOID, _VOID, _SIZE, _SIZE)),
    # size_t ggml_nbytes(const struct ggml_tensor *); void * ggml_get_data(const struct ggml_tensor *)
    "ggml_nbytes": (_SIZE, (_VOID,)),
    "ggml_get_data": (_VOID, (_VOID,)),
    # size_t ggml_tensor_overhead(void); const char * ggml_op_name(enum ggml_op)
    "ggml_tensor_overhead": (_SIZE, ()),
    "ggml_op_name": (ctypes.c_char_p, (ctypes.c_int,)),
    # bool ggml_backend_buffer_is_host(ggml_backend_buffer_t)
    "ggml_backend_buffer_is_host": (ctypes.c_bool, (_VOID,)),
    # const char * ggml_version(void); ggml_commit(void) alike; const char * llama_print_system_info(void)
    "ggml_version": (ctypes.c_char_p, ()),
    "ggml_commit": (ctypes.c_char_p, ()),
    "llama_print_system_info": (ctypes.c_char_p, ()),
}

_RPC_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    # ggml_backend_reg_t ggml_backend_rpc_add_server(const char * endpoint); NULL for a worker without devices
    "ggml_backend_rpc_add_server": (_VOID, (ctypes.c_char_p,)),
    # void ggml_backend_register(ggml_backend_reg_t)
    "ggml_backend_register": (None, (_VOID,)),
    # void ggml_backend_rpc_start_server(const char * endpoint, const char * cache_dir, size_t n_threads,
    #                                    size_t n_devices, ggml_backend_dev_t * devices)
    "ggml_backend_rpc_start_server": (None, (ctypes.c_char_p, ctypes.c_char_p, _SIZE, _SIZE, _VOID)),
}
"""What only an engine has that was built with RPC."""


@cache
def library() -> ctypes.CDLL:
    """libllama as llama-cpp-python loaded it, with the prototypes above.

    Raises EngineMissingError if llama-cpp-python is not installed or lacks one of the symbols.
    """
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineMissingError(
            f"llama-cpp-python cannot be loaded ({error}); install it as vendor/README.md describes"
        ) from error
    lib: ctypes.CDLL = llama_cpp._lib
    for name, (restype, argtypes) in _PROTOTYPES.items():
        try:
            function = getattr(lib, name)
        except AttributeError as error:
            raise EngineMissingError(f"this llama-cpp-python has no {name}; install the pinned version") from error
        function.restype, function.argtypes = restype, argtypes
    return lib


def has_symbol(name: str) -> bool:
    """Whether the installed engine exports ``name`` (``ggml_backend_rpc_add_server`` tells an RPC build)."""
    return hasattr(library(), name)


@dataclass(frozen=True)
class EngineVersion:
    """Which engine: the version of llama-cpp-python, the commit of llama.cpp inside it, the version of ggml."""

    package: str
    llama_cpp_commit: str
    ggml: str

    @property
    def is_pinned(self) -> bool:
        """Whether it is PINNED_ENGINE. A build outside of git knows no commit; then the versions decide."""
        commit = self.llama_cpp_commit.split("-")[0]  # builds from a source package add "-dirty"
        same_commit = commit == "unknown" or (bool(commit) and PINNED_ENGINE.llama_cpp_commit.startswith(commit))
        return same_commit and (self.package, self.ggml) == (PINNED_ENGINE.package, PINNED_ENGINE.ggml)


PINNED_ENGINE = EngineVersion("0.3.36", "0c1e57098bba43ac29e6e3b677cdceebdd22334f", "0.25.3")
"""The engine that ggufmoe is made for, as ``vendor/llama.cpp.toml`` says, which installed packages do not carry."""


def engine_version() -> EngineVersion:
    """The engine that is installed. Raises EngineMissingError."""
    lib = library()
    return EngineVersion(version("llama-cpp-python"), lib.ggml_commit().decode(), lib.ggml_version().decode())


def build_flags() -> str:
    """What the engine was built for, by backend, as llama.cpp prints it: ``CPU : AVX2 = 1 | FMA = 1 | ...``."""
    flags: str = library().llama_print_system_info().decode()
    return flags


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
    """What a device says of itself. ``host_buffer`` is the main memory that it can read by itself, if it has such.

    ``maps_files`` tells that weights in a mapped file need no copy for it (Metal, the CPU).
    """

    description: str
    free_bytes: int
    total_bytes: int
    buffer: BufferType
    host_buffer: BufferType | None
    maps_files: bool
    supports_mmap: bool


def device_facts(device: Device) -> DeviceFacts:
    """Memory and buffers of a device. A remote one is asked over the network, for as long as that takes."""
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


def rpc_function(name: str) -> Any:
    """A function of ``_RPC_PROTOTYPES``. Raises EngineError for an engine that was built without RPC."""
    lib = library()
    if not hasattr(lib, name):
        raise EngineError(
            "this llama-cpp-python was built without RPC and cannot use other machines: install it again with "
            'CMAKE_ARGS="-DGGML_RPC=ON", as vendor/README.md describes'
        )
    function = getattr(lib, name)
    function.restype, function.argtypes = _RPC_PROTOTYPES[name]
    return function


def register_rpc_server(endpoint: str) -> None:
    """Make the devices of the worker at ``endpoint`` (IPv4:PORT) devices of this process, for as long as it lives.

    ggml ends the process if the worker cannot be reached, and waits without end for one that is silent.
    Raises EngineError.
    """
    add = rpc_function("ggml_backend_rpc_add_server")
    registry = add(endpoint.encode())
    if not registry:
        raise EngineError(f"the worker at {endpoint} has no devices")
    rpc_function("ggml_backend_register")(registry)


def start_rpc_server(endpoint: str, cache_dir: str | None, n_threads: int, served: Sequence[Device]) -> None:
    """Serve devices at ``endpoint`` (IPv4:PORT), one client after the other; returns only if it cannot.

    ggml prints to stdout what it does. Raises EngineError.
    """
    start = rpc_function("ggml_backend_rpc_start_server")
    handles = (_VOID * len(served))(*(device.handle for device in served))
    start(endpoint.encode(), os.fsencode(cache_dir) if cache_dir else None, n_threads, len(handles), handles)


def cpu_has(feature: str) -> bool:
    """Whether ggml's CPU backend was built for a feature (``avx2``, ``neon``, ``dotprod``) and this CPU has it."""
    name = f"ggml_cpu_has_{feature}"
    return has_symbol(name) and bool(getattr(library(), name)())


def has_broken_amx() -> bool:
    """Whether this engine was compiled with AMX, whose matrix code ends the process when GCC compiled it.

    llama.cpp#20824 and #26954; open at commit 0c1e57098. The code runs only for weights in the CPU's extra buffers.
    """
    return cpu_has("amx_int8")


def gbnf_of_schema(schema: str) -> str:
    """llama-cpp-python's grammar for a JSON schema. Raises what it happens to raise for one that it cannot follow."""
    library()
    from llama_cpp import llama_grammar

    grammar: str = llama_grammar.json_schema_to_gbnf(schema)
    return grammar


@cache
def c_library() -> ctypes.CDLL:
    """The C library, whose functions serve as callbacks that never wait for the interpreter."""
    return ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)


def function_address(function: Any) -> int:
    """The address of a function of a loaded library."""
    return ctypes.cast(function, _VOID).value or 0


def _address(array: NDArray[Any], dtype: type | None = None) -> int:
    if not array.flags.c_contiguous or (dtype is not None and array.dtype != dtype):
        raise ValueError(f"expected a C-contiguous array of {dtype}, got {array.dtype} with strides {array.strides}")
    return array.ctypes.data


def quantize_chunk(
    type: GGMLType, src: NDArray[np.float32], dst: NDArray[np.uint8], imatrix: NDArray[np.float32] | None = None
) -> None:
    """ggml's own quantizer: ``src`` (rows, n_cols) float32 into ``dst`` (rows, row_bytes) uint8.

    ``imatrix`` is one importance per column, shape (n_cols,). ggml aborts the process when a type needs one and gets
    none: ask ``requires_imatrix`` first.
    """
    n_rows, n_cols = src.shape
    if dst.shape != (n_rows, type.row_bytes(n_cols)):
        raise ValueError(f"{type.name}: dst has shape {dst.shape}, expected {(n_rows, type.row_bytes(n_cols))}")
    if imatrix is not None and imatrix.shape != (n_cols,):
        raise ValueError(f"{type.name}: imatrix has shape {imatrix.shape}, expected {(n_cols,)}")
    weights = None if imatrix is None else _address(imatrix, np.float32)
    library().ggml_quantize_chunk(
        type.id, _address(src, np.float32), _address(dst, np.uint8), 0, n_rows, n_cols, weights
    )


def requires_imatrix(type: GGMLType) -> bool:
    """Whether ggml refuses (by abort) to quantize to this type without an importance matrix."""
    return bool(library().ggml_quantize_requires_imatrix(type.id))


def validate_rows(type: GGMLType, data: NDArray[np.uint8]) -> bool:
    """ggml's check of quantized bytes: no NaN and no infinity among the scales."""
    return bool(library().ggml_validate_row_data(type.id, _address(data, np.uint8), data.nbytes))


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` (ggml.h) at the pinned commit."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", _I64),
        ("blck_size_interleave", _I64),
        ("type_size", _SIZE),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _VOID),
        ("from_float_ref", _VOID),
    )


@cache
def _to_float(type: GGMLType) -> Any:
    """ggml's ``void (*)(const void * x, float * y, int64_t k)`` for a type; None where it has none."""
    traits = _TypeTraits.from_address(library().ggml_get_type_traits(type.id))
    if (traits.blck_size, traits.type_size) != (type.block_size, type.block_bytes):
        raise EngineMissingError(f"this llama-cpp-python describes {type.name} otherwise; install the pinned version")
    return ctypes.CFUNCTYPE(None, _VOID, _VOID, _I64)(traits.to_float) if traits.to_float else None


def can_dequantize(type: GGMLType) -> bool:
    """Whether ggml can make float32 of this quantized type."""
    return type.is_quantized and _to_float(type) is not None


def dequantize_rows(type: GGMLType, src: NDArray[np.uint8], dst: NDArray[np.float32]) -> None:
    """ggml's own dequantizer: ``src`` (rows, row_bytes) uint8 into ``dst`` (rows, n_cols) float32.

    Raises ValueError for a type that ``can_dequantize`` denies.
    """
    n_rows, n_cols = dst.shape
    if src.shape != (n_rows, type.row_bytes(n_cols)):
        raise ValueError(f"{type.name}: src has shape {src.shape}, expected {(n_rows, type.row_bytes(n_cols))}")
    if not can_dequantize(type):
        raise ValueError(f"ggml cannot dequantize {type.name}")
    _to_float(type)(_address(src, np.uint8), _address(dst, np.float32), dst.size)


def bf16_to_f32(src: NDArray[np.uint16], dst: NDArray[np.float32]) -> None:
    """Widen bfloat16 bits exactly; same number of elements in both."""
    _convert("ggml_bf16_to_fp32_row", src, np.uint16, dst, np.float32)


def f16_to_f32(src: NDArray[np.float16], dst: NDArray[np.float32]) -> None:
    """Widen float16 exactly."""
    _convert("ggml_fp16_to_fp32_row", src, np.float16, dst, np.float32)


def f32_to_bf16(src: NDArray[np.float32], dst: NDArray[np.uint16]) -> None:
    """Round to bfloat16 bits as ggml does (nearest, ties to even)."""
    _convert("ggml_fp32_to_bf16_row", src, np.float32, dst, np.uint16)


def f32_to_f16(src: NDArray[np.float32], dst: NDArray[np.float16]) -> None:
    """Round to float16 as ggml does (nearest, ties to even)."""
    _convert("ggml_fp32_to_fp16_row", src, np.float32, dst, np.float16)


def _convert(function: str, src: NDArray[Any], src_dtype: type, dst: NDArray[Any], dst_dtype: type) -> None:
    if src.size != dst.size:
        raise ValueError(f"{function}: {src.size} elements do not fit {dst.size}")
    getattr(library(), function)(_address(src, src_dtype), _address(dst, dst_dtype), src.size)


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` (ggml.h) at the pinned commit: sizes and strides in bytes, the fastest dimension first."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", _VOID),
        ("ne", _I64 * 4),
        ("nb", _SIZE * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", _VOID * 10),
        ("view_src", _VOID),
        ("view_offs", _SIZE),
        ("data", _VOID),
        ("name", ctypes.c_char * 64),
        ("extra", _VOID),
        ("padding", ctypes.c_char * 8),
    )


class Operation(IntEnum):
    """What a node of a graph computes, of ``enum ggml_op``: the products with weights."""

    MUL_MAT = 29
    """``src[0]`` times the rows of ``src[1]``."""
    MUL_MAT_ID = 30
    """The matrices of ``src[0]`` that ``src[2]`` names for each token, times the rows of ``src[1]``."""


@cache
def _get_name() -> Any:
    # const char * ggml_get_name(const struct ggml_tensor *); called for every node of a graph, so the interpreter's
    # lock is not given up for it
    return ctypes.PYFUNCTYPE(ctypes.c_char_p, _VOID)(("ggml_get_name", library()))


def tensor_name(tensor: int) -> bytes:
    """Name of the ``ggml_tensor`` at an address."""
    name: bytes = _get_name()(tensor)
    return name


def tensor_shape(tensor: int) -> tuple[int, ...]:
    """Shape of the ``ggml_tensor`` at an address: four dimensions, in numpy order."""
    return tuple(reversed(_Tensor.from_address(tensor).ne))


def tensor_type_is(tensor: int, type: GGMLType) -> bool:
    """Whether the ``ggml_tensor`` at an address is of this type."""
    return bool(_Tensor.from_address(tensor).type == type.id)


def tensor_operation(tensor: int) -> int:
    """What computes the ``ggml_tensor`` at an address; compare it with ``Operation``."""
    return int(_Tensor.from_address(tensor).op)


def tensor_sources(tensor: int) -> tuple[int, ...]:
    """Addresses of the tensors that the ``ggml_tensor`` at an address is computed from."""
    sources = _Tensor.from_address(tensor).src
    return tuple(source for source in sources if source)


def tensor_values(tensor: int, *, copy: bool = True) -> NDArray[Any]:
    """A copy of a computed F32 or I32 ``ggml_tensor``, on whatever device it lies: four dimensions, in numpy order.

    Views with gaps between their rows are read as such. Without ``copy`` a tensor in main memory is looked at where it
    lies, which holds only until llama.cpp computes on.
    """
    head = _Tensor.from_address(tensor)
    dtype = {GGMLType.F32.id: np.float32, GGMLType.I32.id: np.int32}.get(head.type)
    if dtype is None:
        raise ValueError(f"{tensor_name(tensor)!r} is of type {head.type}, neither F32 nor I32")
    shape, strides = tuple(reversed(head.ne)), tuple(reversed(head.nb))
    if 0 in shape:
        return np.empty(shape, dtype)
    n_bytes = library().ggml_nbytes(tensor)
    if not copy and head.buffer and library().ggml_backend_buffer_is_host(head.buffer):
        there = (ctypes.c_uint8 * n_bytes).from_address(head.data)
        seen: NDArray[Any] = np.ndarray(shape, dtype, there, 0, strides)
        return seen
    data = np.empty(n_bytes, np.uint8)
    library().ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
    values: NDArray[Any] = np.ndarray(shape, dtype, data, 0, strides).copy()
    return values
