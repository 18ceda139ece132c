"""Whether ``ggufmoe bench`` measures what llama-bench measures: against the same loops written straight to libllama.

usage: bench_bench.py MODEL.gguf [-p N] [-n N] [-t N] [--rounds N]

The native side does what tools/llama-bench does at the pinned commit, threads of its own included: a new context for
each test, a run to warm up, random tokens, one timed run. Both sides take turns, and change who goes first; a ratio is
the median over the rounds of ggufmoe's speed by the native one's, with its quartiles.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ggufmoe import ContextOptions
from ggufmoe.evaluation.bench import Workload, plan_bench, run_bench
from ggufmoe.native.threadpool import ThreadPool
from ggufmoe.placement.cpu import default_threads


class NativeBench:
    """llama-bench's loops on a model that is loaded once."""

    def __init__(self, path: Path, n_threads: int) -> None:
        from llama_cpp import llama_cpp

        self._api: Any = llama_cpp
        self._n_threads = n_threads
        self._model = self._api.llama_model_load_from_file(os.fsencode(path), self._api.llama_model_default_params())
        self._vocab = self._api.llama_model_get_vocab(self._model)
        self._n_vocab = self._api.llama_vocab_n_tokens(self._vocab)
        self._random = random.Random(1)

    @contextmanager
    def _context(self, workload: Workload) -> Iterator[Any]:
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = workload.n_ctx
        parameters.n_batch, parameters.n_ubatch = 2048, 512
        context = self._api.llama_init_from_model(self._model, parameters)
        pool = ThreadPool(self._n_threads)
        pool.attach(context)
        try:
            yield context
        finally:
            self._api.llama_free(context)
            pool.free()

    def seconds(self, workload: Workload) -> float:
        """Of one run, after one to warm up."""
        with self._context(workload) as context:
            self._prompt(context, workload.n_prompt)
            self._answer(context, min(workload.n_gen, 1))
            self._api.llama_memory_clear(self._api.llama_get_memory(context), False)
            start = time.perf_counter()
            self._prompt(context, workload.n_prompt)
            self._answer(context, workload.n_gen)
            return time.perf_counter() - start

    def _token(self, *, first: bool) -> int:
        begins = first and self._api.llama_vocab_get_add_bos(self._vocab)
        return int(self._api.llama_vocab_bos(self._vocab)) if begins else self._random.randrange(self._n_vocab)

    def _prompt(self, context: Any, n: int) -> None:
        if not n:
            return
        self._api.llama_set_n_threads(context, self._n_threads, self._n_threads)
        for begin in range(0, n, 2048):
            size = min(2048, n - begin)
            ids = (ctypes.c_int32 * size)(*(self._token(first=not begin and not i) for i in range(size)))
            self._decode(context, ids, size)
        self._api.llama_synchronize(context)

    def _answer(self, context: Any, n: int) -> None:
        if not n:
            return
        self._api.llama_set_n_threads(context, self._n_threads, self._n_threads)
        ids = (ctypes.c_int32 * 1)(self._token(first=True))
        for _ in range(n):
            self._decode(context, ids, 1)
            self._api.llama_synchronize(context)
            ids[0] = self._token(first=False)

    def _decode(self, context: Any, ids: Any, size: int) -> None:
        status = self._api.llama_decode(context, self._api.llama_batch_get_one(ids, size))
        if status:
            raise SystemExit(f"llama_decode gave {status}")


def ours(path: Path, workload: Workload, n_threads: int) -> float:
    """Seconds that ``ggufmoe bench`` finds."""
    cases = plan_bench([path], [workload], [ContextOptions(n_threads=n_threads)])
    (result,) = run_bench(cases, repetitions=1)
    return result.samples_s[0]


def compare(path: Path, workload: Workload, n_threads: int, n_rounds: int) -> None:
    """Both sides in turn; prints a row."""
    first = ours(path, workload, n_threads)  # takes libllama's log, so that the native side is silent
    native_bench = NativeBench(path, n_threads)
    del first
    times: dict[str, list[float]] = {"ours": [], "native": []}
    sides = {
        "ours": lambda: ours(path, workload, n_threads),
        "native": lambda: native_bench.seconds(workload),
    }
    for number in range(n_rounds):
        for side in sorted(sides, reverse=bool(number % 2)):
            times[side].append(sides[side]())
    n_tokens = workload.n_prompt + workload.n_gen
    ratios = sorted(b / a for a, b in zip(times["ours"], times["native"], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    speeds = {side: n_tokens / statistics.median(seconds) for side, seconds in times.items()}
    print(
        f"| {workload.name} | {speeds['ours']:.1f} | {speeds['native']:.1f} | {middle:.3f} ({low:.3f} to {high:.3f}) |",
        flush=True,
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-p", "--n-prompt", type=int, default=512)
    parser.add_argument("-n", "--n-gen", type=int, default=128)
    parser.add_argument("-t", "--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    print(f"{arguments.model.name}, {arguments.threads} threads, {arguments.rounds} rounds\n")
    print("| test | ggufmoe bench, t/s | native, t/s | ratio |\n|---|---:|---:|---:|")
    for workload in (Workload(arguments.n_prompt, 0), Workload(0, arguments.n_gen)):
        compare(arguments.model, workload, arguments.threads, arguments.rounds)


if __name__ == "__main__":
    main()
