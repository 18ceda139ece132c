"""How fast llama.cpp's CPU backend multiplies stored weights by one vector, which is most of the work for a token.

Measured with ggml's own graph on matrices of zeros: what the bytes mean does not change the time. Weights lie where a
loaded model has them, in the buffer that rearranges them if the CPU has one for their type.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ggufmoe.gguf.types import GGMLType
from ggufmoe.native.backends import DeviceType, devices
from ggufmoe.native.library import backend_function, c_library, function_address, library
from ggufmoe.native.wording import CPU_BACKEND, is_repack_buffer

_VOID = ctypes.c_void_p
_I64 = ctypes.c_int64
_SIZE = ctypes.c_size_t
_SIDE = 4096
"""Rows and columns of a matrix."""
_WEIGHT_BYTES = 128 << 20
"""More than the caches of most processors hold."""
_CONTEXT_BYTES = 4 << 20
"""For the descriptions of tensors and of the graph; their data is elsewhere."""
_LEAST_TIMES, _LEAST_S = 10, 0.15
"""Passes, and seconds, of which the fastest pass counts: other programs disturb some."""
_STEPS = 32
_MOST_STEP_S = 10e-6
"""A step that takes longer was disturbed: a thread waited for one that had no core."""
_GRAPH_BYTES = 32 << 20
"""Weights of a graph, as many as take well under a millisecond: on a busy machine some passes are not interrupted."""


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params`` (ggml.h)."""

    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _VOID), ("no_alloc", ctypes.c_bool))


_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    # struct ggml_context * ggml_init(struct ggml_init_params params); void ggml_free(struct ggml_context *)
    "ggml_init": (_VOID, (_InitParams,)),
    "ggml_free": (None, (_VOID,)),
    # struct ggml_tensor * ggml_new_tensor_2d(struct ggml_context *, enum ggml_type type, int64_t ne0, int64_t ne1)
    "ggml_new_tensor_2d": (_VOID, (_VOID, ctypes.c_int, _I64, _I64)),
    # struct ggml_tensor * ggml_mul_mat(struct ggml_context *, struct ggml_tensor * a, struct ggml_tensor * b)
    "ggml_mul_mat": (_VOID, (_VOID, _VOID, _VOID)),
    # struct ggml_cgraph * ggml_new_graph(struct ggml_context *)
    "ggml_new_graph": (_VOID, (_VOID,)),
    # void ggml_build_forward_expand(struct ggml_cgraph *, struct ggml_tensor *)
    "ggml_build_forward_expand": (None, (_VOID, _VOID)),
    # ggml_backend_buffer_t ggml_backend_alloc_ctx_tensors_from_buft(struct ggml_context *, ggml_backend_buffer_type_t)
    "ggml_backend_alloc_ctx_tensors_from_buft": (_VOID, (_VOID, _VOID)),
    "ggml_backend_buffer_free": (None, (_VOID,)),
    # void ggml_backend_tensor_set(struct ggml_tensor *, const void * data, size_t offset, size_t size)
    "ggml_backend_tensor_set": (None, (_VOID, _VOID, _SIZE, _SIZE)),
    # ggml_backend_t ggml_backend_dev_init(ggml_backend_dev_t, const char * params); void ggml_backend_free(...)
    "ggml_backend_dev_init": (_VOID, (_VOID, ctypes.c_char_p)),
    "ggml_backend_free": (None, (_VOID,)),
    # enum ggml_status ggml_backend_graph_compute(ggml_backend_t, struct ggml_cgraph *)
    "ggml_backend_graph_compute": (ctypes.c_int, (_VOID, _VOID)),
    # void ggml_log_get(ggml_log_callback *, void ** user_data); void ggml_log_set(ggml_log_callback, void * user_data)
    "ggml_log_get": (None, (_VOID, _VOID)),
    "ggml_log_set": (None, (_VOID, _VOID)),
}


