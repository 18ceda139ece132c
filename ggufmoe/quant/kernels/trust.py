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

from ggufmoe.errors import EngineMissingError, NonFiniteError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant.kernels.code_cache import Code, CodeCache
from ggufmoe.quant.kernels.conversions import CONVERSIONS
from ggufmoe.quant.kernels.probe_hashes import GGML_ALONE, HASHES
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
        self._ggml_tested: set[GGMLType] = set()
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

    def tell_of_other_bytes(self, type: GGMLType) -> None:
        """Log once if this machine's ggml makes other bytes than x86-64's for a format that has no kernel."""
        with self._lock:
            if type in self._ggml_tested:
                return
            self._ggml_tested.add(type)
        made = _made_by_ggml(type, "F32", weighted=False)
        if made is not None and fingerprint(made) != GGML_ALONE[type.name]:
            _LOG.warning("%s: this machine's llama.cpp makes other bytes than on x86-64; there is no kernel", type.name)

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
        machine = import_module("ggufmoe.quant.kernels.machine")
        kernel = compile_format(type, source, weighted, cache=machine.code_cache() if cache else None)
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
    made = _made_by_ggml(type, source, weighted)
    return made is not None and fingerprint(made) == HASHES[hash_name(type, source, weighted)].ggml


def _made_by_ggml(type: GGMLType, source: str, weighted: bool) -> NDArray[np.uint8] | None:
    """The probe, quantized by ggml's routine; None if ggml is not installed."""
    weights = probe(type, source)
    made = np.zeros((len(weights), type.row_bytes(weights.shape[1])), np.uint8)
    try:
        quantizing.quantize_chunk(type, widened(weights), made, probe_importances() if weighted else None)
    except EngineMissingError:
        return None
    return made


def _is_cached(type: GGMLType, source: str, weighted: bool) -> bool:
    try:
        cache = import_module("ggufmoe.quant.kernels.machine").code_cache()
    except (ImportError, OSError, RuntimeError):
        return False
    return cache is not None and cache.has(_code_name(type, source, weighted))


def _code_name(type: GGMLType, source: str, weighted: bool) -> str:
    return f"{_MODULES[type]}-{type.name}-{source}{'-weighted' if weighted else ''}"


