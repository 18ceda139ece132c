"""From a kernel written in lanes to a native function of this machine.

Owns the choice of vector width, the optimizer's settings and the lifetime of compiled code. Code is made anew in each
process (a few tenths of a second for a format that is used), so no cache on disk can ever be stale.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import binding

from ggufmoe.quant.kernels.lanes import Rows
from ggufmoe.quant.kernels.tiles import Geometry, Source, Tiles

Body = Callable[[Tiles, Rows, Rows | None], None]

_ADDRESS = ctypes.c_void_p
_PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int64, _ADDRESS, _ADDRESS, ctypes.c_int64, ctypes.c_int64, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS
)
_COMPILING = threading.Lock()


@dataclass(frozen=True)
class Host:
    """What kernels are compiled for: LLVM's name of the processor, its features, the lanes of one vector."""

    cpu: str
    features: str
    width: int
    permutes: bool


@dataclass(frozen=True)
class Native:
    """A compiled kernel. ``engine`` owns the code that ``call`` points at."""

    call: Any
    scratch_bytes: int
    compile_s: float
    assembly: str
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
    return Host(binding.get_host_cpu_name(), features.flatten(), 16 if wide else 8, wide)


def compile_kernel(geometry: Geometry, body: Body, target: Host | None = None, *, listing: bool = False) -> Native:
    """Native code for ``body``; ``listing`` keeps its assembly. Raises RuntimeError where LLVM cannot."""

    def write(k: Tiles) -> None:
        with k.tiles() as (weights, importances):
            body(k, weights, importances)

    return _compiled(geometry, write, target, listing)


def compile_row_energies(source: Source, target: Host | None = None) -> Native:
    """Native code that writes the mean square of each row of blocks of 32 (``Tiles.write_row_energies``)."""
    return _compiled(Geometry(32, 4, source, weighted=False), Tiles.write_row_energies, target, False)


def _compiled(geometry: Geometry, write: Callable[[Tiles], None], target: Host | None, listing: bool) -> Native:
    start = time.perf_counter()
    with _COMPILING:
        here = host()  # in any case: it also sets LLVM up
        target = target or here
        k = Tiles(geometry, target.width, target.permutes)
        write(k)
        k.module.triple = binding.get_process_triple()
        machine = binding.Target.from_triple(k.module.triple).create_target_machine(
            cpu=target.cpu, features=target.features, opt=3, jit=True
        )
        k.module.data_layout = str(machine.target_data)
        module = _optimized(str(k.module), machine)
        assembly = machine.emit_assembly(module) if listing else ""
        engine = binding.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        call = _PROTOTYPE(engine.get_function_address("quantize"))
    return Native(call, k.scratch_bytes, time.perf_counter() - start, assembly, engine)


def _optimized(text: str, machine: Any) -> Any:
    module = binding.parse_assembly(text)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    # the code is vectorized as written; these passes would only take time
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module
