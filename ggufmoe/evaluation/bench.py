"""Measures the speed of prompt processing and generation with ggufmoe's engine, as llama-bench does.

pp N computes N random tokens in batches, with logits of the last token of each batch. tg N computes N random tokens one
by one. Both begin with BOS if the model wants BOS. After a warm-up run (for tg: one token), each repetition begins with
an empty cache, or with ``n_depth`` tokens in it that are not timed. Source: tools/llama-bench at commit 0c1e57098.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import groupby, product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ggufmoe.engine import Engine
from ggufmoe.errors import Cancelled, GgufmoeError, OptionError
from ggufmoe.gguf.model import read_model_header
from ggufmoe.inspection.inspect import ModelReport, inspect_model
from ggufmoe.native import backends
from ggufmoe.native import library as native
from ggufmoe.native.wording import CPU_BACKEND, RPC_BACKEND
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.placement.cpu import default_threads
from ggufmoe.placement.offload import plan_offload
from ggufmoe.placement.offload_plan import OffloadPlan
from ggufmoe.remote.places import find_places
from ggufmoe.work import CancelFlag, OnProgress, Progress, memory_bytes

_SEED = 1


@dataclass(frozen=True)
class Workload:
    """The timed work: ``n_prompt`` tokens in batches, then ``n_gen`` one by one, after ``n_depth`` that are not timed.

    Raises OptionError for negative numbers, and if there is nothing to time.
    """

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    def __post_init__(self) -> None:
        if min(self.n_prompt, self.n_gen, self.n_depth) < 0 or not self.n_prompt + self.n_gen:
            raise OptionError(f"a test needs tokens of a prompt or of an answer, not {self.n_prompt} and {self.n_gen}")

    @property
    def name(self) -> str:
        """The name of the test in llama-bench's table: pp512, tg128, pp512+tg128 @ d1024."""
        parts = [f"pp{self.n_prompt}"] * bool(self.n_prompt) + [f"tg{self.n_gen}"] * bool(self.n_gen)
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_ctx(self) -> int:
        """The length of the context that the workload needs, in tokens."""
        return self.n_prompt + self.n_gen + self.n_depth


@dataclass(frozen=True)
class Case:
    """One row of the table: a model, a workload and options; the context is as long as the workload needs."""

    model: Path
    report: ModelReport
    workload: Workload
    context: ContextOptions
    offload: OffloadOptions

    @property
    def n_threads(self) -> int:
        """The number of threads that compute."""
        return self.context.n_threads or default_threads()


@dataclass(frozen=True)
class Result:
    """The measurement of a case: the duration in seconds of each completed repetition, at most ``repetitions``."""

    case: Case
    plan: OffloadPlan
    repetitions: int
    samples_s: tuple[float, ...]
    begun: datetime
    """Start of the measurement, in UTC."""

    @property
    def samples_tokens_per_s(self) -> tuple[float, ...]:
        """The speed of each repetition, in tokens per second."""
        n_tokens = self.case.workload.n_prompt + self.case.workload.n_gen
        return tuple(n_tokens / seconds for seconds in self.samples_s)

    @property
    def tokens_per_s(self) -> float:
        """The mean speed, in tokens per second."""
        return fmean(self.samples_tokens_per_s)

    @property
    def spread_tokens_per_s(self) -> float:
        """The sample standard deviation of the speeds, in tokens per second; 0 for one repetition."""
        return _spread(self.samples_tokens_per_s)

    @property
    def seconds(self) -> float:
        """The mean duration of a repetition, in seconds."""
        return fmean(self.samples_s)

    @property
    def spread_s(self) -> float:
        """The sample standard deviation of the durations, in seconds; 0 for one repetition."""
        return _spread(self.samples_s)


@dataclass(frozen=True)
class MeasuredMachine:
    """What was measured on: CPU, physical cores, bytes of memory, GPUs, ggml backends, and the engine's version."""

    cpu: str
    n_cores: int
    memory_bytes: int
    gpus: tuple[str, ...]
    backends: tuple[str, ...]
    package: str
    llama_cpp_commit: str


