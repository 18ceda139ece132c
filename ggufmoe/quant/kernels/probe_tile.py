"""The probe, a tile of rows that tests a kernel, and the fingerprint of its quantized bytes.

The rows are the same on every machine and with every numpy: integers from a fixed sequence, and the four operations
of arithmetic, which IEEE 754 rounds in one way. ``probe_hashes`` has the fingerprints of ggml's bytes for them.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.filetypes import ABORTS_ON_HUGE_WEIGHTS

N_ROWS, N_COLS = 16, 1024
_HUGE, _HUGE_FOR_GRIDS = (1e15, 1e30, 1e37), (1e3, 1e6, 1e9)
"""Magnitudes of huge weights; smaller ones for grids, because ggml ends the process if distances overflow."""
_N_NORMAL = 12
"""How many uniform numbers are added to get a nearly normal one of variance 1."""


def _integers(seed: int, n: int) -> NDArray[np.uint64]:
    """``n`` integers of 24 bits: the sequence splitmix64 (Steele, Lea and Flood, 2014), from ``seed`` on."""
    state = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed << 32)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    numbers: NDArray[np.uint64] = (state ^ (state >> np.uint64(31))) >> np.uint64(40)
    return numbers


def _uniform(seed: int, n: int) -> NDArray[np.float64]:
    return _integers(seed, n).astype(np.float64) / 2.0**24


def _normal(seed: int, n: int) -> NDArray[np.float64]:
    total = np.zeros(n)
    for part in _uniform(seed, _N_NORMAL * n).reshape(_N_NORMAL, n):
        total += part
    return total - _N_NORMAL / 2


@cache
def probe_importances() -> NDArray[np.float32]:
    """Importances of very different sizes for the probe's columns, some of them 0."""
    uniform = _uniform(1, N_COLS)
    cube = uniform * uniform * uniform
    importances = (cube * cube * cube).astype(np.float32)
    importances[::7] = 0
    importances.setflags(write=False)
    return importances


def probe(type: GGMLType, source: str) -> NDArray[Any]:
    """16 rows of 1024 weights: ordinary, heavy-tailed, constant, zero, tiny, huge, on a grid, mixed.

    ``source`` is F32, F16 or BF16 (uint16 bits). Huge weights are smaller for ``type`` IQ1 to IQ3.
    """
    return _probe(source, _HUGE_FOR_GRIDS if type in ABORTS_ON_HUGE_WEIGHTS else _HUGE)


@cache
def _probe(source: str, huge: tuple[float, ...]) -> NDArray[Any]:
    rows = _normal(0, N_ROWS * N_COLS).reshape(N_ROWS, N_COLS) * 0.02
    rows[1] = rows[1] / (_uniform(2, N_COLS) + 2.0**-8)
    rows[2] = 0
    rows[3, :512], rows[3, 512:] = 0.3, -0.3
    rows[4] = (_integers(3, N_COLS) % np.uint64(61)).astype(np.float64) / 30.0 - 1.0
    rows[4, ::16] = 1.0
    rows[5] = np.resize([1.5, -1.5], N_COLS)
    for row, scale in enumerate((1e-12, 1e-22, 1e-41, *huge), 6):
        rows[row] *= scale / 0.02
    rows[12] = np.abs(rows[12]) + 1
    rows[13] = rows[13] * 1e-4 - 1
    kinds = (_integers(4, N_COLS // 16) % np.uint64(12)).astype(np.intp)
    rows[14] = rows[kinds.repeat(16), np.arange(N_COLS)]
    rows[15, ::2] = 0
    largest = np.finfo(np.float16 if source == "F16" else np.float32).max
    narrow = np.clip(rows, -largest, largest).astype(np.float16 if source == "F16" else np.float32)
    made: NDArray[Any] = (narrow.view(np.uint32) >> 16).astype(np.uint16) if source == "BF16" else narrow
    made.setflags(write=False)
    return made


def hash_name(type: GGMLType, source: str, weighted: bool) -> str:
    """The key of ``probe_hashes`` for a format quantized from ``source``, with or without importances."""
    return f"{type.name} from {source}{' with importances' if weighted else ''}"


def fingerprint(blocks: NDArray[np.uint8], odd: NDArray[np.uint8] | None = None) -> str:
    """A hash of the bytes of blocks (rows, bytes), but for those that ``odd`` (rows, blocks per row) marks with a 1."""
    if odd is None:
        return hashlib.sha256(blocks.tobytes()).hexdigest()[:32]
    kept = blocks.reshape(*odd.shape, -1) * (1 - odd[..., np.newaxis])
    return hashlib.sha256(odd.tobytes() + kept.tobytes()).hexdigest()[:32]
