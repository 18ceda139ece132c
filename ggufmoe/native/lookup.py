"""Which libllama this process uses: that of the setting, else llama-cpp-python's, else one of the same interface.

A library that did not come with llama-cpp-python is used through ``llama_api``, after a look at what it exports, at
the sizes of its structures and at its types: versions do not tell, as structures change without them. Each library
that was refused is remembered with the reason. CPU backends that are files of their own (GGML_BACKEND_DL) are loaded.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import llama_api
from ggufmoe.native.llama_api import LlamaApi

SETTING = "GGUFMOE_LIBLLAMA"
"""Environment variable: the path of a libllama, or of the folder that has it. Nothing else is used then."""
BINDINGS = "llama-cpp-python"
OTHER_PACKAGES = ("llama-cpp-py-sync",)
"""Packages on PyPI that carry a libllama, some versions of which have the pinned interface."""

_NAMES = {"win32": ("llama.dll", "libllama.dll"), "darwin": ("libllama.dylib", "libllama.so")}
_STRUCTS: dict[str, tuple[type[ctypes.Structure], tuple[Any, ...]]] = {
    "llama_model_default_params": (llama_api.llama_model_params, ()),
    "llama_context_default_params": (llama_api.llama_context_params, ()),
    "llama_batch_get_one": (llama_api.llama_batch, (ctypes.c_void_p(None), ctypes.c_int32(0))),
}
"""Functions that return a structure by value and do nothing else, with arguments."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama_model_default_params": {"split_mode": 1, "use_extra_bufts": True, "vocab_only": False, "no_alloc": False},
    "llama_context_default_params": {
        "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "yarn_beta_slow": -1.0, "type_k": 1, "type_v": 1,
        "abort_callback_data": None, "offload_kqv": True, "kv_unified": False, "n_samplers": 0, "ctx_other": None,
    },
}  # fmt: skip
"""Values of the pinned llama.cpp, spread over its structures."""
_LARGEST_STRUCT = 1024
_TENSOR_OVERHEAD = 368
"""Bytes of ``ggml_object`` and ``ggml_tensor``."""
_TRAITS_BYTES = 56
"""Bytes of ``ggml_type_traits``."""


class UnfitLibraryError(Exception):
    """This libllama cannot be used; the message says why."""


@dataclass(frozen=True)
class FoundLibrary:
    """A libllama that is loaded. ``api`` has its functions, as the module ``llama_cpp.llama_cpp`` has them."""

    origin: str
    """Where it is from: ``llama-cpp-python 0.3.36``."""
    path: Path
    handle: ctypes.CDLL
    api: Any

    @property
    def has_bindings(self) -> bool:
        """Whether it came with llama-cpp-python, of which the parts in Python can be used then too."""
        return self.origin.startswith(BINDINGS)


@dataclass(frozen=True)
class RefusedLibrary:
    """A libllama that is not used, and why."""

    origin: str
    reason: str


@dataclass(frozen=True)
class Lookup:
    """The libllama that was found, if one was, and those that were refused before it."""

    found: FoundLibrary | None
    refused: tuple[RefusedLibrary, ...] = ()


def find_library(symbols: Collection[str], *, others: Collection[str] = OTHER_PACKAGES) -> Lookup:
    """Load the first libllama that exports ``symbols`` and, without llama-cpp-python, has the pinned interface."""
    refused: list[RefusedLibrary] = []
    for origin, load in _candidates(others):
        try:
            found = load(origin)
            _check_exports(found.handle, symbols)
            load_backends(found.handle, found.path.parent)
            if not found.has_bindings:
                check_interface(found.handle)
        except (ImportError, OSError, RuntimeError, AttributeError, UnfitLibraryError) as error:
            refused.append(RefusedLibrary(origin, " ".join(str(error).split())))
        else:
            return Lookup(found, tuple(refused))
    return Lookup(None, tuple(refused))


def installed_engines(others: Collection[str] = OTHER_PACKAGES) -> list[str]:
    """Origins of the libraries that would be tried, in order; nothing is loaded."""
    return [origin for origin, _ in _candidates(others)]


def _candidates(others: Collection[str]) -> Iterator[tuple[str, Callable[[str], FoundLibrary]]]:
    setting = os.environ.get(SETTING)
    if setting:
        yield f"{SETTING}={setting}", lambda origin: _load(origin, _named(Path(setting).expanduser()))
        return
    if find_spec("llama_cpp") is not None:
        yield f"{BINDINGS} {_version(BINDINGS)}".strip(), _load_bindings
    for package in others:
        if (path := _carried(package)) is not None:
            yield f"{package} {_version(package)}", lambda origin, path=path: _load(origin, path)  # type: ignore[misc]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _library_names() -> tuple[str, ...]:
    return _NAMES.get(sys.platform, ("libllama.so",))


def _carried(package: str) -> Path | None:
    """The libllama among the files of an installed package."""
    try:
        files = distribution(package).files or ()
    except PackageNotFoundError:
        return None
    found = (file for name in _library_names() for file in files if file.name == name)
    return next((Path(str(file.locate())) for file in found), None)


def _named(path: Path) -> Path:
    """The library at a path, or in the folder at it. Raises UnfitLibraryError."""
    inside = [path / name for name in _library_names()] if path.is_dir() else [path]
    for file in inside:
        if file.is_file():
            return file.absolute()
    raise UnfitLibraryError(f"there is no {' or '.join(file.name for file in inside)} at {inside[0].parent}")


