"""Conversions between float32, float16 and bfloat16 by compiled code; the results are those of ``gguf.floats``.

The code is compiled, or loaded from the cache, at the first conversion of many numbers between two types, and checked
against ``gguf.floats``. That module converts few numbers, and all of them on a machine without a compiler.
"""

from __future__ import annotations

import logging
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.gguf.floats import check_floats, convert_floats

if TYPE_CHECKING:
    from ggufmoe.quant.kernels.code_cache import Code, CodeCache
    from ggufmoe.quant.kernels.machine import Native

_LOG = logging.getLogger("ggufmoe")
FEW = 1 << 18
"""Numbers that numpy converts in less time than it takes to load llvmlite a few times over."""
STEP = 64
"""The compiled code converts a multiple of this; numpy converts what is left over."""
_NAMES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


class Conversions:
    """The compiled conversions of one process, each prepared once, by the first thread that needs it."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Native | None] = {}
        self._lock = threading.Lock()

    def convert(self, src: NDArray[Any], dst: NDArray[Any], *, cache: bool = True) -> None:
        """Convert as ``gguf.floats.convert_floats``; ``cache``: whether compiled code is read from disk and kept."""
        check_floats(src, dst)
        native = self.native(src.dtype.name, dst.dtype.name, cache=cache) if src.size >= FEW else None
        if native is None or src.dtype == dst.dtype:
            convert_floats(src, dst)
        else:
            run(native, src, dst)

    def native(self, source: str, target: str, *, cache: bool = True) -> Native | None:
        """The checked code from one numpy dtype to another; None if ``gguf.floats`` has to do it."""
        key = _NAMES[source], _NAMES[target]
        if source != target and key not in self._known:
            with self._lock:
                if key not in self._known:
                    self._known[key] = _prepared(*key, cache)
        return self._known.get(key)


def run(native: Native, src: NDArray[Any], dst: NDArray[Any]) -> None:
    """Convert contiguous arrays of equal sizes with compiled code."""
    n_done = src.size // STEP * STEP
    if n_done:
        native.call(src.ctypes.data, dst.ctypes.data, n_done, 0, None, None, None, None)
    if n_done < src.size:
        convert_floats(src.reshape(-1)[n_done:], dst.reshape(-1)[n_done:])


def _prepared(source: str, target: str, cache: bool) -> Native | None:
    try:
        machine = import_module("ggufmoe.quant.kernels.machine")
        native = compile_conversion(source, target, machine.code_cache() if cache else None)
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        _LOG.info("%s to %s: numpy converts (%s)", source, target, " ".join(str(error).split()))
        return None
    src = edges(source)
    ours, expected = (np.empty(src.size, {"F32": np.float32, "F16": np.float16}.get(target, np.uint16)) for _ in "ab")
    run(native, src, ours)
    convert_floats(src, expected)
    if ours.tobytes() != expected.tobytes():
        _LOG.warning("%s to %s: numpy converts, because compiled code rounds otherwise on this machine", source, target)
        return None
    return native


def compile_conversion(source: str, target: str, cache: CodeCache | None = None) -> Native:
    """Compile or load the conversion between two of F32, F16 and BF16, unchecked. Raises RuntimeError if LLVM fails."""
    machine = import_module("ggufmoe.quant.kernels.machine")
    kinds = import_module("ggufmoe.quant.kernels.tiles").Source
    name = f"convert-{source}-{target}"
    code: Code | None = None if cache is None else cache.load(name)
    if code is None:
        code = machine.compile_conversion(kinds[source], kinds[target], STEP)
        if cache is not None:
            cache.save(name, code)
    native: Native = machine.link(code)
    return native


def edges(source: str) -> NDArray[Any]:
    """Numbers of a type at which conversions go wrong: of 16 bits all; of F32 those around each step of the others."""
    every = np.arange(1 << 16, dtype=np.uint32)
    if source != "F32":
        return every.astype(np.uint16).view(np.float16 if source == "F16" else np.uint16)
    high = every << 16
    lows = (0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    return np.concatenate([high | low for low in lows]).view(np.float32)


CONVERSIONS = Conversions()
