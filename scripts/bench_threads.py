"""Measure generation and prompts beside other programs: with and without the limit on spinning, or with two engines.

For each load (none, one busy loop, a busy loop for each core, the same with nice 19) and number of threads, both sides
run in turn in processes of their own. Prints tokens per second (median of the rounds) and the ratio of the sides, with
the middle half of the pairs.

    python scripts/bench_threads.py MODEL.gguf [--rounds 5] [--tokens 1000] [--threads 1,2] [--other LIBLLAMA]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ggufmoe import ContextOptions, Engine, SamplingOptions
from ggufmoe.native.lookup import SETTING
from ggufmoe.native.spinning import SpinLimit
from ggufmoe.runtime.events import Token

N_PROMPT = 256
LEAST_S = 1.0
"""Seconds over which prompts are measured."""
MOST_S = 5.0
"""Seconds after which an answer is measured no longer."""
LOADS = {"idle": (0, 0), "one busy loop": (1, 0), "all cores busy": (0, 0), "all cores busy, nice 19": (0, 19)}


@contextlib.contextmanager
def busy(n_loops: int, nice: int) -> Iterator[None]:
    """Other programs that compute while the block runs."""
    command = ["nice", "-n", str(nice), sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(command) for _ in range(n_loops)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(model: str, n_threads: int, n_tokens: int, *, is_limited: bool) -> tuple[float, float]:
    """Tokens per second of a prompt and of an answer."""
    if not is_limited:
        SpinLimit.look = lambda self: None  # type: ignore[method-assign]
    sampling = SamplingOptions(temperature=0, n_predict=n_tokens, logit_bias=("2-inf",))
    with Engine(model, ContextOptions(n_ctx=2048, n_threads=n_threads)) as engine:
        engine.prefill(list(range(5, 5 + N_PROMPT)))  # warms up; a limit notices the load
        begun, n_prompts = time.perf_counter(), 0
        while time.perf_counter() - begun < LEAST_S:
            engine.forget()
            engine.prefill(list(range(5, 5 + N_PROMPT)))
            n_prompts += 1
        prompt_s = (time.perf_counter() - begun) / n_prompts
        engine.forget()
        times: list[float] = []
        for event in engine.generate([1, *range(5, 10)], sampling):
            if isinstance(event, Token):
                times.append(time.perf_counter())
                if times[-1] - times[0] > MOST_S:
                    break
    return N_PROMPT / prompt_s, (len(times) - 1) / (times[-1] - times[0])


def measured(
    model: str, n_threads: int, n_tokens: int, *, is_limited: bool, engine: str | None = None
) -> tuple[float, float]:
    side = ["--limited"] if is_limited else []
    command = [sys.executable, __file__, model, "--measure", str(n_threads), "--tokens", str(n_tokens), *side]
    env = os.environ if engine is None else os.environ | {SETTING: engine}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    prompt, answer = json.loads(done.stdout.splitlines()[-1])
    return prompt, answer


def shown(before: list[float], after: list[float]) -> str:
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return f"{median(before):8.1f} {median(after):8.1f}   {median(ratios):5.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--threads", default=f"1,{len(os.sched_getaffinity(0))}")
    parser.add_argument("--other", metavar="LIBLLAMA", help="compare with this engine, both with the limit")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--limited", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.model, given.measure, given.tokens, is_limited=given.limited)))
        return
    n_cores = len(os.sched_getaffinity(0))
    names = ("without", "with") if given.other is None else ("engine", "other")
    print(f"{'load':24} {'threads':>7}  {'':6} {names[0]:>8} {names[1]:>8}   ratio (middle half)")
    for load, (n_loops, nice) in LOADS.items():
        for n_threads in map(int, given.threads.split(",")):
            sides: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
            with busy(n_cores if load.startswith("all") else n_loops, nice):
                for _ in range(given.rounds):
                    for is_second, found in sides.items():
                        is_limited, engine = is_second or given.other is not None, given.other if is_second else None
                        found.append(
                            measured(given.model, n_threads, given.tokens, is_limited=is_limited, engine=engine)
                        )
            for index, what in enumerate(("prompt", "answer")):
                before, after = ([pair[index] for pair in sides[side]] for side in (False, True))
                print(f"{load:24} {n_threads:7}  {what:6} {shown(before, after)}", flush=True)


if __name__ == "__main__":
    main()
