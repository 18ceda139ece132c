#!/usr/bin/env python3
"""Conversions between float32, float16 and bfloat16 beside ggml's: speed on one thread, or every bit.

    .venv/bin/python scripts/bench_floats.py              million numbers a second, ours and ggml's in turn
    .venv/bin/python scripts/bench_floats.py --check      compare all 2^32 float32 and all 16-bit numbers

A ratio is taken from two runs next to each other; the table shows the median and the quartiles. ggml converts between
float16 and bfloat16 by way of float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ggufmoe.gguf.floats import convert_floats
from ggufmoe.native import quantizing
from ggufmoe.quant.kernels.conversions import compile_conversion, edges, run

DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
PAIRS = [(source, target) for source in DTYPES for target in DTYPES if source != target]
_Conversion = Callable[[Any, Any], None]
_WIDEN: dict[str, _Conversion] = {"F16": quantizing.f16_to_f32, "BF16": quantizing.bf16_to_f32}
_NARROW: dict[str, _Conversion] = {"F16": quantizing.f32_to_f16, "BF16": quantizing.f32_to_bf16}
N = 1 << 19
"""Numbers of a tile."""
ROUNDS = 200


def main() -> int:
    """Print the table, or the number of results that differ; 1 if one does."""
    parser = argparse.ArgumentParser(description="Conversions between float types beside ggml's.")
    parser.add_argument("--check", action="store_true", help="compare every number instead of the speed")
    if parser.parse_args().check:
        return check()
    print(f"{'':14}{'ours':>8}{'numpy':>8}{'ggml':>8}   ours / ggml")
    for source, target in PAIRS:
        race(source, target)
    return 0


def by_ggml(source: str, target: str) -> _Conversion:
    """ggml's conversion."""
    widen, narrow = _WIDEN.get(source), _NARROW.get(target)
    if widen is None or narrow is None:
        found = widen or narrow
        assert found is not None
        return found
    wide = np.empty(N, np.float32)

    def both(src: NDArray[Any], dst: NDArray[Any]) -> None:
        widen(src, wide)
        narrow(wide, dst)

    return both


def race(source: str, target: str) -> None:
    """Print the speeds of one conversion."""
    src = np.empty(N, DTYPES[source])
    convert_floats((np.random.default_rng(0).standard_normal(N) * 0.02).astype(np.float32), src)
    dst, native, theirs = np.empty(N, DTYPES[target]), compile_conversion(source, target), by_ggml(source, target)
    ways: list[Callable[[], None]] = [
        lambda: run(native, src, dst),
        lambda: convert_floats(src, dst),
        lambda: theirs(src, dst),
    ]
    seconds: list[list[float]] = [[], [], []]
    for _ in range(ROUNDS):
        for way, taken in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
    speeds = "".join(f"{N / statistics.median(taken) / 1e6:8.0f}" for taken in seconds)
    low, middle, high = statistics.quantiles([b / a for a, b in zip(seconds[0], seconds[2], strict=True)], n=4)
    print(f"{source + ' to ' + target:14}{speeds}   {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)


def check() -> int:
    """Compare every number of each source type."""
    n_wrong = 0
    for source, target in PAIRS:
        native, theirs = compile_conversion(source, target), by_ggml(source, target)
        wrong = [0, 0]
        for high in range(0, 1 << 16, N >> 16) if source == "F32" else [0]:
            if source == "F32":
                src = np.arange(high << 16, (high << 16) + N, dtype=np.uint32).view(np.float32)
            else:
                src = np.resize(edges(source).view(np.uint16), N).view(DTYPES[source])
            made = [np.empty(N, DTYPES[target]) for _ in range(3)]
            theirs(src, made[0])
            run(native, src, made[1])
            convert_floats(src, made[2])
            for i in range(2):
                wrong[i] += int(np.count_nonzero(made[0].view(np.uint8) != made[i + 1].view(np.uint8)))
        print(f"{source} to {target}: {wrong[0]} bytes of ours differ from ggml's, {wrong[1]} of numpy's", flush=True)
        n_wrong += sum(wrong)
    return int(n_wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
