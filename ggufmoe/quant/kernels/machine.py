"""Compiles a kernel written in lanes to a native function for this machine.

Chooses the vector width and the optimizer's settings, identifies compiled code, and keeps it in memory.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numpy as np
from llvmlite import binding
from llvmlite.binding.object_file import ObjectFileRef

from ggufmoe.folders import cache_directory
from ggufmoe.quant.kernels.code_cache import Code, CodeCache, source_hash
from ggufmoe.quant.kernels.lanes import Rows
from ggufmoe.quant.kernels.tiles import Geometry, Source, Tiles
from ggufmoe.version import __version__

Body = Callable[[Tiles, Rows, Rows | None], None]

_ADDRESS = ctypes.c_void_p
_PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int64, _ADDRESS, _ADDRESS, ctypes.c_int64, ctypes.c_int64, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS
)
_COMPILING = threading.Lock()


@dataclass(frozen=True)
class Host:
    """The target of compilation: LLVM's name of the processor, its features, the lanes of one vector.

    ``permutes``: whether it has AVX-512's permutation of 32 floats; ``looks_up``: whether it has one of a vector.
    """

    cpu: str
    features: str
    width: int
    permutes: bool
    looks_up: bool = False


@dataclass(frozen=True)
class Native:
    """A native function in memory. ``engine`` owns the code at which ``call`` points."""

    call: Any
    scratch_bytes: int
    engine: Any


@cache
def host() -> Host:
    """Describe this machine: 16 lanes with AVX-512, otherwise 8 (two registers if vectors hold 4).

    Raises RuntimeError for processors without an instruction that rounds: LLVM would call a function that may not
    exist, and end the process.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    family, features = binding.get_process_triple().split("-")[0], binding.get_host_cpu_features()
    if family not in ("aarch64", "arm64") and not (family == "x86_64" and features.get("sse4.1")):
        raise RuntimeError(f"kernels need x86-64 with SSE4.1 or 64-bit ARM, this is {family}")
    wide = bool(features.get("avx512f"))
    return Host(
        binding.get_host_cpu_name(), features.flatten(), 16 if wide else 8, wide, wide or bool(features.get("avx2"))
    )


def maker(target: Host) -> dict[str, str] | None:
    """The processor, versions and sources on which compiled code depends; None if the sources cannot be read."""
    sources = source_hash(Path(__file__).parent)
    if sources is None:
        return None
    return {
        "processor": f"{binding.get_process_triple()} {target.cpu} {target.features}",
        "lanes": f"{target.width}{' permuting' if target.permutes else ''}{' looking up' if target.looks_up else ''}",
        "llvmlite": f"{llvmlite.__version__}, LLVM {'.'.join(map(str, binding.llvm_version_info))}",
        "numpy": np.__version__,
        "ggufmoe": __version__,
        "sources": sources,
    }


def code_cache() -> CodeCache | None:
    """The user's cache of code for this machine; None if there is no folder for it, or the sources cannot be read."""
    folder, made_by = cache_directory(), maker(host())
    return None if folder is None or made_by is None else CodeCache(folder / "kernels", made_by)


def compile_kernel(geometry: Geometry, body: Body, target: Host | None = None) -> Code:
    """Compile ``body`` to object code. Raises RuntimeError if LLVM fails."""
    return _compiled(geometry, _over_tiles(body), target)


def compile_row_energies(source: Source, target: Host | None = None) -> Code:
    """Compile ``Tiles.write_row_energies``, which writes the mean square of each row, to object code."""
    return _compiled(Geometry(32, 4, source, weighted=False), Tiles.write_row_energies, target)


def compile_conversion(source: Source, result: Source, step: int) -> Code:
    """Compile ``Tiles.convert_floats``, which converts numbers ``step`` at a time, to object code."""
    geometry = Geometry(step, step * result.item_bytes, source, weighted=False)
    return _compiled(geometry, lambda k: k.convert_floats(result), None)


def link(code: Code, target: Host | None = None) -> Native:
    """Load object code as a callable function. Raises RuntimeError if LLVM fails."""
    with _COMPILING:
        machine = _target_machine(target or host())
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        engine.add_object_file(ObjectFileRef.from_data(code.object_code))
        engine.finalize_object()
        return Native(_PROTOTYPE(engine.get_function_address("quantize")), code.scratch_bytes, engine)


def assembly(geometry: Geometry, body: Body, target: Host | None = None) -> str:
    """The assembly language of the code that ``compile_kernel`` makes."""
    with _COMPILING:
        _, module, machine = _module(geometry, _over_tiles(body), target or host())
        return str(machine.emit_assembly(module))


def _over_tiles(body: Body) -> Callable[[Tiles], None]:
    def write(k: Tiles) -> None:
        with k.tiles() as (weights, importances):
            body(k, weights, importances)

    return write


def _compiled(geometry: Geometry, write: Callable[[Tiles], None], target: Host | None) -> Code:
    with _COMPILING:
        scratch_bytes, module, machine = _module(geometry, write, target or host())
        return Code(machine.emit_object(module), scratch_bytes)


def _module(geometry: Geometry, write: Callable[[Tiles], None], target: Host) -> tuple[int, Any, Any]:
    """Returns the bytes of scratch memory, the optimized LLVM module, and its target machine."""
    k = Tiles(geometry, target.width, target.permutes, target.looks_up)
    write(k)
    machine = _target_machine(target)
    k.module.triple, k.module.data_layout = machine.triple, str(machine.target_data)
    return k.scratch_bytes, _optimized(str(k.module), machine), machine


def _target_machine(target: Host) -> Any:
    host()  # initializes LLVM, for any target
    return binding.Target.from_triple(binding.get_process_triple()).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, jit=True
    )


def _optimized(text: str, machine: Any) -> Any:
    """The module with its variables in registers.

    Kernels are written as they shall run. LLVM's pipeline O1 doubles the time of compiling, and makes only those of
    IQ4_NL and IQ4_XS without importances faster than before by more than the noise of measuring (7 to 9 %).
    """
    module = binding.parse_assembly(text)
    module.verify()
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=1))
    passes = binding.create_new_function_pass_manager()
    passes.add_sroa_pass()
    for function in module.functions:
        if not function.is_declaration:
            passes.run(function, builder)
    return module
