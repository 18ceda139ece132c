"""What keeping prompts on disk costs, and what reading one saves, in turn.

usage: bench_prompt_cache.py MODEL.gguf [--prompt 1024] [--answer 256] [--rounds 5] [--parallel 1] [--dir DIR]

``without``: no directory. ``keeps``: the directory is empty, so that prompt and answer are copied and written while the
answer goes on. ``reads``: another engine, which finds the prompt. With ``--parallel`` as many answers are computed at a
time, of different prompts. Each figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ggufmoe import ContextOptions, Engine, SamplingOptions
from ggufmoe.runtime.events import Token

KINDS = ("without", "keeps", "reads")


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Add the seconds of the block to ``into``."""
    start = time.perf_counter()
    yield
    into.append(time.perf_counter() - start)


def measure(engine: Engine, prompts: Sequence[Sequence[int]], n_answer: int) -> tuple[float, float, float]:
    """Seconds to the last first token, tokens a second of all answers after that, longest time between two tokens."""
    settings = SamplingOptions(temperature=0, n_predict=n_answer, logit_bias=("2-inf",))
    start = time.perf_counter()

    def times(prompt: Sequence[int]) -> list[float]:
        return [time.perf_counter() - start for event in engine.generate(prompt, settings) if isinstance(event, Token)]

    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(times, prompts))
    first, last = max(one[0] for one in found), max(one[-1] for one in found)
    speed = sum(moment > first for one in found for moment in one) / (last - first)
    return first, speed, max(float(np.diff(one).max()) for one in found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    for name, default in (("prompt", 1024), ("answer", 256), ("rounds", 5), ("parallel", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dir", type=Path, help="where the directories are made")
    asked = parser.parse_args()
    n_ctx = (asked.prompt + asked.answer + 8) * asked.parallel
    plain = ContextOptions(n_ctx=n_ctx, n_parallel=asked.parallel)
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
    opening: dict[str, list[float]] = {kind: [] for kind in KINDS}
    closing: dict[str, list[float]] = {kind: [] for kind in KINDS}
    random = np.random.default_rng(1)
    for _ in range(asked.rounds):
        prompts = [[1, *random.integers(300, 20_000, asked.prompt - 1).tolist()] for _ in range(asked.parallel)]
        with tempfile.TemporaryDirectory(dir=asked.dir) as folder:
            for kind in KINDS:
                options = plain if kind == "without" else replace(plain, prompt_cache=Path(folder))
                with timed(opening[kind]):
                    engine = Engine(asked.model, options)
                engine.evaluate([1])  # warms the threads
                found[kind].append(measure(engine, prompts, asked.answer))
                with timed(closing[kind]):
                    engine.close()
            n_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    print(f"{asked.parallel} x {asked.prompt} + {asked.answer} tokens; {n_bytes / 2**20:.1f} MiB on disk")
    for kind in KINDS:
        first, speed, gap = (statistics.median(values) for values in zip(*found[kind], strict=True))
        opened, closed = statistics.median(opening[kind]), statistics.median(closing[kind])
        print(
            f"{kind:8} first token {1000 * first:7.0f} ms, {speed:7.1f} tokens/s, longest gap {1000 * gap:.0f} ms, "
            f"opening {opened:.2f} s, closing {closed:.2f} s"
        )


if __name__ == "__main__":
    main()
