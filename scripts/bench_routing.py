"""What telling the routing costs: generation and prompts with and without it, in turn.

Four ways of generating: plain, in a context that can tell the routing and does not, with ``routing=True``, and in a
``RoutingTracer``, which also watches prompts.

usage: bench_routing.py MODEL.gguf [N_TOKENS]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ggufmoe import ContextOptions, Engine, RoutingTracer, SamplingOptions
from ggufmoe.runtime.events import Token

N_ROUNDS = 6
PROMPT = "Once upon a time there was a girl who counted to twelve and back again. "


def token_times(
    engine: Engine, n_tokens: int, tracer: RoutingTracer | None = None, *, routing: bool = False
) -> Iterator[float]:
    """Milliseconds between the tokens of one generation."""
    greedy = SamplingOptions(temperature=0, n_predict=n_tokens)
    events = engine.generate(engine.tokenize(PROMPT), greedy, routing=routing)
    before = 0.0
    for event in events if tracer is None else tracer.follow(events):
        if isinstance(event, Token):  # the reader gets several at once, and the event says when it was drawn
            if before:
                yield 1000 * (event.elapsed_s - before)
            before = event.elapsed_s


def prompt_time(engine: Engine, ids: list[int]) -> float:
    """Milliseconds for a text with logits on all rows."""
    start = time.perf_counter()
    for _ in engine.logits_by_batch(ids):
        pass
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("n_tokens", type=int, nargs="?", default=64)
    arguments = parser.parse_args()
    tokens: dict[str, list[float]] = {"plain": [], "able": [], "told": [], "watched": []}
    prompts: dict[bool, list[float]] = {False: [], True: []}
    context, n_tokens = ContextOptions(n_ctx=1024), arguments.n_tokens
    with Engine(arguments.model, context) as engine, Engine(arguments.model, context) as able:
        ids = (engine.tokenize(PROMPT) * 50)[:512]
        for _ in range(N_ROUNDS):
            for watched in (False, True):
                with ExitStack() as stack:
                    tracer = stack.enter_context(RoutingTracer(engine)) if watched else None
                    tokens["watched" if watched else "plain"] += token_times(engine, n_tokens, tracer)
                    prompts[watched].append(prompt_time(engine, ids))
            tokens["told"] += token_times(able, n_tokens, routing=True)
            tokens["able"] += token_times(able, n_tokens)
    # low percentiles, because another program's load only ever adds
    low = {way: float(np.percentile(times, 10)) for way, times in tokens.items()}
    for way, token_ms in low.items():
        print(f"generation, {way}: {token_ms:.3f} ms a token, {low['plain'] / token_ms:.2f} of the speed")
    plain, watched_ms = (min(prompts[watched]) for watched in (False, True))
    print(f"prompt of {len(ids)}: {plain:.0f} ms, watched {watched_ms:.0f}: {plain / watched_ms:.2f} of the speed")


if __name__ == "__main__":
    main()
