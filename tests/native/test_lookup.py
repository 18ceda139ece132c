"""Which libllama is used: the order, what a library must have, and a model run with one that has no bindings."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llama_cpp import llama_cpp

from ggufmoe import doctor
from ggufmoe.errors import EngineMissingError
from ggufmoe.evaluation.probe import PROBE_ANSWER
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import library as native
from ggufmoe.native import llama_api, lookup
from ggufmoe.native.lookup import SETTING, Lookup, RefusedLibrary, UnfitLibraryError, check_interface, find_library
from tests.llama_log import llama_log_to

LIBRARY = native.found_library().path
X86 = platform.machine() in ("x86_64", "AMD64")


# ---- our declarations


def same_type(ours: Any, theirs: Any) -> bool:
    """Whether two ctypes types are passed alike; pointers to what we keep opaque are ``void *``."""
    if ours is ctypes.c_void_p:
        return theirs is ctypes.c_void_p or isinstance(theirs, type(ctypes.POINTER(ctypes.c_int)))
    if ours is None or issubclass(ours, ctypes._SimpleCData):
        return bool(ours is theirs)
    if isinstance(ours, type(ctypes.POINTER(ctypes.c_int))):
        return same_type(ours._type_, theirs._type_)
    if isinstance(ours, type(llama_api.llama_log_callback)):
        return same_type(ours._restype_, theirs._restype_) and all(map(same_type, ours._argtypes_, theirs._argtypes_))
    return bool(ours.__name__ == theirs.__name__ and ctypes.sizeof(ours) == ctypes.sizeof(theirs))


STRUCTS = [
    name for name, kind in llama_api.LlamaApi.types().items() if issubclass(kind, (ctypes.Structure, ctypes.Union))
]


@pytest.mark.parametrize("name", STRUCTS)
def test_structures_are_those_of_the_bindings(name: str) -> None:
    ours, theirs = getattr(llama_api, name), getattr(llama_cpp, name)
    assert ctypes.sizeof(ours) == ctypes.sizeof(theirs)
    assert [field for field, _ in ours._fields_] == [field for field, _ in theirs._fields_]
    for (field, kind), (_, other) in zip(ours._fields_, theirs._fields_, strict=True):
        assert getattr(ours, field).offset == getattr(theirs, field).offset
        assert same_type(kind, other) or ctypes.sizeof(kind) == ctypes.sizeof(other) > 8, field


@pytest.mark.parametrize("name", llama_api.PROTOTYPES)
def test_prototypes_are_those_of_the_bindings(name: str) -> None:
    restype, argtypes = llama_api.PROTOTYPES[name]
    theirs = getattr(llama_cpp, name)
    assert same_type(restype, theirs.restype)
    assert len(argtypes) == len(theirs.argtypes)
    assert all(map(same_type, argtypes, theirs.argtypes))


@pytest.mark.parametrize("name", [name for name in llama_api.LlamaApi.types() if name.endswith("callback")])
def test_callbacks_are_those_of_the_bindings(name: str) -> None:
    assert same_type(getattr(llama_api, name), getattr(llama_cpp, name))


# ---- what is looked for where


def test_the_bindings_come_first_and_a_setting_before_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    (installed,) = lookup.installed_engines()
    assert installed == f"llama-cpp-python {native.PINNED_ENGINE.package}" == native.found_library().origin
    assert native.found_library().has_bindings
    monkeypatch.setenv(SETTING, "elsewhere.so")
    assert lookup.installed_engines() == [f"{SETTING}=elsewhere.so"]


def test_a_package_that_carries_a_library_comes_after_the_bindings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = carried_by(tmp_path, "made-up-llama", b"no library")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(lookup, "find_spec", lambda _: None)
    assert lookup.installed_engines(["made-up-llama", "not-installed"]) == ["made-up-llama 1.5"]
    found = find_library((), others=["made-up-llama"])
    assert found.found is None
    assert [refusal.origin for refusal in found.refused] == ["made-up-llama 1.5"]
    assert str(path) in found.refused[0].reason
    path.unlink()
    path.symlink_to(LIBRARY)
    accepted = find_library(("ggml_quantize_chunk",), others=["made-up-llama"]).found
    assert accepted is not None
    assert (accepted.origin, accepted.path, accepted.has_bindings) == ("made-up-llama 1.5", path, False)


def carried_by(folder: Path, package: str, library: bytes) -> Path:
    """An installed package in ``folder`` that has a file of the name of a libllama."""
    name = lookup._library_names()[0]
    module = folder / package.replace("-", "_")
    info = folder / f"{module.name}-1.5.dist-info"
    module.mkdir()
    info.mkdir()
    (module / name).write_bytes(library)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
    (info / "RECORD").write_text(f"{module.name}/{name},,\n{info.name}/METADATA,,\n")
    importlib.invalidate_caches()
    return module / name


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "libllama.so", r"there is no libllama.so at "),
        (lambda folder: folder, r"there is no libllama\.(so|dylib)|llama.dll .*at "),
        (lambda folder: file_of(folder / "libllama.so", b"\x7fELF, and no more"), r"libllama.so"),
        (lambda folder: Path(ctypes.__file__).parent, r"there is no "),
        (lambda folder: Path(importlib.import_module("_ctypes").__file__ or ""), "it lacks a function: .*llama_"),
    ],
)  # fmt: skip
def test_a_setting_that_is_no_engine_is_refused_with_the_reason(
    make: Callable[[Path], Path], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(SETTING, str(make(tmp_path)))
    found = find_library(())
    assert found.found is None
    (refusal,) = found.refused
    assert refusal.origin.startswith(f"{SETTING}=")
    assert re.search(reason, refusal.reason)


def file_of(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_what_is_not_exported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, str(LIBRARY))
    wanted = ("llama_decode", "llama_one", "llama_two", "llama_three", "llama_four")
    assert find_library(wanted).refused[0].reason == "it exports no llama_one, llama_two, llama_three ..."


# ---- made-up libraries, of functions in Python


def made_up(**changes: Any) -> SimpleNamespace:
    """The functions that a library is judged by: the real ones, but for ``changes``."""
    names = [*lookup._STRUCTS, "ggml_blck_size", "ggml_type_size", "ggml_get_type_traits", "ggml_tensor_overhead"]
    handle = ctypes.CDLL(str(LIBRARY))
    return SimpleNamespace(**{name: getattr(handle, name) for name in [*names, "ggml_type_name"]} | changes)


def returns(value: ctypes.Structure, n_more: int = 0) -> Any:
    """A function that returns a structure, and ``n_more`` bytes behind it."""

    def write(room: int) -> int:
        ctypes.memmove(room, bytes(value) + bytes(n_more), ctypes.sizeof(value) + n_more)
        return room

    return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(write)


def test_the_log_goes_on_as_before_when_backends_have_been_loaded(tmp_path: Path) -> None:
    handle = ctypes.CDLL(str(LIBRARY))

    def receiver() -> tuple[int | None, int | None]:
        callback, user_data = ctypes.c_void_p(), ctypes.c_void_p()
        handle.ggml_log_get(ctypes.byref(callback), ctypes.byref(user_data))
        return callback.value, user_data.value

    def load_all(folder: bytes) -> None:
        assert folder == os.fsencode(tmp_path)
        during.append(receiver())

    during: list[tuple[int | None, int | None]] = []
    library: Any = SimpleNamespace(
        ggml_backend_dev_count=lambda: 0,
        ggml_backend_load_all_from_path=load_all,
        ggml_backend_reg_by_name=lambda _: 1,
        ggml_log_get=handle.ggml_log_get,
        ggml_log_set=handle.ggml_log_set,
    )
    with llama_log_to(lambda _: None):
        before = receiver()
        lookup.load_backends(library, tmp_path)
        assert receiver() == before
        assert before not in during
        assert len(during) == 1


def test_the_engine_itself_has_the_interface() -> None:
    check_interface(native.library())
    check_interface(made_up())


def test_a_structure_with_one_field_more_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    if X86:  # where a structure's place is an argument
        more = returns(llama_cpp.llama_context_default_params(), 8)
        with pytest.raises(UnfitLibraryError, match="its llama_context_params has 168 bytes, expected 160"):
            check_interface(made_up(llama_context_default_params=more))
        fewer = returns(llama_cpp.llama_sampler_chain_default_params())
        with pytest.raises(UnfitLibraryError, match="its llama_model_params has 8 bytes, expected 80"):
            check_interface(made_up(llama_model_default_params=fewer))

    fields = (*llama_api.llama_batch._fields_, ("moe_cache_size", ctypes.c_size_t))
    longer = type("Longer", (ctypes.Structure,), {"_fields_": fields})
    expected = dict(lookup._STRUCTS, llama_batch_get_one=(longer, lookup._STRUCTS["llama_batch_get_one"][1]))
    monkeypatch.setattr(lookup, "_STRUCTS", expected)
    if X86:
        with pytest.raises(UnfitLibraryError, match="its Longer has 56 bytes, expected 64"):
            check_interface(native.library())


def test_fields_in_other_places_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = list(llama_api.llama_context_params._fields_)
    fields[0], fields[1] = fields[1], fields[0]
    moved = type("moved", (ctypes.Structure,), {"_fields_": tuple(fields)})
    monkeypatch.setitem(lookup._STRUCTS, "llama_context_default_params", (moved, ()))
    with pytest.raises(UnfitLibraryError, match="its moved has 2048 as n_ctx, expected 512"):
        check_interface(native.library())


def test_other_types_are_found() -> None:
    real = made_up()
    real.ggml_type_size.restype = ctypes.c_size_t
    wider = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_int)(
        lambda kind: int(real.ggml_type_size(kind)) + (kind == GGMLType.Q2_0.id)
    )
    with pytest.raises(
        UnfitLibraryError, match=r"its type 42 is Q2_0, 64 weights in 19 bytes, expected Q2_0, 64 in 18"
    ):
        check_interface(made_up(ggml_type_size=wider))
    larger = ctypes.CFUNCTYPE(ctypes.c_size_t)(lambda: 376)
    with pytest.raises(UnfitLibraryError, match="its ggml_tensor takes 376 bytes, expected 368"):
        check_interface(made_up(ggml_tensor_overhead=larger))


# ---- an engine without bindings, and none


def test_a_model_is_run_by_a_library_without_the_bindings() -> None:
    code = (
        "import sys, ggufmoe.doctor as doctor\n"
        "sys.modules['llama_cpp'] = None\n"  # whatever imports it fails
        "print([(f.name, f.status, f.data.get('tokens'), f.data.get('path')) for f in doctor.check_engine()])\n"
    )
    told = python(code, LIBRARY)
    findings = {name: (status, tokens, path) for name, status, tokens, path in told}
    assert findings["in use"] == ("ok", None, str(LIBRARY))
    assert findings["version"][0] == "note"
    assert findings["CPU answer"] == ("ok", list(PROBE_ANSWER), None)


def python(code: str, library: Path) -> Any:
    """What a process prints that finds its engine by the setting."""
    environment = os.environ | {SETTING: str(library)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout)


def test_without_an_engine_the_error_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        native, "engine_lookup", lambda: Lookup(None, (RefusedLibrary("llama-cpp-python 0.3.36", "it broke"),))
    )
    with pytest.raises(EngineMissingError, match="cannot be used: it broke; install it with `pip install llama"):
        native.found_library()
    (finding,) = doctor.check_engine()
    assert (finding.status, finding.text) == ("wrong", "llama-cpp-python 0.3.36 is not used: it broke")
    monkeypatch.setattr(native, "engine_lookup", lambda: Lookup(None))
    with pytest.raises(EngineMissingError, match="llama-cpp-python is not installed; install it with"):
        native.found_library()
    (finding,) = doctor.check_engine()
    assert (finding.status, finding.name) == ("note", "in use")
    assert "cannot run models" in finding.text
