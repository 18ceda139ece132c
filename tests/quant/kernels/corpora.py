"""Rows and importances that quantizers stumble over, and the comparison with ggml."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant.filetypes import ABORTS_ON_HUGE_WEIGHTS
from ggufmoe.quant.kernels import quantize_rows
from ggufmoe.quant.kernels.machine import code_cache
from ggufmoe.quant.kernels.trust import Kernel, compile_format, widened

Floats = NDArray[np.float32]
N_COLS = 512
LARGEST = float(np.finfo(np.float32).max)

KINDS: dict[str, Callable[[np.random.Generator, int], NDArray[Any]]] = {
    "normal": lambda random, n: random.normal(0, 0.02, n),
    "heavy-tailed": lambda random, n: random.standard_t(1.5, n),
    "zero": lambda random, n: np.zeros(n),
    "constant": lambda random, n: np.full(n, random.normal()),
    "nearly constant": lambda random, n: random.normal() + random.normal(0, 1e-7, n),
    "alternating": lambda random, n: np.resize([random.normal(), random.normal()], n),
    "positive": lambda random, n: random.random(n) + 0.5,
    "negative": lambda random, n: -random.random(n) - 0.5,
    "integers": lambda random, n: random.integers(-9, 9, n).astype(np.float64),
    "sparse": lambda random, n: random.normal(0, 1, n) * (random.random(n) < 0.05),
    "outlier": lambda random, n: np.where(np.arange(n) % 32 == 7, 100.0, random.normal(0, 1e-3, n)),
    "threshold": lambda random, n: np.where(np.arange(n) % 16 == 0, 1.0, random.integers(-30, 30, n) / 30.0),
    "tiny": lambda random, n: random.normal(0, 1e-12, n),
    "near zero group": lambda random, n: random.normal(0, 1e-15, n),
    "denormal": lambda random, n: random.normal(0, 1e-40, n),
    "least": lambda random, n: random.integers(-3, 4, n) * 1.4e-45,
    "half overflow": lambda random, n: random.normal(0, 1e6, n),
    "square overflow": lambda random, n: random.normal(0, 1e19, n),
    "large": lambda random, n: random.normal(0, 1e30, n),
    "near overflow": lambda random, n: random.choice([-1, 1], n) * random.uniform(0.1, 1, n) * LARGEST,
    "wild": lambda random, n: random.choice([-1, 1], n) * 10.0 ** random.uniform(-44, 38, n),
}

IMPORTANCES: dict[str, Callable[[np.random.Generator, int], NDArray[Any]]] = {
    "random": lambda random, n: random.random(n),
    "skewed": lambda random, n: random.random(n) ** 12,
    "zeros": lambda random, n: np.zeros(n),
    "one-hot": lambda random, n: (np.arange(n) == n // 3).astype(np.float64),
    "half zero": lambda random, n: random.random(n) * (np.arange(n) // 16 % 2),
    "huge": lambda random, n: random.random(n) * 1e36,
    "tiny": lambda random, n: random.random(n) * 1e-38,
}


HUGE_KINDS = {"square overflow", "large", "near overflow", "wild"}


def kinds(type: GGMLType) -> list[str]:
    """The kinds of rows that a format is tested with: ggml aborts the process at huge ones in some."""
    return [kind for kind in KINDS if not (kind in HUGE_KINDS and type in ABORTS_ON_HUGE_WEIGHTS)]


def rows(seed: int, kind: str, n_rows: int = 4, among: list[str] | None = None) -> Floats:
    """Rows of one kind; ``mixed`` changes it every 16 weights, ``among`` all or some kinds."""
    random = np.random.default_rng(seed)
    n = n_rows * N_COLS
    if kind != "mixed":
        return KINDS[kind](random, n).astype(np.float32).reshape(n_rows, N_COLS)
    names = random.choice(sorted(among or KINDS), n // 16)
    return np.concatenate([KINDS[name](random, 16) for name in names]).astype(np.float32).reshape(n_rows, N_COLS)


def importances(seed: int, kind: str) -> Floats:
    """One importance per column."""
    return IMPORTANCES[kind](np.random.default_rng(seed), N_COLS).astype(np.float32)


def compiled(type: GGMLType, weighted: bool) -> Kernel:
    """The kernel for float32 rows, unchecked; the tests of a session compile it once and share its code."""
    return compile_format(type, "F32", weighted, cache=code_cache())


def differing(type: GGMLType, src: NDArray[Any], imatrix: Floats | None = None) -> int:
    """Bytes in which the kernel's result is not ggml's."""
    ours = np.zeros((len(src), type.row_bytes(src.shape[1])), np.uint8)
    theirs = np.zeros_like(ours)
    quantize_rows(type, src, ours, imatrix, "fast")
    quantizing.quantize_chunk(type, widened(src), theirs, imatrix)
    return int(np.count_nonzero(ours != theirs))
