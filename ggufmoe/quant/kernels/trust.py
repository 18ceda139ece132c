"""Which routine quantizes a format here: a compiled kernel that has shown ggml's bytes, or ggml's own.

At the first use of a format (per kind of source, with or without importances) its kernel is compiled and one tile of
easy and nasty blocks is quantized both ways. One byte of difference, a missing llvmlite or a machine LLVM cannot
serve, and ggml's routine takes over for that format. Owns the verdicts of this process.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import library as native

if TYPE_CHECKING:
    from ggufmoe.quant.kernels.machine import Host, Native

_LOG = logging.getLogger("ggufmoe")
PATIENCE_S = 0.4  # of ggml's routine before a kernel is compiled, which takes about as long
_ALIGNMENT = 64  # bytes of the widest vector
_SOURCES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}

_MODULES = {
    GGMLType[name]: name.lower()
    for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
}
# here ggml spreads importances by the mean square of the whole row
_ROW_ENERGY = frozenset({GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1})


@dataclass(frozen=True)
class KernelReport:
    """What quantizes one format in this process, and why."""

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
    """The kernels of one process: compiled and checked once each, whichever thread comes first."""

    def __init__(self) -> None:
        self._verdicts: dict[_Key, _Verdict] = {}
        self._spent_s: dict[_Key, float] = {}
        self._lock = threading.Lock()

    def judged(self, type: GGMLType, dtype: str, weighted: bool) -> tuple[Kernel | None, KernelReport]:
        """The trusted kernel, or None where ggml's routine is to be used, and the report that says why."""
        key = (type, _SOURCES[dtype], weighted)
        if key not in self._verdicts:
            with self._lock:
                if key not in self._verdicts:
                    self._verdicts[key] = _judge(*key)
        verdict = self._verdicts[key]
        return verdict.kernel, verdict.report

    def worthwhile(self, type: GGMLType, dtype: str, weighted: bool) -> Kernel | None:
        """The trusted kernel once compiling it pays, which small models never reach; None while ggml shall do it.

        One thread compiles and the others go on with ggml's routine; the bytes are the same.
        """
        key = (type, _SOURCES[dtype], weighted)
        if key not in self._verdicts:
            if self._spent_s.get(key, 0.0) < PATIENCE_S or not self._lock.acquire(blocking=False):
                return None
            try:
                if key not in self._verdicts:
                    self._verdicts[key] = _judge(*key)
            finally:
                self._lock.release()
        return self._verdicts[key].kernel

    def spent(self, type: GGMLType, dtype: str, weighted: bool, seconds: float) -> None:
        """Note that ggml's routine took this long for a format that has a kernel."""
        key = (type, _SOURCES[dtype], weighted)
        self._spent_s[key] = self._spent_s.get(key, 0.0) + seconds

    def report(self) -> list[KernelReport]:
        """What has been judged so far, in order."""
        return [verdict.report for verdict in list(self._verdicts.values())]


def has_kernel(type: GGMLType) -> bool:
    """Whether this format has a kernel of its own (others are ggml's business on every machine)."""
    return type in _MODULES


def _judge(type: GGMLType, source: str, weighted: bool) -> _Verdict:
    start = time.perf_counter()
    kernel: Kernel | None = None
    try:
        kernel = compile_format(type, source, weighted)
        reason = _difference(kernel, source)
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        reason = f"no kernel could be compiled: {' '.join(str(error).split())}"
    elapsed_s = time.perf_counter() - start
    name = f"{type.name} from {source}{' with importances' if weighted else ''}"
    if reason:
        _LOG.warning("%s: ggml's own routine is used (%s)", name, reason)
        return _Verdict(KernelReport(type, source, weighted, "ggml", reason, elapsed_s), None)
    _LOG.info("%s: kernel compiled and checked against ggml in %.1f s", name, elapsed_s)
    return _Verdict(KernelReport(type, source, weighted, "fast", "same bytes as ggml", elapsed_s), kernel)


@dataclass(frozen=True)
class Kernel:
    """Native code for a format, and for the sums over rows where its importances want them."""

    type: GGMLType
    weighted: bool
    native: Native
    row_energies: Native | None


