"""Engine against a loop of plain ctypes calls on the same library: prompts, generation, the second turn.

The loop does what llama-bench does: decode a prompt of fixed tokens, then one token after another, without sampling;
and once more with llama.cpp's greedy sampler. Against them stand ``Engine.evaluate``, which draws nothing either, and
an answer read from ``Engine.generate``, with its text.

Both sides run in turn, in one process, on the same weights and in the same thread, so that they share OpenMP's pool.
The rounds are short and many, because a shared machine is faster in one second than in the next: the times of all
rounds are added up, and the ratio is given with what half of the pairs of neighbours showed. Processor time (with -t 1,
where nobody spins) is compared as well. What passes between two of llama.cpp's computations does not depend on how fast
the machine is in that second: its medians say what a token costs beside them, and what the ratio is if llama.cpp itself
takes the same time on both sides (on a CPU; a GPU computes in that time).

usage: bench_runtime.py [MODEL.gguf] [-p N] [-n N] [-t N] [--rounds N]     (without a model: a random one of 1 MB)
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as api

from ggufmoe import ContextOptions, Engine, SamplingOptions
from ggufmoe.evaluation.probe import write_probe_model
from ggufmoe.placement.cpu import default_threads
from ggufmoe.runtime.events import Finished, Token
from ggufmoe.runtime.local import LocalEngine


@dataclass(frozen=True)
class Times:
    """Seconds on the clock and of processor time, of all threads. The latter tells more on a machine that is busy."""

    wall_s: float
    cpu_s: float


def now() -> Times:
    """This moment."""
    return Times(time.perf_counter(), time.process_time())


def since(start: Times, n: int = 1) -> Times:
    """What has passed since ``start``, for each of ``n``."""
    end = now()
    return Times((end.wall_s - start.wall_s) / n, (end.cpu_s - start.cpu_s) / n)


class NativeLoop:
    """A context of its own for the engine's weights, made with the same numbers, used in the engine's thread.

    A second copy of the weights lies elsewhere in memory, which alone makes one side 5 % faster in one process and the
    other in the next.
    """

    def __init__(self, engine: Engine, n_ctx: int, n_threads: int) -> None:
        local = engine._runner
        assert isinstance(local, LocalEngine)
        self._call = local._native.call
        self.model = local._loaded.handle
        context = api.llama_context_default_params()
        context.n_ctx, context.n_threads, context.n_threads_batch, context.no_perf = n_ctx, n_threads, n_threads, True
        self.context = api.llama_init_from_model(self.model, context)
        self.memory = api.llama_get_memory(self.context)
        self.greedy = api.llama_sampler_init_greedy()

    def free(self) -> None:
        """Give the context back, before the weights go."""
        api.llama_free(self.context)

    def prompt(self, tokens: list[int]) -> Times:
        """Seconds to compute a prompt in an empty cache."""
        return self._call(lambda: self._prompt(tokens))

    def generation(self, tokens: list[int], n: int, *, sampled: bool) -> Times:
        """Seconds for each of ``n`` tokens after a prompt."""
        return self._call(lambda: self._generation(tokens, n, sampled))

    def _prompt(self, tokens: list[int]) -> Times:
        api.llama_memory_clear(self.memory, False)
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        start = now()
        api.llama_decode(self.context, api.llama_batch_get_one(ids, len(tokens)))
        api.llama_synchronize(self.context)
        return since(start)

    def _generation(self, tokens: list[int], n: int, sampled: bool) -> Times:
        self._prompt(tokens)
        ids = (ctypes.c_int32 * 1)(tokens[-1])
        n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        following = [random.randrange(n_vocab) for _ in range(n)]
        batch = api.llama_batch_get_one(ids, 1)
        start = now()
        for number in range(n):
            api.llama_decode(self.context, batch)
            if sampled:
                ids[0] = api.llama_sampler_sample(self.greedy, self.context, -1)
            else:
                api.llama_synchronize(self.context)
                ids[0] = following[number]
        return since(start, n)


class Watched:
    """A side of generation, with the seconds that each of llama.cpp's computations takes, and between two of them."""

    def __init__(self, side: Callable[[], Times]) -> None:
        self._side = side
        self.inside: list[float] = []
        self.between: list[float] = []

    def __call__(self) -> Times:
        marks: list[tuple[float, float]] = []
        decode = api.llama_decode

        def watched(context: Any, batch: Any) -> int:
            begin = time.perf_counter()
            status: int = decode(context, batch)
            marks.append((begin, time.perf_counter()))
            return status

        api.llama_decode = watched
        try:
            times = self._side()
        finally:
            api.llama_decode = decode
        tokens = marks[1:]  # after the prompt
        self.inside += [end - begin for begin, end in tokens]
        self.between += [after - before for (_, before), (after, _) in itertools.pairwise(tokens)]
        return times


def engine_prompt(engine: Engine, tokens: list[int]) -> Times:
    """Seconds to compute the same prompt in an empty cache."""
    engine.forget()
    start = now()
    engine.prefill(tokens)
    return since(start)


