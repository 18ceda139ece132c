#!/usr/bin/env python3
"""Speed of the quantization kernels beside ggml's routines: million weights per second, ours and ggml's in turn.

    .venv/bin/python scripts/bench_quant.py                       every format, one thread and all cores
    .venv/bin/python scripts/bench_quant.py Q4_K Q6_K --source bf16 --cpu x86-64-v3
    .venv/bin/python scripts/bench_quant.py --check 100000000     compare bytes instead, this many weights per format

A ratio is taken from two runs next to each other; the table shows the median and the quartiles of many.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant.filetypes import ABORTS_WITHOUT_IMATRIX, IGNORES_IMATRIX
from ggufmoe.quant.kernels import trust
from ggufmoe.quant.kernels.machine import Host, host
from ggufmoe.quant.kernels.tiles import Source

FORMATS = tuple(trust._MODULES)
N_ROWS, N_COLS = 64, 4096
_WITH_AVX2 = ("haswell", "x86-64-v3")
GGML_SHARE_S = 0.02  # ggml's part of one paired measurement


@dataclass(frozen=True)
class Speed:
    """One line of the table; rates in million weights per second."""

    format: str
    weighted: bool
    threads: int
    ours: float
    ggml: float
    ratio: float
    ratio_low: float
    ratio_high: float
    compile_s: float


@dataclass(frozen=True)
class Contest:
    """The same rows for both: ``ours`` and ``ggml`` quantize ``n_rows`` of them."""

    n_weights: int
    ours: Callable[[], None]
    ggml: Callable[[], None]


def main() -> int:
    """Print a table (or JSON lines); exit 1 if a byte differs."""
    options = _options()
    formats = [GGMLType[name.upper()] for name in options.formats] or list(FORMATS)
    variants = [(type_, False) for type_ in formats if type_ not in ABORTS_WITHOUT_IMATRIX]
    variants += [(type_, True) for type_ in formats if type_ not in IGNORES_IMATRIX]
    variants.sort(key=lambda variant: formats.index(variant[0]))
    target = Host(options.cpu, "", 8, permutes=False, looks_up=options.cpu in _WITH_AVX2) if options.cpu else host()
    if options.check:
        return _check_all(variants, options, target)
    print(f"{target.cpu}, {target.width} lanes, source {options.source}, {N_ROWS} x {N_COLS} weights", file=sys.stderr)
    for type_, weighted in variants:
        for threads in (1, os.cpu_count() or 1):
            speed = _measure(type_, weighted, threads, options, target)
            print(json.dumps(asdict(speed)) if options.json else _line(speed), flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of the quantization kernels beside ggml's routines.")
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help="default: all that have a kernel")
    parser.add_argument("--check", type=int, metavar="N", help="compare the bytes of N weights per format instead")
    parser.add_argument("--rounds", type=int, default=15, help="paired measurements per line")
    parser.add_argument("--source", choices=("f32", "f16", "bf16"), default="f32")
    parser.add_argument("--cpu", help="compile for another processor, as LLVM names it (x86-64-v3: AVX2)")
    parser.add_argument("--cpu-time", action="store_true", help="count the threads' CPU time: for a busy machine")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser.parse_args()


def _weights(seed: int, source: Source, n_rows: int = N_ROWS) -> NDArray[Any]:
    """Rows as models have them: normal, each row with a size of its own, a few outliers."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((n_rows, N_COLS), np.float32)
    rows *= random.gamma(4, 0.005, (n_rows, 1)).astype(np.float32)
    rows[random.random(rows.shape, np.float32) < 1e-4] *= 20
    if source is Source.BF16:
        return (rows.view(np.uint32) >> 16).astype(np.uint16)
    return rows.astype(np.float16) if source is Source.F16 else rows


def _importances(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).gamma(0.5, 1, N_COLS).astype(np.float32)


def _contest(kernel: trust.Kernel, source: Source, seed: int) -> Contest:
    type_, weighted = kernel.type, kernel.weighted
    rows, imatrix = _weights(seed, source), _importances(seed) if weighted else None
    dst = np.zeros((N_ROWS, type_.row_bytes(N_COLS)), np.uint8)
    few = rows[: 8 if type_.block_size == 256 or weighted else N_ROWS]

    def ours() -> None:
        trust.run(kernel, rows, dst, imatrix)

    def ggml() -> None:
        quantizing.quantize_chunk(type_, trust.widened(few), dst[: len(few)], imatrix)

    return Contest(few.size, ours, ggml)


