"""``ggufmoe bench``: speed of prompts and of generation over a grid of options, in the shape of llama-bench.

Owns the flags and the bar; ``evaluation.bench`` measures and ``bench_view`` prints. The table goes to stdout,
everything else to stderr.
"""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import typer

from ggufmoe.cli.bench_view import make_printer
from ggufmoe.cli.console import held_warnings
from ggufmoe.cli.grid import Values, combinations, listed, numbers, single
from ggufmoe.cli.jobs import interruptible
from ggufmoe.cli.params import model_names, with_options
from ggufmoe.cli.progress import ProgressLine
from ggufmoe.cli.wanted_model import model_file
from ggufmoe.errors import OptionError
from ggufmoe.evaluation.bench import Workload, describe_machine, plan_bench, run_bench
from ggufmoe.options import ContextOptions, ModelOptions, OffloadOptions, option
from ggufmoe.work import Progress


@dataclass(frozen=True)
class BenchOptions:
    """The workloads and the grid of options; every combination is measured."""

    n_prompt: Values = option(
        (), "-p", "--n-prompt", help="Prompts of N tokens; 0: none. [default: 512]", metavar="N,..."
    )
    n_gen: Values = option(
        (), "-n", "--n-gen", help="N tokens computed one at a time; 0: none. [default: 128]", metavar="N,..."
    )
    pg: Values = option((), "-pg", help="A prompt of PP tokens, then TG one by one, timed together.", metavar="PP,TG")
    n_depth: Values = option(
        (),
        "-d",
        "--n-depth",
        help="Tokens in the cache before each test; computing them is not timed. [default: 0]",
        metavar="N,...",
    )
    n_batch: Values = listed(ContextOptions, "n_batch")
    n_ubatch: Values = listed(ContextOptions, "n_ubatch")
    cache_type_k: Values = listed(ContextOptions, "cache_type_k")
    cache_type_v: Values = listed(ContextOptions, "cache_type_v")
    flash_attn: Values = listed(ContextOptions, "flash_attn")
    n_threads: Values = listed(ContextOptions, "n_threads")
    n_gpu_layers: Values = listed(OffloadOptions, "n_gpu_layers")
    n_cpu_moe: Values = listed(OffloadOptions, "n_cpu_moe")
    split_mode: Values = listed(OffloadOptions, "split_mode")
    load_mode: Values = listed(OffloadOptions, "load_mode")
    main_gpu: Values = listed(OffloadOptions, "main_gpu")
    device: Values = listed(OffloadOptions, "device")
    tensor_split: Values = listed(
        OffloadOptions, "tensor_split", help="Shares of the layers for each GPU, for example 3/1."
    )
    override_tensor: Values = listed(OffloadOptions, "override_tensor")
    kv_offload: Values = listed(
        OffloadOptions, "kv_offload", "-nkvo", "--no-kv-offload", help="Keep the KV cache in main memory.", negated=True
    )
    no_host: Values = listed(OffloadOptions, "no_host")
    repack: Values = listed(OffloadOptions, "repack")
    n_expert_used: Values = listed(OffloadOptions, "n_expert_used")
    fit: Literal["on", "off"] = single(OffloadOptions, "fit")
    rpc: str | None = single(OffloadOptions, "rpc")
    repetitions: int = option(5, "-r", "--repetitions", help="How often each test is timed.", metavar="N")
    no_warmup: bool = option(False, "--no-warmup", help="No run before those that are timed.")
    output: Literal["md", "csv", "json", "jsonl"] = option(
        "md", "-o", "--output", help="Format of the results on stdout."
    )

    def __post_init__(self) -> None:
        if self.repetitions < 1:
            raise OptionError(f"--repetitions must be at least 1, not {self.repetitions}")
        _ = (self.workloads, self.contexts, self.offloads)

    @property
    def given(self) -> frozenset[str]:
        """Names of the fields that were given on the command line."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) != field.default)

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """The workloads for each depth: prompts first, then generations, then both together."""
        depths = numbers(self.n_depth or ("0",))
        prompts, answers = numbers(self.n_prompt or ("512",)), numbers(self.n_gen or ("128",))
        if self.pg and not self.n_prompt and not self.n_gen:
            prompts = answers = []
        pairs = [(n, 0) for n in prompts if n] + [(0, n) for n in answers if n] + [_pair(text) for text in self.pg]
        if not pairs:
            raise OptionError("nothing to measure: give --n-prompt, --n-gen or -pg")
        return tuple(Workload(prompt, answer, depth) for depth in depths for prompt, answer in pairs)

    @property
    def contexts(self) -> tuple[ContextOptions, ...]:
        """Every combination of the listed options of a context."""
        return combinations(self, ContextOptions)

    @property
    def offloads(self) -> tuple[OffloadOptions, ...]:
        """Every combination of the listed options of placement."""
        return combinations(self, OffloadOptions)


def _pair(text: str) -> tuple[int, int]:
    try:
        n_prompt, n_gen = map(int, text.split(","))
    except ValueError as error:
        raise OptionError(f"-pg takes two numbers such as 512,128, not {text!r}") from error
    return n_prompt, n_gen


@with_options(ModelOptions, BenchOptions)
def bench_command(
    models: Annotated[
        list[str],
        typer.Argument(
            help="GGUF files, stored models, checkpoint directories, recipes or names on the hub (org/name).",
            metavar="MODEL...",
            autocompletion=model_names,
        ),
    ],
    *,
    wanted: ModelOptions,
    bench: BenchOptions,
) -> None:
    """Measure the speed of prompts (pp) and of generation (tg), as llama-bench does, over a grid of options.

    Prints mean and standard deviation of the repetitions, in tokens per second. Ctrl-C ends the run and prints what was
    measured so far.
    """
    paths = [model_file(model, wanted) for model in models]
    # drawn between repetitions only, so that drawing is never timed
    line = ProgressLine("bench", phase="bench", ticking=False)
    with line:
        cases = plan_bench(paths, bench.workloads, bench.contexts, bench.offloads)
        printer = make_printer(bench.output, sys.stdout, describe_machine(), cases, bench.given)

    def show(progress: Progress) -> None:
        line.update(replace(progress, phase="bench", item=f"{progress.item} {progress.phase}"))

    with held_warnings(), printer, line:
        for result in interruptible(
            lambda cancel: run_bench(
                cases,
                repetitions=bench.repetitions,
                warm_up=not bench.no_warmup,
                on_progress=show,
                cancel=cancel,
            )
        ):
            with line.hidden():
                printer.add(result)