def engine_generation(engine: Engine, tokens: list[int], n: int) -> Times:
    """Seconds for each token of an answer, from the arrival of the first event to that of the last."""
    sampling = SamplingOptions(temperature=0, repeat_penalty=1.0, n_predict=n + 1)
    arrived, n_tokens = None, 0
    for event in engine.generate(tokens, sampling):
        arrived = arrived or now()
        n_tokens += isinstance(event, Token)
    if n_tokens < 2 or arrived is None:
        sys.exit("the model ends its answer at once; take another model")
    return since(arrived, n_tokens - 1)


def engine_evaluation(engine: Engine, tokens: list[int], n: int) -> Times:
    """Seconds for each of ``n`` tokens after the prompt, none of them drawn."""
    engine.forget()
    engine.prefill(tokens)
    following = [random.randrange(engine.n_vocab) for _ in range(n)]
    start = now()
    engine.evaluate(following, one_by_one=True)
    return since(start, n)


def first_token(engine: Engine, tokens: list[int]) -> float:
    """Seconds from asking to the first token."""
    start = time.perf_counter()
    events = engine.generate(tokens, SamplingOptions(temperature=0, n_predict=1))
    next(events)
    elapsed = time.perf_counter() - start
    *_, last = events
    assert isinstance(last, Finished), "events end with Finished"
    return elapsed


def compare(name: str, unit_tokens: int, native: list[Times], ours: list[Times]) -> None:
    """Print speeds, their ratio with its spread over the rounds, and what a token costs the engine's processor more."""
    ratios = sorted(n.wall_s / e.wall_s for n, e in zip(native, ours, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    wall = [statistics.fmean(side.wall_s for side in sides) / unit_tokens for sides in (native, ours)]
    cpu = [statistics.fmean(side.cpu_s for side in sides) / unit_tokens for sides in (native, ours)]
    speeds = f"{1 / wall[0]:8.1f} tok/s native, {1 / wall[1]:8.1f} engine; ratio {wall[0] / wall[1]:.3f}"
    spread = f"median {statistics.median(ratios):.3f}, half of the rounds {low:.3f} to {high:.3f}"
    extra = f"{1e6 * (wall[1] - wall[0]):+.0f} us a token, of processor time {1e6 * (cpu[1] - cpu[0]):+.0f} us"
    print(f"{name:26} {speeds} ({spread}); {extra}", flush=True)


def compare_between(plain: Watched, sampled: Watched, ours: Watched) -> None:
    """Print what passes between two computations on each side, and the ratios that follow from it."""
    inside = statistics.median([*plain.inside, *sampled.inside, *ours.inside])
    gaps = [statistics.median(side.between) for side in (plain, sampled, ours)]
    us = ", ".join(
        f"{1e6 * gap:.0f} us {name}" for gap, name in zip(gaps, ("llama-bench", "greedy", "engine"), strict=True)
    )
    ratios = [(inside + gap) / (inside + gaps[-1]) for gap in gaps[:2]]
    print(f"between two computations   {us} (medians); computing a token {1e3 * inside:.2f} ms: ", end="")
    print("ratios {:.3f} and {:.3f}".format(*ratios), flush=True)


def in_turn(rounds: int, *sides: Callable[[], Times]) -> list[list[Times]]:
    """Each side's seconds, round by round; who comes first changes."""
    times: list[list[Times]] = [[] for _ in sides]
    for number in range(rounds):
        for i in range(len(sides)):
            side = (number + i) % len(sides)
            times[side].append(sides[side]())
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("-p", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("-n", type=int, default=32, help="tokens of an answer")
    parser.add_argument("-t", type=int, default=default_threads(), help="threads")
    parser.add_argument("--rounds", type=int, default=40, help="of generation; a quarter of it for prompts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or write_probe_model(Path(folder) / "random.gguf")
        measure(path, args)


def measure(path: Path, args: Any) -> None:
    """All comparisons for one model."""
    n_ctx = 2 * args.p + 2 * args.n + 64
    with Engine(path, ContextOptions(n_ctx=n_ctx, n_threads=args.t)) as engine:
        native = NativeLoop(engine, n_ctx, args.t)
        tokens = [3 + 7 * i % (engine.n_vocab - 3) for i in range(args.p)]
        sides = in_turn(-(-args.rounds // 4), lambda: native.prompt(tokens), lambda: engine_prompt(engine, tokens))
        compare(f"prompt of {args.p}", args.p, *sides)
        start = tokens[:16]
        watched = [
            Watched(lambda: native.generation(start, args.n, sampled=False)),
            Watched(lambda: native.generation(start, args.n, sampled=True)),
            Watched(lambda: engine_generation(engine, start, args.n)),
        ]
        evaluation = Watched(lambda: engine_evaluation(engine, start, args.n))
        plain, sampled, ours, evaluated = in_turn(args.rounds, *watched, evaluation)
        compare(f"{args.n} tokens, none drawn", 1, plain, evaluated)
        compare(f"{args.n} tokens, greedy", 1, sampled, ours)
        compare(f"{args.n} tokens, none and greedy", 1, plain, ours)
        compare_between(*watched)
        engine.forget()
        once = first_token(engine, tokens)
        again = first_token(engine, [*tokens, *tokens[:16]])
        native.free()
        print(f"first token: {1000 * once:.1f} ms in the first turn, {1000 * again:.1f} ms in the second, 16 tokens on")


if __name__ == "__main__":
    main()
