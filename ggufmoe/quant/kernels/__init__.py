"""The entry point of all kernels: ``quantize_rows`` turns rows of floats into ggml's blocks.

``quantize_rows`` gives ggml's bytes for every type, from whichever routine does it fastest on this machine. One file
per format; ggml is the reference that all others must equal, and takes over where a kernel does not (``trust``).
"""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import OptionError
from ggufmoe.gguf.floats import FLOAT_DTYPES
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant.filetypes import IGNORES_IMATRIX
from ggufmoe.quant.kernels.conversions import CONVERSIONS
from ggufmoe.quant.kernels.trust import KernelReport, Kernels, has_kernel, run, widened

QuantizerName = Literal["auto", "fast", "ggml"]
QUANTIZERS: tuple[QuantizerName, ...] = ("auto", "fast", "ggml")
_FLOATS = {GGMLType.F32: np.float32, GGMLType.F16: np.float16, GGMLType.BF16: np.uint16}
_KERNELS = Kernels()


def quantize_rows(
    type: GGMLType,
    src: NDArray[Any],
    dst: NDArray[np.uint8],
    imatrix: NDArray[np.float32] | None = None,
    quantizer: QuantizerName = "auto",
    *,
    cache: bool = True,
) -> None:
    """Quantize ``src`` (rows, n_cols) into ``dst`` (rows, ``type.row_bytes(n_cols)``) uint8.

    ``src`` is float32, float16, or uint16 with bfloat16 bits. ``imatrix`` has one importance per column, float32
    (n_cols,). ``type`` may also be F32, F16 or BF16.
    ``quantizer``: ``auto`` uses a compiled kernel that gives ggml's bytes, once there is enough work to pay for
    compiling it, and ggml's routine otherwise; ``ggml`` always uses ggml's routine; ``fast`` compiles at once, and
    raises OptionError if the kernel of the format cannot be used. ``cache``: whether compiled kernels are loaded from
    the user's cache folder and saved there. Raises ValueError for arrays of wrong dtype, shape or layout, and
    NonFiniteError for weights so large that ggml's arithmetic overflows, if ggml cannot be used for them here.
    Several threads may call this at the same time; it releases the interpreter's lock while it computes.
    """
    if quantizer not in QUANTIZERS:
        raise OptionError(f"quantizer is {quantizer}, expected auto, fast or ggml")
    if not type.is_quantized:
        made = dst.view(_FLOATS[type])
        if quantizer == "ggml" and src.dtype != made.dtype:
            _convert_by_ggml(src, made)
        else:
            CONVERSIONS.convert(src, made, cache=cache)
        return
    _check_layout(type, src, dst, imatrix)
    if type in IGNORES_IMATRIX:
        imatrix = None
    weighted = imatrix is not None
    if quantizer == "auto" and not has_kernel(type):
        _KERNELS.tell_of_other_bytes(type)
    if quantizer == "ggml" or not src.size or not has_kernel(type):
        quantizing.quantize_chunk(type, widened(src), dst, imatrix)
        return
    if quantizer == "fast":
        prepare(type, src.dtype.name, weighted, quantizer, cache=cache)
    kernel = _KERNELS.worthwhile(type, src.dtype.name, weighted, cache=cache)
    if kernel is not None:
        run(kernel, src, dst, imatrix, ggml=quantizer != "fast")
        return
    start = time.perf_counter()
    quantizing.quantize_chunk(type, widened(src), dst, imatrix)
    _KERNELS.spent(type, src.dtype.name, weighted, time.perf_counter() - start)


def kernel_report() -> list[KernelReport]:
    """A report for each format that this process has prepared a kernel for: which routine is used, and why."""
    return _KERNELS.report()


def prepare(
    type: GGMLType,
    dtype: str = "float32",
    weighted: bool = False,
    quantizer: QuantizerName = "auto",
    *,
    cache: bool = True,
) -> KernelReport | None:
    """Compile (or load) and check the kernel of a format before its first use, and report the result.

    None if ggml's routine is used in any case. ``dtype`` is the numpy name of the source's dtype, ``weighted`` whether
    there are importances; ``quantizer``, ``cache`` and OptionError are those of ``quantize_rows``.
    """
    if quantizer == "ggml" or not has_kernel(type):
        return None
    _, report = _KERNELS.judged(type, dtype, weighted, cache=cache)
    if quantizer == "fast" and report.routine != "fast":
        raise OptionError(f"{type.name}: the fast quantizer cannot be used: {report.reason}; use auto or ggml")
    return report


def _convert_by_ggml(src: NDArray[Any], dst: NDArray[Any]) -> None:
    if dst.dtype == np.float32:
        (quantizing.f16_to_f32 if src.dtype == np.float16 else quantizing.bf16_to_f32)(src, dst)
    elif dst.dtype == np.float16:
        quantizing.f32_to_f16(widened(src), dst)
    else:
        quantizing.f32_to_bf16(widened(src), dst)


def _check_layout(
    type: GGMLType, src: NDArray[Any], dst: NDArray[np.uint8], imatrix: NDArray[np.float32] | None
) -> None:
    if src.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{type.name}: src is {src.dtype}, expected float32, float16 or uint16 with bfloat16 bits")
    n_rows, n_cols = src.shape
    if dst.dtype != np.uint8 or dst.shape != (n_rows, type.row_bytes(n_cols)) or not dst.flags.writeable:
        raise ValueError(f"{type.name}: dst is {dst.dtype} {dst.shape}, expected {(n_rows, type.row_bytes(n_cols))}")
    if imatrix is not None and (imatrix.dtype != np.float32 or imatrix.shape != (n_cols,)):
        raise ValueError(f"{type.name}: imatrix is {imatrix.dtype} {imatrix.shape}, expected float32 {(n_cols,)}")
    if not all(array is None or array.flags.c_contiguous for array in (src, dst, imatrix)):
        raise ValueError(f"{type.name}: src, dst and imatrix must be C-contiguous")


__all__ = ["QUANTIZERS", "KernelReport", "QuantizerName", "has_kernel", "kernel_report", "prepare", "quantize_rows"]
