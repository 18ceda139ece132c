"""What a GPU really holds in each placement, beside the plan, with the speed and whether the answer is the CPU's.

usage: gpu_check.py MODEL.gguf ... [-p N] [-n N] [--rpc HOST:PORT]

Prints the devices, then a Markdown table for each model. Exit code 1 when there is no GPU, when a plan and llama.cpp's
report differ by more than a hundredth, or when an answer is not the CPU's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ggufmoe import Cancelled, ContextOptions, Engine, GgufmoeError, OffloadOptions, SamplingOptions
from ggufmoe.evaluation.bench import Workload, plan_bench, run_bench
from ggufmoe.gguf.model import read_model_header
from ggufmoe.placement.devices import find_devices
from ggufmoe.placement.footprint import Footprint
from ggufmoe.placement.offload_plan import OffloadPlan
from ggufmoe.remote.places import find_places
from ggufmoe.runtime.events import Token

_MIB = 2**20
_PROMPT = "The quick brown fox jumps over"
_GREEDY = SamplingOptions(temperature=0.0, n_predict=16)
_CONTEXT = ContextOptions(n_ctx=1024)


def placements(model: Path, plain: OffloadOptions) -> Iterator[tuple[str, OffloadOptions]]:
    """The settings that are tried, each with the flags that ask for it."""
    facts = Footprint(read_model_header(model), _CONTEXT, plain)
    yield "--fit on", plain
    yield "-ngl all --fit off", replace(plain, fit="off")
    if facts.n_expert:
        half = facts.n_layer // 2
        yield "-cmoe", replace(plain, fit="off", cpu_moe=True)
        yield f"-ncmoe {half}", replace(plain, fit="off", n_cpu_moe=half)
    yield f"-ngl {facts.n_layer // 2}", replace(plain, fit="off", n_gpu_layers=facts.n_layer // 2)


def answer(engine: Engine) -> list[int]:
    """The likeliest tokens after a fixed prompt."""
    events = engine.generate(engine.tokenize(_PROMPT), _GREEDY)
    return [event.token_id for event in events if isinstance(event, Token)]


def check(model: Path, plain: OffloadOptions, n_prompt: int, n_gen: int) -> bool:
    """Print the table of one model; whether all was as planned."""
    with Engine(model, _CONTEXT, OffloadOptions(device="none", load_mode="none")) as engine:
        expected = answer(engine)
    sizes = " | ".join(f"{what}, plan | report" for what in ("weights", "KV", "compute"))
    print(f"\n{model.name}, MiB on the GPUs and tokens per second\n")
    print(f"| placement | {sizes} | pp{n_prompt} | tg{n_gen} | answer |")
    print("|---|" + "---:|" * 8 + "---|")
    good = True
    for name, offload in placements(model, plain):
        try:
            with Engine(model, _CONTEXT, offload) as engine:
                same, placement = answer(engine) == expected, engine.placement
        except GgufmoeError as error:
            print(f"| `{name}` | {error} |" + " |" * 8)
            continue
        report = placement.report
        columns = _sizes(placement.plan, report.weight_bytes, report.kv_bytes, report.compute_bytes)
        speeds = _speeds(model, offload, n_prompt, n_gen)
        print(f"| `{name}` | {' | '.join((*columns, *speeds))} | {'the same' if same else 'DIFFERS'} |", flush=True)
        for difference in placement.differences:
            print(f"\n{difference}")
        good = good and same and not placement.differences
    return good


def _sizes(plan: OffloadPlan, *reported: object) -> list[str]:
    """MiB on all GPUs together, planned and reported, of weights, KV cache and compute buffers."""
    shares = plan.shares[:-1]
    planned = (
        sum(share.weight_bytes for share in shares),
        sum(share.kv_bytes for share in shares),
        sum(share.compute_bytes for share in shares),
    )
    buffers = {buffer.name for share in shares for buffer in share.buffers} | {share.device for share in shares}
    columns: list[str] = []
    for n_bytes, sizes in zip(planned, reported, strict=True):
        assert isinstance(sizes, dict), "a report is of buffers by name"
        found = sum(size for name, size in sizes.items() if name.removesuffix("_Mapped") in buffers)
        columns += [f"{n_bytes / _MIB:.2f}", f"{found / _MIB:.2f}"]
    return columns


def _speeds(model: Path, offload: OffloadOptions, n_prompt: int, n_gen: int) -> list[str]:
    cases = plan_bench([model], [Workload(n_prompt, 0), Workload(0, n_gen)], offloads=[offload])
    return [f"{result.tokens_per_s:.1f}" for result in run_bench(cases, repetitions=3)]


def main() -> int:
    """Check every model; 0 when all was as planned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.gguf")
    parser.add_argument("-p", type=int, default=512, help="tokens of the prompt that is timed")
    parser.add_argument("-n", type=int, default=64, help="tokens of the answer that is timed")
    parser.add_argument("--rpc", help="a worker that stands for the GPU", metavar="HOST:PORT")
    arguments = parser.parse_args()
    plain = OffloadOptions(load_mode="none", rpc=arguments.rpc)
    places, _ = find_places(plain)
    if not places:
        print("no GPU here, or an engine without support for it (GGUFMOE_ENGINE=cuda scripts/setup)", file=sys.stderr)
        return 1
    described = {} if arguments.rpc else find_devices().descriptions
    for place in places:
        sizes = f"{place.free_bytes / _MIB:.0f} of {place.total_bytes / _MIB:.0f} MiB free"
        print(f"{place.name}: {described.get(place.name, 'a worker')}, {sizes}")
    try:
        checked = [check(model, plain, arguments.p, arguments.n) for model in arguments.models]
        return int(not all(checked))
    except (GgufmoeError, Cancelled) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