def compile_format(type: GGMLType, source: str, weighted: bool, target: Host | None = None) -> Kernel:
    """The kernel of a format, unchecked, for this machine or for ``target``."""
    tiles = import_module("ggufmoe.quant.kernels.tiles")
    machine = import_module("ggufmoe.quant.kernels.machine")
    module = import_module(f"ggufmoe.quant.kernels.{_MODULES[type]}")
    geometry = tiles.Geometry(type.block_size, type.block_bytes, tiles.Source[source], weighted)
    compiled = machine.compile_kernel(geometry, module.quantize, target)
    wants_energies = weighted and type in _ROW_ENERGY
    row_energies = machine.compile_row_energies(tiles.Source[source], target) if wants_energies else None
    return Kernel(type, weighted, compiled, row_energies)


def _difference(kernel: Kernel, source: str) -> str:
    weights = probe(source)
    n_rows, n_cols = weights.shape
    imatrix = probe_importances(n_cols) if kernel.weighted else None
    ours, theirs = (np.zeros((n_rows, kernel.type.row_bytes(n_cols)), np.uint8) for _ in range(2))
    run(kernel, weights, ours, imatrix)
    native.quantize_chunk(kernel.type, widened(weights), theirs, imatrix)
    n_differing = int(np.count_nonzero(ours != theirs))
    return f"{n_differing} of {ours.size} bytes of a test tile differ from ggml's" if n_differing else ""


def probe_importances(n_cols: int) -> NDArray[np.float32]:
    """Importances of very different sizes, some of them 0."""
    importances: NDArray[np.float32] = np.random.default_rng(1).random(n_cols, np.float32) ** 9
    importances[::7] = 0
    return importances


def probe(source: str) -> NDArray[Any]:
    """Rows of 1024 weights to test a kernel with: ordinary, heavy-tailed, constant, zero, tiny, huge, mixed."""
    generator = np.random.default_rng(0)
    shape = (16, 1024)
    rows = generator.normal(0, 0.02, shape)
    rows[1] = generator.standard_t(2, 1024)
    rows[2] = 0
    rows[3], rows[4] = 0.3, -0.3
    rows[5] = np.resize([1.5, -1.5], 1024)
    for row, scale in ((6, 1e-12), (7, 1e-22), (8, 1e-41), (9, 1e15), (10, 1e30), (11, 1e37)):
        rows[row] *= scale / 0.02
    rows[12] = np.abs(rows[12]) + 1
    rows[13] = rows[13] * 1e-4 - 1
    kinds = generator.integers(0, 12, 1024 // 16)
    rows[14] = rows[kinds.repeat(16), np.arange(1024)]
    rows[15, ::2] = 0
    largest = np.finfo(np.float16 if source == "F16" else np.float32).max
    narrow = np.clip(rows, -largest, largest).astype(np.float16 if source == "F16" else np.float32)
    return (narrow.view(np.uint32) >> 16).astype(np.uint16) if source == "BF16" else narrow


def widened(src: NDArray[Any]) -> NDArray[np.float32]:
    """``src`` (float32, float16, or uint16 with bfloat16 bits) as float32, exactly."""
    if src.dtype == np.float32:
        return src
    wide = np.empty(src.shape, np.float32)
    (native.f16_to_f32 if src.dtype == np.float16 else native.bf16_to_f32)(src, wide)
    return wide


def run(kernel: Kernel, src: NDArray[Any], dst: NDArray[np.uint8], imatrix: NDArray[np.float32] | None = None) -> None:
    """Quantize with a compiled kernel; rows that hold a block it cannot do are given to ggml.

    Those are blocks that span less than 1e-36 or more than a float holds: ggml's arithmetic overflows there.
    """
    n_rows, n_cols = src.shape
    per_row = n_cols // kernel.type.block_size
    odd = np.zeros(n_rows * per_row, np.uint8)
    energies = np.empty(n_rows, np.float32)
    if kernel.row_energies is not None:
        kernel.row_energies.call(src.ctypes.data, energies.ctypes.data, n_rows, per_row, None, None, None, None)
    scratch = np.empty(kernel.native.scratch_bytes + _ALIGNMENT, np.uint8)
    some_odd = kernel.native.call(
        src.ctypes.data,
        dst.ctypes.data,
        odd.size,
        per_row,
        None if imatrix is None else imatrix.ctypes.data,
        energies.ctypes.data,
        odd.ctypes.data,
        -(-scratch.ctypes.data // _ALIGNMENT) * _ALIGNMENT,
    )
    if some_odd:
        rows = np.nonzero(odd.reshape(n_rows, per_row).any(axis=1))[0]
        redone = np.empty((len(rows), dst.shape[1]), np.uint8)
        native.quantize_chunk(kernel.type, widened(src[rows]), redone, imatrix)
        dst[rows] = redone