def _load(origin: str, path: Path) -> FoundLibrary:
    handle = ctypes.CDLL(str(path))
    try:
        return FoundLibrary(origin, path, handle, LlamaApi(handle))
    except AttributeError as error:
        raise UnfitLibraryError(f"it lacks a function: {error}") from error


def _load_bindings(origin: str) -> FoundLibrary:
    from llama_cpp import llama_cpp

    handle: ctypes.CDLL = llama_cpp._lib
    return FoundLibrary(origin, Path(handle._name), handle, llama_cpp)


# ---- what a library must have


def _check_exports(library: ctypes.CDLL, symbols: Collection[str]) -> None:
    missing = [name for name in symbols if not hasattr(library, name)]
    if missing:
        raise UnfitLibraryError(f"it exports no {', '.join(missing[:3])}{' ...' if missing[3:] else ''}")


def load_backends(library: ctypes.CDLL, folder: Path) -> None:
    """Load the backends in ``folder``, the best of each kind for this machine, if they are files of their own.

    ggml by itself would look beside Python and in the working directory, from where nothing may be loaded.
    Raises UnfitLibraryError if there is no backend for the CPU then.
    """
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    if library.ggml_backend_dev_count() == 0 and hasattr(library, "ggml_backend_load_all_from_path"):
        # void ggml_backend_load_all_from_path(const char * dir_path), which says on stderr what it loads
        load_all = library.ggml_backend_load_all_from_path
        load_all.restype, load_all.argtypes = None, (ctypes.c_char_p,)
        quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        previous, user_data = ctypes.c_void_p(), ctypes.c_void_p()  # llama-cpp-python has set its own when imported
        if hasattr(library, "ggml_log_get"):
            # void ggml_log_get(ggml_log_callback * log_callback, void ** user_data)
            library.ggml_log_get(ctypes.byref(previous), ctypes.byref(user_data))
        # void ggml_log_set(ggml_log_callback log_callback, void * user_data)
        library.ggml_log_set(quiet, None)
        load_all(os.fsencode(folder))
        library.ggml_log_set(previous, user_data)
    # ggml_backend_reg_t ggml_backend_reg_by_name(const char * name)
    library.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    library.ggml_backend_reg_by_name.argtypes = (ctypes.c_char_p,)
    if not library.ggml_backend_reg_by_name(b"CPU"):
        raise UnfitLibraryError(f"it has no backend for this CPU, nor is one in {folder}")


def check_interface(library: Any) -> None:
    """Raise UnfitLibraryError unless structures and types of a libllama are those of the pinned one."""
    for name, (struct, arguments) in _STRUCTS.items():
        wanted = ctypes.sizeof(struct)
        found = _returned_bytes(library, name, arguments)
        if found is not None and found != wanted:
            raise UnfitLibraryError(f"its {struct.__name__} has {found} bytes, expected {wanted}")
    for name, values in _DEFAULTS.items():
        struct, _ = _STRUCTS[name]
        made = _function(library, name, struct)()
        for field, value in values.items():
            if getattr(made, field) != value:
                raise UnfitLibraryError(
                    f"its {struct.__name__} has {getattr(made, field)} as {field}, expected {value}"
                )
    _check_types(library)


def _returned_bytes(library: Any, name: str, arguments: tuple[Any, ...]) -> int | None:
    """Bytes that a function writes to return its structure; None where the address is no argument (64-bit ARM)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    written = 0
    for mark in (b"\xa5", b"\x5a"):  # the structure itself may hold one of them
        room = ctypes.create_string_buffer(mark * _LARGEST_STRUCT, _LARGEST_STRUCT)
        kinds = [type(argument) for argument in arguments]
        function = _function(library, name, ctypes.c_void_p, ctypes.c_void_p, *kinds)
        function(ctypes.addressof(room), *arguments)
        written = max(written, len(room.raw.rstrip(mark)))
    word = ctypes.sizeof(ctypes.c_void_p)
    return -(-written // word) * word  # padding at the end need not be written


def _function(library: Any, name: str, restype: Any, *argtypes: Any) -> Any:
    """A function of a library, declared apart from other declarations of it."""
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    return ctypes.CFUNCTYPE(restype, *argtypes)(address)


def _check_types(library: Any) -> None:
    block_size = _function(library, "ggml_blck_size", ctypes.c_int64, ctypes.c_int)
    block_bytes = _function(library, "ggml_type_size", ctypes.c_size_t, ctypes.c_int)
    traits = _function(library, "ggml_get_type_traits", ctypes.c_void_p, ctypes.c_int)
    overhead = _function(library, "ggml_tensor_overhead", ctypes.c_size_t)()
    if overhead != _TENSOR_OVERHEAD:
        raise UnfitLibraryError(f"its ggml_tensor takes {overhead} bytes, expected {_TENSOR_OVERHEAD}")
    if (step := (traits(1) or 0) - (traits(0) or 0)) != _TRAITS_BYTES:
        raise UnfitLibraryError(f"its ggml_type_traits has {step} bytes, expected {_TRAITS_BYTES}")
    name_of = _function(library, "ggml_type_name", ctypes.c_char_p, ctypes.c_int)
    for kind in GGMLType:
        found = (block_size(kind.id), block_bytes(kind.id), (name_of(kind.id) or b"").decode().upper())
        if found != (kind.block_size, kind.block_bytes, kind.name):
            raise UnfitLibraryError(
                f"its type {kind.id} is {found[2]}, {found[0]} weights in {found[1]} bytes, expected {kind.name}, "
                f"{kind.block_size} in {kind.block_bytes}"
            )
