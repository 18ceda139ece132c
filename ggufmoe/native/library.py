"""The libllama of this process, with declarations of the functions that llama-cpp-python does not bind.

Every symbol is looked up through libllama's own handle, which on POSIX also searches its dependencies; loading libggml
by its file would give a second instance with a registry of its own. ctypes releases the interpreter's lock during a
call, so native code runs on several threads at once. The other modules of this package call what is declared here.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

from ggufmoe.errors import EngineMissingError
from ggufmoe.native.lookup import BINDINGS, FoundLibrary, Lookup, find_library, installed_engines

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
    "ggml_fp32_to_bf16_row_ref": (None, (_VOID, _VOID, _I64)),
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
    # void ggml_backend_register(ggml_backend_reg_t)
    "ggml_backend_register": (None, (_VOID,)),
    # ggml_backend_reg_t ggml_backend_reg_by_name(const char * name); NULL if there is none
    "ggml_backend_reg_by_name": (_VOID, (ctypes.c_char_p,)),
    # void * ggml_backend_reg_get_proc_address(ggml_backend_reg_t, const char * name)
    "ggml_backend_reg_get_proc_address": (_VOID, (_VOID, ctypes.c_char_p)),
    # void ggml_backend_tensor_get(const struct ggml_tensor *, void * data, size_t offset, size_t size)
    "ggml_backend_tensor_get": (None, (_VOID, _VOID, _SIZE, _SIZE)),
    # void ggml_backend_tensor_get_2d(const struct ggml_tensor *, void * data, size_t offset, size_t size,
    #                                 size_t n_copies, size_t stride_tensor, size_t stride_data)
    "ggml_backend_tensor_get_2d": (None, (_VOID, _VOID, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE)),
    # size_t ggml_nbytes(const struct ggml_tensor *); void * ggml_get_data(const struct ggml_tensor *)
    "ggml_nbytes": (_SIZE, (_VOID,)),
    "ggml_get_data": (_VOID, (_VOID,)),
    # size_t ggml_tensor_overhead(void); const char * ggml_op_name(enum ggml_op)
    "ggml_tensor_overhead": (_SIZE, ()),
    "ggml_op_name": (ctypes.c_char_p, (ctypes.c_int,)),
    # bool ggml_backend_buffer_is_host(ggml_backend_buffer_t)
    "ggml_backend_buffer_is_host": (ctypes.c_bool, (_VOID,)),
    # void ggml_threadpool_params_init(struct ggml_threadpool_params * p, int n_threads)
    "ggml_threadpool_params_init": (None, (_VOID, ctypes.c_int)),
    # void llama_attach_threadpool(struct llama_context *, ggml_threadpool_t threadpool, ggml_threadpool_t for prompts)
    "llama_attach_threadpool": (None, (_VOID, _VOID, _VOID)),
    # const char * ggml_version(void); ggml_commit(void) alike; const char * llama_print_system_info(void)
    "ggml_version": (ctypes.c_char_p, ()),
    "ggml_commit": (ctypes.c_char_p, ()),
    "llama_print_system_info": (ctypes.c_char_p, ()),
}


def engine_lookup() -> Lookup:
    """Which libllama this process uses, and which were refused; the first call loads it, and others wait for that."""
    with _lookup_lock:  # `cache` alone lets two threads look at once, and both load the backends
        return _looked_up()


_lookup_lock = threading.Lock()


@cache
def _looked_up() -> Lookup:
    return find_library(tuple(_PROTOTYPES))


def has_engine() -> bool:
    """Whether there is a libllama that can be used; the first call loads it."""
    return engine_lookup().found is not None


def found_library() -> FoundLibrary:
    """The loaded libllama and where it is from. Raises EngineMissingError, which says how to get one."""
    looked_up = engine_lookup()
    if looked_up.found is None:
        tried = "; ".join(f"{refusal.origin} cannot be used: {refusal.reason}" for refusal in looked_up.refused)
        raise EngineMissingError(f"{tried or 'llama-cpp-python is not installed'}; {INSTALL}")
    return looked_up.found


def require_bindings(purpose: str) -> None:
    """Raise EngineMissingError for an engine without llama-cpp-python, whose Python code ``purpose`` needs."""
    found = found_library()
    if not found.has_bindings:
        raise EngineMissingError(f"{purpose} needs llama-cpp-python, and the engine is {found.origin}; {INSTALL}")


@cache
def library() -> ctypes.CDLL:
    """The loaded libllama, with the prototypes above. Raises EngineMissingError if there is none that can be used."""
    lib = found_library().handle
    for name, (restype, argtypes) in _PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib


def backend_function(backend: str, name: str) -> int | None:
    """Address of a function of a backend (``RPC``, ``CPU``), which may be in a library of its own; None if absent."""
    lib = library()
    registry = lib.ggml_backend_reg_by_name(backend.encode())
    address: int | None = lib.ggml_backend_reg_get_proc_address(registry, name.encode()) if registry else None
    return address or None


@dataclass(frozen=True)
class EngineVersion:
    """Version of llama-cpp-python, commit of the llama.cpp inside it, version of ggml.

    ``package`` is the whole origin where the library is another one: ``llama-cpp-py-sync 0.11413``.
    """

    package: str
    llama_cpp_commit: str
    ggml: str

    @property
    def is_pinned(self) -> bool:
        """Whether this is PINNED_ENGINE. A build outside of git knows no commit; then the versions decide."""
        commit = self.llama_cpp_commit.split("-")[0]  # builds from a source package add "-dirty"
        same_commit = commit == "unknown" or (bool(commit) and PINNED_ENGINE.llama_cpp_commit.startswith(commit))
        return same_commit and (self.package, self.ggml) == (PINNED_ENGINE.package, PINNED_ENGINE.ggml)


PINNED_ENGINE = EngineVersion("0.3.36", "0c1e57098bba43ac29e6e3b677cdceebdd22334f", "0.25.3")
"""The engine that ggufmoe is made for, as ``vendor/llama.cpp.toml`` says, which installed packages do not carry."""
INSTALL = (
    f"install it with `pip install {BINDINGS}=={PINNED_ENGINE.package}` (docs/install.md: also without a compiler)"
)
"""What a message says about a missing engine."""


def installed_version() -> str:
    """A line about the engine that would be used, and why those before it would not.

    llama-cpp-python's version comes from its metadata; only other libraries are loaded for this.
    """
    pinned = f"{BINDINGS} {PINNED_ENGINE.package}, llama.cpp {PINNED_ENGINE.llama_cpp_commit[:9]}"
    installed = installed_engines()
    if not installed:
        return f"llama-cpp-python is not installed (made for {pinned})"
    if installed[0].startswith(BINDINGS):
        is_pinned = installed[0] == f"{BINDINGS} {PINNED_ENGINE.package}"
        return pinned if is_pinned else f"{installed[0]} (made for {pinned})"
    looked_up = engine_lookup()
    refused = [f"{refusal.origin} is not used: {refusal.reason}" for refusal in looked_up.refused]
    found = "no engine" if looked_up.found is None else f"{looked_up.found.origin} at {looked_up.found.path}"
    return "; ".join([f"{found} (made for {pinned})", *refused])


def engine_version() -> EngineVersion:
    """The version of the engine in use. Raises EngineMissingError."""
    found, lib = found_library(), library()
    package = found.origin.removeprefix(f"{BINDINGS} ")
    return EngineVersion(package, lib.ggml_commit().decode(), lib.ggml_version().decode())


def build_flags() -> str:
    """What the engine was built for, by backend, as llama.cpp prints it: ``CPU : AVX2 = 1 | FMA = 1 | ...``."""
    flags: str = library().llama_print_system_info().decode()
    return flags


@cache
def c_library() -> ctypes.CDLL:
    """The C library; its functions serve as callbacks that never wait for Python's interpreter lock."""
    return ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)


def function_address(function: Any) -> int:
    """The address of a function of a loaded library."""
    return ctypes.cast(function, _VOID).value or 0