def _measure(type_: GGMLType, weighted: bool, threads: int, options: argparse.Namespace, target: Host) -> Speed:
    source, rounds, by_cpu_time = Source[options.source.upper()], options.rounds, options.cpu_time
    start = time.perf_counter()
    kernel = trust.compile_format(type_, source.name, weighted, target)
    compile_s = time.perf_counter() - start
    contests = [_contest(kernel, source, seed) for seed in range(threads)]
    n_ours, n_ggml = N_ROWS * N_COLS * threads, contests[0].n_weights * threads
    with ThreadPoolExecutor(threads) as pool:

        def rate(turns: int, n_weights: int, which: str) -> float:
            start = time.perf_counter()
            jobs = [pool.submit(_repeat, getattr(contest, which), turns) for contest in contests]
            cpu_s = max(job.result() for job in jobs)
            return turns * n_weights / (cpu_s if by_cpu_time else time.perf_counter() - start) / 1e6

        once_ours, once_ggml = rate(3, n_ours, "ours"), rate(1, n_ggml, "ggml")
        turns_ours, turns_ggml = (
            max(1, round(GGML_SHARE_S * once * 1e6 / n)) for once, n in ((once_ours, n_ours), (once_ggml, n_ggml))
        )
        pairs = [(rate(turns_ours, n_ours, "ours"), rate(turns_ggml, n_ggml, "ggml")) for _ in range(rounds)]
    low, ratio, high = statistics.quantiles([ours / ggml for ours, ggml in pairs], n=4)
    ours, ggml = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Speed(type_.name, weighted, threads, ours, ggml, ratio, low, high, compile_s)


def _repeat(call: Callable[[], None], turns: int) -> float:
    """The seconds that the thread computed, without those in which other work had its core."""
    start = time.thread_time()
    for _ in range(turns):
        call()
    return time.thread_time() - start


def _line(speed: Speed) -> str:
    name = f"{speed.format}{' + imatrix' if speed.weighted else ''}"
    return (
        f"{name:18} {speed.threads:2} thread{'s' if speed.threads > 1 else ' '}  ours {speed.ours:7.0f}  "
        f"ggml {speed.ggml:7.1f}  ratio {speed.ratio:6.1f} ({speed.ratio_low:.1f} to {speed.ratio_high:.1f})  "
        f"compiled in {speed.compile_s:.1f} s"
    )


def _check_all(variants: list[tuple[GGMLType, bool]], options: argparse.Namespace, target: Host) -> int:
    wrong = 0
    for type_, weighted in variants:
        source = Source[options.source.upper()]
        kernel = trust.compile_format(type_, source.name, weighted, target)
        n_weights = n_bytes = 0
        for rows, seed in _corpus(options.check, source):
            imatrix = _importances(seed) if weighted else None
            ours, theirs = (np.zeros((len(rows), type_.row_bytes(N_COLS)), np.uint8) for _ in range(2))
            trust.run(kernel, rows, ours, imatrix)
            quantizing.quantize_chunk(type_, trust.widened(rows), theirs, imatrix)
            n_weights, n_bytes = n_weights + rows.size, n_bytes + int(np.count_nonzero(ours != theirs))
        wrong += n_bytes
        name = f"{type_.name}{' + imatrix' if weighted else ''}"
        print(f"{name:18} {n_weights} weights, {n_bytes} bytes differ", flush=True)
    return 1 if wrong else 0


def _corpus(n_weights: int, source: Source) -> Iterator[tuple[NDArray[Any], int]]:
    """Tiles of ordinary rows until ``n_weights`` are reached; every fourth is heavy-tailed."""
    for seed in range(-(-n_weights // (N_ROWS * N_COLS))):
        rows = _weights(seed, source)
        if seed % 4 == 3 and source is Source.F32:
            rows = np.random.default_rng(seed).standard_t(2, rows.shape).astype(np.float32)
        yield rows, seed


if __name__ == "__main__":
    raise SystemExit(main())
