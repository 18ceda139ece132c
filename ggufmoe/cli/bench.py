"""``ggufmoe bench``: speed of prompts and of generation over a grid of options, in the shape of llama-bench.

Owns the flags' lists and the bar; what is measured is said in ``runtime.bench``, how it looks in ``bench_view``. The
table goes to stdout, everything else to stderr.
"""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from ggufmoe.cli.bench_view import make_printer
from ggufmoe.cli.params import with_options
from ggufmoe.cli.terminal import interruptible
from ggufmoe.errors import OptionError
from ggufmoe.evaluation.bench import Case, OnProgress, Progress, Workload, describe_machine, plan_bench, run_bench
from ggufmoe.options import AUTO_LAYERS, ContextOptions, OffloadOptions, option
from ggufmoe.work import CancelFlag

_Lists = tuple[str, ...]
_T = TypeVar("_T")
_RANGE = re.compile(r"(-?\d{1,9})(?:-(\d{1,9})(?:([+*])(\d{1,9}))?)?")
_MAX_RANGE = 1000


@dataclass(frozen=True)
class BenchOptions:
    """The grid. Every value may be a list with commas between, be given again, or be a range of numbers."""

    n_prompt: _Lists = option(
        (), "-p", "--n-prompt", help="Prompts of N tokens; 0: none. [default: 512]", metavar="N,..."
    )
    n_gen: _Lists = option((), "-n", "--n-gen", help="N tokens one by one; 0: none. [default: 128]", metavar="N,...")
    pg: _Lists = option((), "-pg", help="A prompt of PP tokens, then TG one by one, timed together.", metavar="PP,TG")
    n_depth: _Lists = option(
        (), "-d", "--n-depth", help="Tokens that are in the cache before, not timed. [default: 0]", metavar="N,..."
    )
    n_batch: _Lists = option(
        (), "-b", "--batch-size", help="Tokens given to llama.cpp at once. [default: 2048]", metavar="N,..."
    )
    n_ubatch: _Lists = option(
        (), "-ub", "--ubatch-size", help="Tokens computed at once. [default: 512]", metavar="N,..."
    )
    type_k: _Lists = option(
        (), "-ctk", "--cache-type-k", help="Type of the cache's keys. [default: f16]", metavar="TYPE,..."
    )
    type_v: _Lists = option(
        (), "-ctv", "--cache-type-v", help="Type of the cache's values. [default: f16]", metavar="TYPE,..."
    )
    threads: _Lists = option(
        (), "-t", "--threads", help="Threads. [default: one for each physical core]", metavar="N,..."
    )
    flash_attn: _Lists = option((), "-fa", "--flash-attn", help="on, off or auto. [default: auto]", metavar="WORD,...")
    n_gpu_layers: _Lists = option(
        (), "-ngl", "--n-gpu-layers", help="Layers on the GPU: N, all or auto. [default: auto]", metavar="N,..."
    )
    n_cpu_moe: _Lists = option(
        (),
        "-ncmoe",
        "--n-cpu-moe",
        help="Layers whose experts stay with the CPU. [default: what fits]",
        metavar="N,...",
    )
    n_expert_used: _Lists = option(
        (), "--n-expert-used", help="Experts for each token. [default: the model's]", metavar="N,..."
    )
    split_mode: _Lists = option(
        (), "-sm", "--split-mode", help="none, layer, row or tensor. [default: layer]", metavar="WORD,..."
    )
    main_gpu: _Lists = option(
        (), "-mg", "--main-gpu", help="The GPU of --split-mode none. [default: 0]", metavar="N,..."
    )
    no_kv_offload: _Lists = option((), "-nkvo", "--no-kv-offload", help="0 or 1. [default: 0]", metavar="0,1")
    device: _Lists = option((), "-dev", "--device", help="Devices, / between those of one run.", metavar="D0/D1,...")
    tensor_split: _Lists = option(
        (), "-ts", "--tensor-split", help="Shares, / between those of one run.", metavar="A/B,..."
    )
    override_tensor: _Lists = option(
        (), "-ot", "--override-tensor", help="PATTERN=BUFFER, ; between those of one run.", metavar="P=B;...,..."
    )
    load_mode: _Lists = option(
        (), "-lm", "--load-mode", help="auto, none, mmap, mlock, ... [default: auto]", metavar="WORD,..."
    )
    no_host: _Lists = option((), "--no-host", help="0 or 1. [default: 0]", metavar="0,1")
    repack: _Lists = option((), "--repack", help="0 or 1. [default: 1]", metavar="0,1")
    fit: Literal["on", "off"] = option("on", "-fit", "--fit", help="Choose what was not given so that it fits.")
    rpc: str | None = option(None, "--rpc", help="Workers, which become RPC0, RPC1, ...", metavar="HOST:PORT,...")
    repetitions: int = option(5, "-r", "--repetitions", help="How often each test is timed.", metavar="N")
    no_warmup: bool = option(False, "--no-warmup", help="No run before those that are timed.")
    output: Literal["md", "csv", "json", "jsonl"] = option("md", "-o", "--output", help="What stdout gets.")

    def __post_init__(self) -> None:
        if self.repetitions < 1:
            raise OptionError(f"--repetitions must be at least 1, not {self.repetitions}")
        _ = (self.workloads, self.contexts, self.offloads)

    @property
    def given(self) -> frozenset[str]:
        """Names of the fields that were given."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) != field.default)

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """What is timed, for each depth: prompts first, then generations, then both together."""
        depths = _numbers(self.n_depth, 0)
        prompts, answers = _numbers(self.n_prompt, 512), _numbers(self.n_gen, 128)
        if self.pg and not self.n_prompt and not self.n_gen:
            prompts = answers = [0]
        pairs = [(n, 0) for n in prompts if n] + [(0, n) for n in answers if n] + [_pair(text) for text in self.pg]
        if not pairs:
            raise OptionError("nothing to measure: give --n-prompt, --n-gen or -pg")
        return tuple(Workload(prompt, answer, depth) for depth in depths for prompt, answer in pairs)

    @property
    def contexts(self) -> tuple[ContextOptions, ...]:
        """Every combination of what a context is made with."""
        return _combined(
            ContextOptions,
            n_batch=_numbers(self.n_batch, 2048),
            n_ubatch=_numbers(self.n_ubatch, 512),
            cache_type_k=_words(self.type_k, "f16"),
            cache_type_v=_words(self.type_v, "f16"),
            flash_attn=_words(self.flash_attn, "auto"),
            n_threads=_numbers(self.threads, None),
        )

    @property
    def offloads(self) -> tuple[OffloadOptions, ...]:
        """Every combination of where weights go."""
        words = {"auto": AUTO_LAYERS, "all": -2}
        layers = [words[word] if word in words else _number(word) for word in _words(self.n_gpu_layers, "auto")]
        overrides = _words(self.override_tensor, None)
        return _combined(
            OffloadOptions,
            n_gpu_layers=layers,
            n_cpu_moe=_numbers(self.n_cpu_moe, None),
            split_mode=_words(self.split_mode, "layer"),
            load_mode=_words(self.load_mode, "auto"),
            main_gpu=_numbers(self.main_gpu, 0),
            device=[names and names.replace("/", ",") for names in _words(self.device, None)],
            tensor_split=_words(self.tensor_split, None),
            override_tensor=[() if given is None else tuple(given.split(";")) for given in overrides],
            kv_offload=[not flag for flag in _flags(self.no_kv_offload, False)],
            no_host=_flags(self.no_host, False),
            repack=_flags(self.repack, True),
            n_expert_used=_numbers(self.n_expert_used, None),
            fit=[self.fit],
            rpc=[self.rpc],
        )


def _combined(kind: Callable[..., _T], **lists: Sequence[Any]) -> tuple[_T, ...]:
    """One object for each combination; the first list changes slowest."""
    return tuple(kind(**dict(zip(lists, values, strict=True))) for values in product(*lists.values()))


def _words(given: _Lists, default: Any) -> list[Any]:
    return [word for text in given for word in text.split(",")] or [default]


def _flags(given: _Lists, default: bool) -> list[bool]:
    words = _words(given, str(int(default)))
    if not set(words) <= {"0", "1"}:
        raise OptionError(f"expected 0 or 1, not {','.join(words)}")
    return [word == "1" for word in words]


def _numbers(given: _Lists, default: int | None) -> list[Any]:
    """Numbers and ranges: ``512``, ``1-4``, ``128-512+128``, ``1-16*2``."""
    if not given:
        return [default]
    return [number for word in _words(given, None) for number in _range(word)]


def _number(word: str) -> int:
    try:
        return int(word)
    except ValueError as error:
        raise OptionError(f"expected a number, not {word!r}") from error


def _range(word: str) -> Iterator[int]:
    found = _RANGE.fullmatch(word)
    if found is None:
        raise OptionError(f"expected numbers such as 512 or 1,2,4 or a range such as 1-8*2, not {word!r}")
    number, last = int(found[1]), int(found[2] or found[1])
    multiplies, step = found[3] == "*", int(found[4] or 1)
    if (number * step if multiplies else number + step) <= number or (last - number) // step > _MAX_RANGE:
        raise OptionError(f"{word!r} is no range that comes to an end soon")
    if number > last:
        raise OptionError(f"{word!r} is an empty range: the smaller number comes first")
    while number <= last:
        yield number
        number = number * step if multiplies else number + step


def _pair(text: str) -> tuple[int, int]:
    words = text.split(",")
    if len(words) != 2:
        raise OptionError(f"-pg takes two numbers such as 512,128, not {text!r}")
    return _number(words[0]), _number(words[1])


@with_options(BenchOptions)
def bench_command(
    models: Annotated[list[Path], typer.Argument(help="GGUF files.", metavar="MODEL...")],
    *,
    bench: BenchOptions,
) -> None:
    """Measure the speed of prompts (pp) and of generation (tg), as llama-bench does, over a grid of options.

    Mean and standard deviation of the repetitions, in tokens per second. Ctrl-C ends it and prints what is there.
    """
    cases = plan_bench(models, bench.workloads, bench.contexts, bench.offloads)
    printer = make_printer(bench.output, sys.stdout, describe_machine(), cases, bench.given)
    with printer, _bar(len(cases) * bench.repetitions) as bar:
        for result in interruptible(lambda cancel: _run(cases, bench, bar.show, cancel)):
            with bar.hidden():
                printer.add(result)


def _run(cases: Sequence[Case], bench: BenchOptions, on_progress: OnProgress, cancel: CancelFlag) -> Iterator[Any]:
    return run_bench(
        cases,
        repetitions=bench.repetitions,
        warm_up=not bench.no_warmup,
        on_progress=on_progress,
        cancel=cancel,
    )


class _Bar:
    """A bar on stderr that moves between repetitions only, so that drawing it is never in what is timed."""

    def __init__(self, n_all: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        console = Console(file=sys.stderr)
        self._is_seen = console.is_terminal
        # rows on stdout stay there, whatever stderr is
        self._bar = Progress(
            *columns, console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._task = self._bar.add_task("", total=n_all)

    def show(self, progress: Progress) -> None:
        """Say what runs now."""
        what = f"{progress.case.model.name[:24]} {progress.case.workload.name} {progress.phase}"
        self._bar.update(self._task, completed=progress.n_done, description=what, refresh=self._is_seen)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """While the block runs, the bar leaves its line to others."""
        self.stop()
        yield
        self.start()

    def start(self) -> None:
        """Draw it, where anyone sees it."""
        if self._is_seen:
            self._bar.start()

    def stop(self) -> None:
        """Take it away."""
        if self._is_seen:
            self._bar.stop()


@contextmanager
def _bar(n_all: int) -> Iterator[_Bar]:
    bar = _Bar(n_all)
    bar.start()
    try:
        yield bar
    finally:
        bar.stop()