@dataclass(frozen=True)
class Kernel:
    """Native code for a format, and for the mean squares of rows if the format needs them with importances.

    ``unbounded`` is the kernel for the rows with blocks that this one does not do, if the format has one.
    """

    type: GGMLType
    weighted: bool
    native: Native
    row_energies: Native | None
    unbounded: Unbounded | None = None

    def call(
        self, src: NDArray[Any], dst: NDArray[np.uint8], imatrix: NDArray[np.float32] | None
    ) -> NDArray[np.uint8] | None:
        """Quantize ``src`` into ``dst``. Returns (rows, blocks per row) uint8 with 1 for each block that it cannot do.

        Returns None if there is no such block. These are blocks that span less than 1e-36 or more than a float holds,
        for which ggml's arithmetic leaves its range or overflows.
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


class Unbounded:
    """The kernel for blocks of any magnitude: compiled and checked at its first use, by the first thread."""

    def __init__(self, make: Callable[[], Kernel]) -> None:
        self._make: Callable[[], Kernel] | None = make
        self._kernel: Kernel | None = None
        self._lock = threading.Lock()

    def kernel(self, usual: Kernel, source: str) -> Kernel | None:
        """The checked kernel; None if it cannot be compiled, or if together with ``usual`` it has other bytes."""
        with self._lock:
            if self._make is not None:
                made = self._make
                self._make = None
                self._kernel = self._checked(made, usual, source)
            return self._kernel

    @staticmethod
    def _checked(make: Callable[[], Kernel], usual: Kernel, source: str) -> Kernel | None:
        name = hash_name(usual.type, source, usual.weighted)
        weights, importances = probe(usual.type, source), probe_importances() if usual.weighted else None
        blocks = np.zeros((len(weights), usual.type.row_bytes(weights.shape[1])), np.uint8)
        try:
            kernel = make()
        except (ImportError, OSError, RuntimeError) as error:
            _LOG.warning("%s: no kernel for extreme weights could be compiled: %s", name, " ".join(str(error).split()))
            return None
        odd = usual.call(weights, blocks, importances)
        if odd is not None:
            _redo(kernel, weights, blocks, importances, odd)
        if fingerprint(blocks) == HASHES[name].ggml:
            return kernel
        _LOG.warning("%s: the kernel for extreme weights has other bytes than ggml on x86-64", name)
        return None


def compile_format(
    type: GGMLType, source: str, weighted: bool, target: Host | None = None, *, cache: CodeCache | None = None
) -> Kernel:
    """Compile or load the kernel of a format, unchecked, for this machine or ``target``; ``cache``: this one only."""
    tiles = import_module("ggufmoe.quant.kernels.tiles")
    machine = import_module("ggufmoe.quant.kernels.machine")

    def compile_whole(unbounded: bool) -> Code:
        module = import_module(f"ggufmoe.quant.kernels.{_MODULES[type]}")
        geometry = tiles.Geometry(type.block_size, type.block_bytes, tiles.Source[source], weighted, unbounded)
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

    name, row_energies = _code_name(type, source, weighted), None
    if weighted and type in _ROW_ENERGY:
        row_energies = linked(
            f"row_energies-{source}", lambda: machine.compile_row_energies(tiles.Source[source], target)
        )

    def compile_unbounded() -> Kernel:
        native = linked(f"{name}-unbounded", lambda: compile_whole(unbounded=True))
        return Kernel(type, weighted, native, row_energies)

    native = linked(name, lambda: compile_whole(unbounded=False))
    return Kernel(type, weighted, native, row_energies, Unbounded(compile_unbounded))


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
    CONVERSIONS.convert(src, wide)
    return wide


def run(
    kernel: Kernel,
    src: NDArray[Any],
    dst: NDArray[np.uint8],
    imatrix: NDArray[np.float32] | None = None,
    *,
    ggml: bool = True,
) -> None:
    """Quantize with a compiled kernel, and rows with a block that it cannot do with its unbounded kernel.

    Rows that even that cannot do, because ggml's arithmetic overflows, are left to ggml's routine, which may end the
    process. Raises NonFiniteError for them without an engine, or if ``ggml`` is False and this machine's ggml has
    other bytes than x86-64's.
    """
    source = _SOURCES[src.dtype.name]
    odd = kernel.call(src, dst, imatrix)
    if odd is not None and kernel.unbounded is not None:
        unbounded = kernel.unbounded.kernel(kernel, source)
        if unbounded is not None:
            odd = _redo(unbounded, src, dst, imatrix, odd)
    if odd is None:
        return
    rows = np.nonzero(odd.any(axis=1))[0]
    agrees = _ggml_agrees(kernel.type, source, kernel.weighted)
    message = (
        f"{kernel.type.name}: {len(rows)} of {len(src)} rows have weights so large that only llama.cpp on x86-64 could "
        "quantize them; give the tensor another type with --tensor-type"
    )
    if not agrees and not ggml:
        raise NonFiniteError(message)
    redone = np.empty((len(rows), dst.shape[1]), np.uint8)
    try:
        quantizing.quantize_chunk(kernel.type, widened(src[rows]), redone, imatrix)
    except EngineMissingError as error:
        raise NonFiniteError(message) from error
    if not agrees:
        _LOG.warning("%s; this machine's llama.cpp is used, whose bytes differ", message.partition(";")[0])
    dst[rows] = redone


def _redo(
    kernel: Kernel,
    src: NDArray[Any],
    dst: NDArray[np.uint8],
    imatrix: NDArray[np.float32] | None,
    odd: NDArray[np.uint8],
) -> NDArray[np.uint8] | None:
    """Quantize the rows with an odd block once more; gives what is odd then, (rows, blocks per row), or None."""
    rows = np.nonzero(odd.any(axis=1))[0]
    redone = np.empty((len(rows), dst.shape[1]), np.uint8)
    still_odd = kernel.call(src[rows], redone, imatrix)
    dst[rows] = redone
    if still_odd is None:
        return None
    left = np.zeros_like(odd)
    left[rows] = still_odd
    return left
