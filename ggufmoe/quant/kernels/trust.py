"""Chooses the routine that quantizes a format: a compiled kernel that gives ggml's bytes, or ggml's own routine.

At the first use of a format (per dtype of source, with or without importances) its kernel is compiled, or loaded from
the user's cache, and quantizes a tile of ordinary and extreme blocks. The hash of its bytes must equal the stored hash,
which was made with the pinned ggml on x86-64. If a byte differs, llvmlite is missing or LLVM does not support the
machine, ggml's routine is used for that format. The results are kept for the life of the process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import EngineMissingError
from ggufmoe.folders import cache_directory
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant.kernels.code_cache import Code, CodeCache
from ggufmoe.quant.kernels.probe_hashes import HASHES
from ggufmoe.quant.kernels.probe_tile import fingerprint, hash_name, probe, probe_importances

if TYPE_CHECKING:
    from ggufmoe.quant.kernels.machine import Host, Native

_LOG = logging.getLogger("ggufmoe")
PATIENCE_S = 0.4  # of ggml's routine before a kernel is compiled, which takes about as long
_ALIGNMENT = 64  # bytes of the widest vector
_SOURCES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}

_NAMES = "Q2_K Q3_K Q4_K Q5_K Q6_K Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 NVFP4 IQ4_NL IQ4_XS"
_GRID_NAMES = "IQ3_S IQ3_XXS IQ2_S IQ2_XS IQ2_XXS IQ1_S IQ1_M"
_MODULES = {GGMLType[name]: name.lower() for name in f"{_NAMES} {_GRID_NAMES}".split()}
# here ggml spreads importances by the mean square of the whole row
_ROW_ENERGY = frozenset({GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1})


@dataclass(frozen=True)
class KernelReport:
    """The routine that quantizes one format in this process, and the reason."""

    type: GGMLType
    source: str
    weighted: bool
    routine: str
    reason: str
    compile_s: float


@dataclass(frozen=True)
class _Verdict:
    report: KernelReport
    kernel: Kernel | None


_Key = tuple[GGMLType, str, bool]


class Kernels:
    """The kernels of one process; each is compiled and checked once, by the first thread that needs it."""

    def __init__(self) -> None:
        self._verdicts: dict[_Key, _Verdict] = {}
        self._spent_s: dict[_Key, float] = {}
        self._ggml_agrees: dict[_Key, bool] = {}
        self._lock = threading.Lock()

    def judged(
        self, type: GGMLType, dtype: str, weighted: bool, *, cache: bool = True
    ) -> tuple[Kernel | None, KernelReport]:
        """Return the checked kernel, or None if ggml's routine is to be used, and the report that says why.

        ``cache``: whether compiled code is loaded from the user's cache folder and saved there.
        """
        key = (type, _SOURCES[dtype], weighted)
        if key not in self._verdicts:
            with self._lock:
                if key not in self._verdicts:
                    self._verdicts[key] = _judge(*key, cache)
        verdict = self._verdicts[key]
        return verdict.kernel, verdict.report

    def worthwhile(self, type: GGMLType, dtype: str, weighted: bool, *, cache: bool = True) -> Kernel | None:
        """The trusted kernel where it is compiled, cached or worth compiling; None where ggml's routine shall run.

        One thread compiles and the others go on with ggml's routine, if that gives the same bytes. Where it does not,
        as on most ARM machines, all wait for the kernel. A kernel that the cache has is used at once.
        """
        key = (type, _SOURCES[dtype], weighted)
        if key not in self._verdicts:
            if key not in self._spent_s:
                self._ggml_agrees[key] = _ggml_agrees(*key)
                self._spent_s[key] = PATIENCE_S if cache and _is_cached(*key) else 0.0
            if not self._ggml_agrees[key]:
                return self.judged(type, dtype, weighted, cache=cache)[0]
            if self._spent_s[key] < PATIENCE_S or not self._lock.acquire(blocking=False):
                return None
            try:
                if key not in self._verdicts:
                    self._verdicts[key] = _judge(*key, cache)
            finally:
                self._lock.release()
        return self._verdicts[key].kernel

    def spent(self, type: GGMLType, dtype: str, weighted: bool, seconds: float) -> None:
        """Record that ggml's routine took ``seconds`` for a format that has a kernel."""
        key = (type, _SOURCES[dtype], weighted)
        self._spent_s[key] = self._spent_s.get(key, 0.0) + seconds

    def report(self) -> list[KernelReport]:
        """The reports of all kernels checked so far, in order."""
        return [verdict.report for verdict in list(self._verdicts.values())]


def has_kernel(type: GGMLType) -> bool:
    """Whether ggufmoe has a kernel for this format; ggml's routine makes all others."""
    return type in _MODULES


def _judge(type: GGMLType, source: str, weighted: bool, cache: bool) -> _Verdict:
    start = time.perf_counter()
    kernel: Kernel | None = None
    try:
        kernel = compile_format(type, source, weighted, cache=_code_cache() if cache else None)
        reason = _difference(kernel, source)
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        reason = f"no kernel could be compiled: {' '.join(str(error).split())}"
    elapsed_s = time.perf_counter() - start
    name = hash_name(type, source, weighted)
    if reason:
        _LOG.warning("%s: ggml's own routine is used (%s)", name, reason)
        return _Verdict(KernelReport(type, source, weighted, "ggml", reason, elapsed_s), None)
    _LOG.info("%s: kernel compiled or loaded, and checked, in %.2f s", name, elapsed_s)
    return _Verdict(KernelReport(type, source, weighted, "fast", "same bytes as ggml", elapsed_s), kernel)