def describe_machine() -> MeasuredMachine:
    """Describe the machine and the installed engine. Raises EngineMissingError if there is no engine."""
    devices = backends.devices()
    engine = native.engine_version()
    described = [(device, backends.device_facts(device).description or device.name) for device in devices]
    gpus = tuple(text for device, text in described if device.type is not backends.DeviceType.CPU)
    cpu = next((text for device, text in described if device.type is backends.DeviceType.CPU), "unknown")
    names = tuple(dict.fromkeys(device.backend for device in devices if device.backend != CPU_BACKEND))
    return MeasuredMachine(
        cpu=cpu,
        n_cores=default_threads(),
        memory_bytes=memory_bytes(),
        gpus=gpus,
        backends=names or (CPU_BACKEND,),
        package=engine.package,
        llama_cpp_commit=engine.llama_cpp_commit,
    )


def plan_bench(
    models: Sequence[Path],
    workloads: Sequence[Workload],
    contexts: Sequence[ContextOptions] = (ContextOptions(),),
    offloads: Sequence[OffloadOptions] = (OffloadOptions(),),
) -> tuple[Case, ...]:
    """All combinations of models, workloads and options, in an order that loads each model as rarely as possible.

    Reads only headers. Raises the errors of a load that header and options determine: GGUFError, OptionError,
    EngineMissingError.
    """
    cases = []
    for model in models:
        header, report = read_model_header(model), inspect_model(model)
        for offload in offloads:
            places, host = find_places(offload)
            for context, workload in product(contexts, workloads):
                case = Case(model, report, workload, context, offload)
                plan_offload(header, _context(case), offload, places, host)
                cases.append(case)
    return tuple(cases)