def product_bytes_per_s(
    type: GGMLType, n_threads: int, *, repacked: bool, n_bytes: int = _WEIGHT_BYTES, least_s: float = _LEAST_S
) -> float:
    """Bytes of weights a second: the best pass, through parts of ``n_bytes`` in turn, of those that take ``least_s``.

    ``repacked``: whether the backend rearranges this type on this CPU. Raises EngineMissingError and MemoryError.
    """
    row_bytes = type.row_bytes(_SIDE)
    n_matrices = max(1, min(n_bytes, _GRAPH_BYTES) // (_SIDE * row_bytes))
    n_graphs = max(1, n_bytes // (n_matrices * _SIDE * row_bytes))
    # on a busy machine several threads hardly ever run at once, and one is faster
    seconds = min(
        _pass_s(type, count, (n_matrices, n_graphs), _SIDE, repacked=repacked, least_s=least_s)
        for count in {n_threads, 1}
    )
    return n_matrices * _SIDE * row_bytes / seconds


def step_s(n_threads: int, *, least_s: float = _LEAST_S) -> float:
    """Seconds for a step of the graph that computes next to nothing: starting it on all threads, and their meeting."""
    passed_s = _pass_s(GGMLType.F32, n_threads, (_STEPS, 1), 32, repacked=False, least_s=least_s)
    return min(passed_s / _STEPS, _MOST_STEP_S)


def _pass_s(
    type: GGMLType, n_threads: int, n_matrices: tuple[int, int], side: int, *, repacked: bool, least_s: float
) -> float:
    """Seconds of the fastest pass; ``n_matrices`` of each graph, and how many graphs are computed in turn."""
    lib = _declared()
    cpu = next(device.handle for device in devices() if device.type is DeviceType.CPU)
    plain = lib.ggml_backend_dev_buffer_type(cpu)
    with contextlib.ExitStack() as held:
        held.enter_context(_quiet(lib))
        backend = lib.ggml_backend_dev_init(cpu, None)
        held.callback(lib.ggml_backend_free, backend)
        _set_threads(backend, n_threads)
        weights, vectors = (_context(lib, held) for _ in range(2))
        n_each, n_graphs = n_matrices
        matrices = [lib.ggml_new_tensor_2d(weights, type.id, side, side) for _ in range(n_each * n_graphs)]
        _allocate(lib, weights, _repack_buffer(cpu) or plain if repacked else plain, held)
        zeros = np.zeros(type.row_bytes(side) * side, np.uint8)
        for matrix in matrices:
            lib.ggml_backend_tensor_set(matrix, zeros.ctypes.data, 0, zeros.nbytes)
        vector = lib.ggml_new_tensor_2d(vectors, GGMLType.F32.id, side, 1)
        graphs = [lib.ggml_new_graph(vectors) for _ in range(n_graphs)]
        for index, matrix in enumerate(matrices):
            lib.ggml_build_forward_expand(graphs[index // n_each], lib.ggml_mul_mat(vectors, matrix, vector))
        _allocate(lib, vectors, plain, held)
        return min(_times(lib, backend, graphs, least_s))


def _declared() -> Any:
    lib = library()
    for name, (restype, argtypes) in _PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib


@contextlib.contextmanager
def _quiet(lib: Any) -> Iterator[None]:
    """Within the block ggml, which tells of each matrix that it rearranges, logs nothing."""
    callback, data = _VOID(), _VOID()
    lib.ggml_log_get(ctypes.byref(callback), ctypes.byref(data))
    lib.ggml_log_set(function_address(c_library().abs), None)
    try:
        yield
    finally:
        lib.ggml_log_set(callback, data)


def _context(lib: Any, held: contextlib.ExitStack) -> int:
    context: int = lib.ggml_init(_InitParams(_CONTEXT_BYTES, None, True))
    held.callback(lib.ggml_free, context)
    return context


def _allocate(lib: Any, context: int, buffer_type: int, held: contextlib.ExitStack) -> None:
    buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
    if not buffer:
        raise MemoryError("there is no memory to measure the speed of products in")
    held.callback(lib.ggml_backend_buffer_free, buffer)


def _set_threads(backend: int, n_threads: int) -> None:
    address = backend_function(CPU_BACKEND, "ggml_backend_set_n_threads")
    if address is not None:
        # void ggml_backend_set_n_threads(ggml_backend_t, int n_threads)
        ctypes.CFUNCTYPE(None, _VOID, ctypes.c_int)(address)(backend, n_threads)


def _repack_buffer(device: int) -> int | None:
    """The first buffer type in which the CPU's backend rearranges weights; None if it has none."""
    address = backend_function(CPU_BACKEND, "ggml_backend_dev_get_extra_bufts")
    if address is None:
        return None
    # ggml_backend_buffer_type_t * ggml_backend_dev_get_extra_bufts(ggml_backend_dev_t); ends with NULL
    types = ctypes.CFUNCTYPE(ctypes.POINTER(_VOID), _VOID)(address)(device)
    names = library().ggml_backend_buft_name
    for index in range(8):
        if not types or not types[index]:
            return None
        if is_repack_buffer(names(types[index]).decode()):
            return int(types[index])
    return None


def _times(lib: Any, backend: int, graphs: Sequence[int], least_s: float) -> Iterator[float]:
    """Seconds of each of several passes through graphs in turn."""
    passes, ends = 0, time.perf_counter() + least_s
    while passes < _LEAST_TIMES or time.perf_counter() < ends:
        began = time.perf_counter()
        lib.ggml_backend_graph_compute(backend, graphs[passes % len(graphs)])
        yield time.perf_counter() - began
        passes += 1