def _ggml_agrees(type: GGMLType, source: str, weighted: bool) -> bool:
    """Whether ggml's routine gives the same bytes on this machine as on x86-64; False if ggml is not installed."""
    weights = probe(type, source)
    made = np.zeros((len(weights), type.row_bytes(weights.shape[1])), np.uint8)
    try:
        quantizing.quantize_chunk(type, widened(weights), made, probe_importances() if weighted else None)
    except EngineMissingError:
        return False
    return fingerprint(made) == HASHES[hash_name(type, source, weighted)].ggml


def _code_cache() -> CodeCache | None:
    folder = cache_directory()
    machine = import_module("ggufmoe.quant.kernels.machine")
    maker = machine.maker(machine.host())
    return None if folder is None or maker is None else CodeCache(folder / "kernels", maker)


def _is_cached(type: GGMLType, source: str, weighted: bool) -> bool:
    try:
        cache = _code_cache()
    except (ImportError, OSError, RuntimeError):
        return False
    return cache is not None and cache.has(_code_name(type, source, weighted))


def _code_name(type: GGMLType, source: str, weighted: bool) -> str:
    return f"{_MODULES[type]}-{type.name}-{source}{'-weighted' if weighted else ''}"


@dataclass(frozen=True)
class Kernel:
    """Native code for a format, and for the mean squares of rows if the format needs them with importances."""

    type: GGMLType
    weighted: bool
    native: Native
    row_energies: Native | None

    def call(
        self, src: NDArray[Any], dst: NDArray[np.uint8], imatrix: NDArray[np.float32] | None
    ) -> NDArray[np.uint8] | None:
        """Quantize ``src`` into ``dst``. Returns (rows, blocks per row) uint8 with 1 for each block that it cannot do.

        Returns None if there is no such block. These are blocks that span less than 1e-36 or more than a float holds,
        for which ggml's arithmetic overflows.
        """
        n_rows, n_cols = src.shape
        per_row = n_cols // self.type.block_size
        odd = np.zeros((n_rows, per_row), np.uint8)
        energies = np.empty(n_rows, np.float32)
        if self.row_energies is not None:
            self.row_energies.call(src.ctypes.data, energies.ctypes.data, n_rows, per_row, None, None, None, None)
        scratch = np.empty(self.native.scratch_bytes + _ALIGNMENT, np.uint8)
        some_odd = self.native.call(
            src.ctypes.data,
            dst.ctypes.data,
            odd.size,
            per_row,
            None if imatrix is None else imatrix.ctypes.data,
            energies.ctypes.data,
            odd.ctypes.data,
            -(-scratch.ctypes.data // _ALIGNMENT) * _ALIGNMENT,
        )
        return odd if some_odd else None


def compile_format(
    type: GGMLType, source: str, weighted: bool, target: Host | None = None, *, cache: CodeCache | None = None
) -> Kernel:
    """Compile or load the kernel of a format, unchecked, for this machine or ``target``; ``cache``: this one only."""
    tiles = import_module("ggufmoe.quant.kernels.tiles")
    machine = import_module("ggufmoe.quant.kernels.machine")

    def compile_whole() -> Code:
        module = import_module(f"ggufmoe.quant.kernels.{_MODULES[type]}")
        geometry = tiles.Geometry(type.block_size, type.block_bytes, tiles.Source[source], weighted)
        code: Code = machine.compile_kernel(geometry, module.quantize, target)
        return code

    def linked(name: str, make: Callable[[], Code]) -> Native:
        code = None if cache is None else cache.load(name)
        if code is None:
            code = make()
            if cache is not None:
                cache.save(name, code)
        native: Native = machine.link(code, target)
        return native

    row_energies = None
    if weighted and type in _ROW_ENERGY:
        row_energies = linked(
            f"row_energies-{source}", lambda: machine.compile_row_energies(tiles.Source[source], target)
        )
    return Kernel(type, weighted, linked(_code_name(type, source, weighted), compile_whole), row_energies)


def _difference(kernel: Kernel, source: str) -> str:
    """How the kernel's bytes for the probe differ from ggml's on x86-64, as a text; empty if they are equal."""
    weights = probe(kernel.type, source)
    made = np.zeros((len(weights), kernel.type.row_bytes(weights.shape[1])), np.uint8)
    odd = kernel.call(weights, made, probe_importances() if kernel.weighted else None)
    expected = HASHES[hash_name(kernel.type, source, kernel.weighted)]
    return "" if fingerprint(made, odd) == expected.kernel else "a test tile's bytes are not those of ggml on x86-64"


def widened(src: NDArray[Any]) -> NDArray[np.float32]:
    """``src`` (float32, float16, or uint16 with bfloat16 bits) as float32, exactly."""
    if src.dtype == np.float32:
        return src
    wide = np.empty(src.shape, np.float32)
    (quantizing.f16_to_f32 if src.dtype == np.float16 else quantizing.bf16_to_f32)(src, wide)
    return wide


def run(kernel: Kernel, src: NDArray[Any], dst: NDArray[np.uint8], imatrix: NDArray[np.float32] | None = None) -> None:
    """Quantize with a compiled kernel; rows with a block that it cannot do are quantized by ggml's routine."""
    odd = kernel.call(src, dst, imatrix)
    if odd is not None:
        rows = np.nonzero(odd.any(axis=1))[0]
        redone = np.empty((len(rows), dst.shape[1]), np.uint8)
        quantizing.quantize_chunk(kernel.type, widened(src[rows]), redone, imatrix)
        dst[rows] = redone
