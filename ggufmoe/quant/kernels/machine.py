"""From a kernel written in lanes to a native function of this machine.

Owns the choice of vector width, the optimizer's settings, what identifies compiled code, and its lifetime in memory.
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

from ggufmoe.quant.kernels.code_cache import Code, source_hash
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
    """What kernels are compiled for: LLVM's name of the processor, its features, the lanes of one vector.

    ``permutes``: with AVX-512's permutation of 32 floats; ``looks_up``: with one of as many floats as there are lanes.
    """

    cpu: str
    features: str
    width: int
    permutes: bool
    looks_up: bool = False


@dataclass(frozen=True)
class Native:
    """A kernel that can be called. ``engine`` owns the code that ``call`` points at."""

    call: Any
    scratch_bytes: int
    engine: Any


@cache
def host() -> Host:
    """This machine: 16 lanes with AVX-512, otherwise 8 (two registers where vectors hold 4).

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
    """What compiled code depends on besides its kernel's name; None where the sources cannot be read."""
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


def compile_kernel(geometry: Geometry, body: Body, target: Host | None = None) -> Code:
    """Object code for ``body``. Raises RuntimeError where LLVM cannot."""
    return _compiled(geometry, _over_tiles(body), target)


def compile_row_energies(source: Source, target: Host | None = None) -> Code:
    """Object code that writes the mean square of each row of blocks of 32 (``Tiles.write_row_energies``)."""
    return _compiled(Geometry(32, 4, source, weighted=False), Tiles.write_row_energies, target)


def link(code: Code, target: Host | None = None) -> Native:
    """Object code as a function that can be called. Raises RuntimeError where LLVM cannot."""
    with _COMPILING:
        machine = _target_machine(target or host())
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        engine.add_object_file(ObjectFileRef.from_data(code.object_code))
        engine.finalize_object()
        return Native(_PROTOTYPE(engine.get_function_address("quantize")), code.scratch_bytes, engine)


def assembly(geometry: Geometry, body: Body, target: Host | None = None) -> str:
    """What ``compile_kernel`` makes, in assembly language."""
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
    """The bytes of scratch memory, the optimized module, and the machine that it is for."""
    k = Tiles(geometry, target.width, target.permutes, target.looks_up)
    write(k)
    machine = _target_machine(target)
    k.module.triple, k.module.data_layout = machine.triple, str(machine.target_data)
    return k.scratch_bytes, _optimized(str(k.module), machine), machine


def _target_machine(target: Host) -> Any:
    host()  # sets LLVM up, whatever is compiled for
    return binding.Target.from_triple(binding.get_process_triple()).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, jit=True
    )


def _optimized(text: str, machine: Any) -> Any:
    module = binding.parse_assembly(text)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    # the code is vectorized as written; these passes would only take time
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module