def run_bench(
    cases: Sequence[Case],
    *,
    repetitions: int = 5,
    warm_up: bool = True,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> Iterator[Result]:
    """Measure ``cases`` in turn and yield each result as soon as it is complete.

    Consecutive cases with the same model and placement share one load. When ``cancel`` is set or a worker is lost, the
    samples of the unfinished case are yielded as a last result, if there are any; then Cancelled or WorkerLostError is
    raised. Raises what Engine raises, and OptionError for fewer than one repetition.
    """
    if repetitions < 1:
        raise OptionError(f"repetitions must be at least 1, not {repetitions}")
    bench = _Bench(len(cases), repetitions, warm_up, on_progress)
    for (model, offload), group in groupby(cases, key=lambda case: (case.model, case.offload)):
        listed = list(group)
        # weights are placed once, so there must be memory for the longest context
        widest = max(listed, key=lambda case: case.workload.n_ctx)
        bench.announce(listed[0], "load")
        with Engine(model, _context(widest), offload, cancel=cancel) as engine:
            for case in listed:
                yield from bench.results(engine, case, cancel)


def _context(case: Case) -> ContextOptions:
    return replace(case.context, n_ctx=case.workload.n_ctx)


class _Bench:
    """Runs the repetitions of one case after another and reports their progress."""

    def __init__(self, n_cases: int, repetitions: int, warm_up: bool, on_progress: OnProgress | None) -> None:
        self._repetitions = repetitions
        self._warm_up = warm_up
        self._report = on_progress
        self._n_all = n_cases * repetitions
        self._n_done = 0
        self._random = random.Random(_SEED)

    def announce(self, case: Case, phase: str) -> None:
        if self._report is not None:
            item = f"{case.model.name[:24]} {case.workload.name}"
            self._report(Progress(phase, self._n_done, self._n_all, "runs", item))

    def results(self, engine: Engine, case: Case, cancel: CancelFlag | None) -> Iterator[Result]:
        """Yield the result of a case; if an error ends it early, yield the samples so far, then raise the error."""
        begun = datetime.now(timezone.utc)
        samples: list[float] = []
        try:
            for seconds in self._samples(engine, case, cancel):
                samples.append(seconds)
        except GgufmoeError:
            if samples:
                yield self._result(engine, case, samples, begun)
            raise
        yield self._result(engine, case, samples, begun)

    def _samples(self, engine: Engine, case: Case, cancel: CancelFlag | None) -> Iterator[float]:
        engine.set_context(_context(case))
        if self._warm_up:
            self.announce(case, "warm-up")
            warm = replace(case.workload, n_gen=min(case.workload.n_gen, 1), n_depth=0)
            self._timed(engine, warm, cancel)
        for _ in range(self._repetitions):
            self.announce(case, "run")
            yield self._timed(engine, case.workload, cancel)
            self._n_done += 1
        self.announce(case, "run")

    def _result(self, engine: Engine, case: Case, samples: list[float], begun: datetime) -> Result:
        return Result(case, engine.placement.plan, self._repetitions, tuple(samples), begun)

    def _timed(self, engine: Engine, workload: Workload, cancel: CancelFlag | None) -> float:
        """Run a workload from an empty cache and return its duration in seconds. Raises Cancelled."""
        engine.forget()
        before, prompt, answer = (
            self._tokens(engine, n) for n in (workload.n_depth, workload.n_prompt, workload.n_gen)
        )
        timed_s = 0.0
        for tokens, one_by_one in ((before, False), (prompt, False), (answer, True)):
            seconds = engine.evaluate(tokens, one_by_one=one_by_one, cancel=cancel)
            if seconds is None:
                raise Cancelled("the bench was stopped")
            timed_s += seconds if tokens is not before else 0.0
        return timed_s

    def _tokens(self, engine: Engine, n: int) -> list[int]:
        """``n`` random token ids; the first is BOS if the model wants BOS."""
        ids = [self._random.randrange(engine.n_vocab) for _ in range(n)]
        if ids and engine.adds_bos and engine.bos_token is not None:
            ids[0] = engine.bos_token
        return ids


def _spread(samples: Sequence[float]) -> float:
    return stdev(samples) if len(samples) > 1 else 0.0


def as_record(result: Result, machine: MeasuredMachine) -> dict[str, Any]:
    """A result as plain values with llama-bench's names of JSON and CSV fields, and a few more of ggufmoe."""
    case, report, plan = result.case, result.case.report, result.plan
    context, offload = case.context, case.offload
    return {
        "build_commit": machine.llama_cpp_commit,
        "llama_cpp_python": machine.package,
        "cpu_info": machine.cpu,
        "gpu_info": ", ".join(machine.gpus),
        "backends": ",".join((RPC_BACKEND, *machine.backends) if offload.workers else machine.backends),
        "model_filename": str(case.model),
        "model_type": model_type(report),
        "model_size": sum(part.n_bytes for part in report.parts),
        "model_n_params": report.n_parameters,
        "model_n_active_params": report.n_active_parameters,
        "n_expert": plan.n_expert,
        "n_expert_used": plan.n_expert_used,
        "n_batch": context.n_batch,
        "n_ubatch": context.n_ubatch,
        "n_threads": case.n_threads,
        "type_k": context.cache_type_k,
        "type_v": context.cache_type_v,
        "n_gpu_layers": plan.n_gpu_layers if len(plan.shares) > 1 else 0,
        "n_cpu_moe": len(plan.host.expert_layers) if len(plan.shares) > 1 else 0,
        "split_mode": offload.split_mode,
        "main_gpu": offload.main_gpu,
        "no_kv_offload": not offload.kv_offload,
        "flash_attn": context.flash_attn,
        "devices": "/".join(share.device for share in plan.shares[:-1]) or "none",
        "tensor_split": "/".join(f"{part:.2f}" for part in plan.tensor_split),
        "tensor_buft_overrides": ";".join(f"{item.pattern}={item.buffer}" for item in plan.overrides) or "none",
        "load_mode": offload.load_mode,
        "no_host": offload.no_host,
        "repack": offload.repack,
        "n_prompt": case.workload.n_prompt,
        "n_gen": case.workload.n_gen,
        "n_depth": case.workload.n_depth,
        "test_time": result.begun.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(1e9 * result.seconds),
        "stddev_ns": round(1e9 * result.spread_s),
        "avg_ts": round(result.tokens_per_s, 6),
        "stddev_ts": round(result.spread_tokens_per_s, 6),
        "repetitions": result.repetitions,
        "samples_ns": [round(1e9 * seconds) for seconds in result.samples_s],
        "samples_ts": [round(speed, 6) for speed in result.samples_tokens_per_s],
    }


def model_type(report: ModelReport) -> str:
    """The architecture, size and file type of a model as one text: ``llama 2x7.2B Q4_K_M``."""
    words = (report.architecture, report.provenance.get("size_label"), report.file_type)
    return " ".join(str(word) for word in words if word) or "unknown"
