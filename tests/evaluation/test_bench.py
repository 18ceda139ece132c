"""The grid, what is timed and what comes of it, on a tiny model; speeds themselves are never judged here."""

from __future__ import annotations

import json
import statistics
import threading
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.engine import Engine
from ggufmoe.errors import Cancelled, GGUFError, OptionError, WorkerLostError
from ggufmoe.evaluation.bench import (
    Result,
    Workload,
    as_record,
    describe_machine,
    model_type,
    plan_bench,
    run_bench,
)
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.work import Progress

ONE = (ContextOptions(n_threads=1),)
LLAMA_BENCH_FIELDS = """
build_commit cpu_info gpu_info backends model_filename model_type model_size model_n_params n_batch n_ubatch n_threads
type_k type_v n_gpu_layers n_cpu_moe split_mode main_gpu no_kv_offload flash_attn devices tensor_split
tensor_buft_overrides load_mode no_host repack n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts stddev_ts
samples_ns samples_ts
"""
"""Of tools/llama-bench at the pinned commit, as far as they have a meaning here."""


def test_workloads_are_named_as_llama_bench_names_them() -> None:
    names = [Workload(512, 0).name, Workload(0, 128).name, Workload(64, 16, 256).name]
    assert names == ["pp512", "tg128", "pp64+tg16 @ d256"]
    assert Workload(64, 16, 256).n_ctx == 336


@pytest.mark.parametrize("numbers", [(0, 0, 0), (0, 0, 8), (-1, 4, 0)])
def test_a_workload_has_something_to_time(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(OptionError, match="a test needs tokens"):
        Workload(*numbers)


def test_the_grid_changes_weights_least_often(mixing_path: Path) -> None:
    contexts = [ContextOptions(n_threads=n) for n in (1, 2)]
    offloads = [OffloadOptions(repack=repack) for repack in (True, False)]
    cases = plan_bench([mixing_path], [Workload(8, 0), Workload(0, 4)], contexts, offloads)
    order = [(case.offload.repack, case.n_threads, case.workload.name) for case in cases]
    assert order == [(r, t, name) for r in (True, False) for t in (1, 2) for name in ("pp8", "tg4")]


def test_all_is_checked_before_anything_is_loaded(mixing_path: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"no")
    with pytest.raises(GGUFError):
        plan_bench([mixing_path, tmp_path / "bad.gguf"], [Workload(8, 0)])
    with pytest.raises(OptionError, match="has no experts"):
        plan_bench([mixing_path], [Workload(8, 0)], offloads=[OffloadOptions(n_expert_used=2)])
    with pytest.raises(OptionError, match="repetitions must be at least 1"):
        list(run_bench(plan_bench([mixing_path], [Workload(8, 0)], ONE), repetitions=0))


def measure(path: Path, *workloads: Workload, repetitions: int = 3) -> tuple[list[Result], list[Progress]]:
    steps: list[Progress] = []
    results = list(run_bench(plan_bench([path], workloads, ONE), repetitions=repetitions, on_progress=steps.append))
    return results, steps


def test_each_case_gives_its_repetitions(mixing_path: Path) -> None:
    results, steps = measure(mixing_path, Workload(8, 0), Workload(0, 4), Workload(6, 2, 16))
    assert [result.case.workload.name for result in results] == ["pp8", "tg4", "pp6+tg2 @ d16"]
    for result in results:
        assert len(result.samples_s) == result.repetitions == 3
        assert min(result.samples_s) > 0
        speeds = [8 / seconds for seconds in result.samples_s]
        if result.case.workload.name == "pp8":
            assert result.tokens_per_s == pytest.approx(statistics.mean(speeds))
            assert result.spread_tokens_per_s == pytest.approx(statistics.stdev(speeds))
            assert result.seconds == pytest.approx(statistics.mean(result.samples_s))
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert (steps[0].phase, steps[-1].done, steps[-1].total) == ("load", 9, 9)
    assert {step.phase for step in steps} == {"load", "warm-up", "run"}
    assert {step.unit for step in steps} == {"runs"}
    assert steps[-1].item == f"{mixing_path.name} pp6+tg2 @ d16"


def test_a_single_repetition_has_no_spread(mixing_path: Path) -> None:
    results, _ = measure(mixing_path, Workload(4, 0), repetitions=1)
    assert (results[0].spread_s, results[0].spread_tokens_per_s) == (0, 0)


def test_a_record_has_llama_bench_s_names(mixing_path: Path) -> None:
    (result,), _ = measure(mixing_path, Workload(0, 4))
    machine = describe_machine()
    record = json.loads(json.dumps(as_record(result, machine)))
    assert set(LLAMA_BENCH_FIELDS.split()) <= set(record)
    assert (record["n_prompt"], record["n_gen"], record["n_threads"]) == (0, 4, 1)
    assert record["model_n_params"] == record["model_n_active_params"] == result.case.report.n_parameters
    assert record["avg_ts"] == pytest.approx(result.tokens_per_s, rel=1e-6)
    assert len(record["samples_ns"]) == 3
    assert record["model_type"] == model_type(result.case.report) == "llama"
    assert machine.cpu
    assert machine.llama_cpp_commit


def test_what_was_measured_before_a_stop_is_given(mixing_path: Path) -> None:
    cancel = threading.Event()
    cases = plan_bench([mixing_path], [Workload(8, 0), Workload(0, 4)], ONE)

    def stop_in_the_second(progress: Progress) -> None:
        if progress.done == 4:
            cancel.set()

    results = run_bench(cases, repetitions=3, on_progress=stop_in_the_second, cancel=cancel)
    found = [next(results), next(results)]
    assert [(result.case.workload.name, len(result.samples_s)) for result in found] == [("pp8", 3), ("tg4", 1)]
    with pytest.raises(Cancelled):
        next(results)


def test_what_was_measured_before_an_error_is_given(mixing_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, n_left = Engine.evaluate, 4  # two calls to warm up, two of the first repetition's

    def lose_the_worker(engine: Engine, *arguments: Any, **keywords: Any) -> float | None:
        nonlocal n_left
        n_left -= bool(arguments[0])
        if n_left < 0:
            raise WorkerLostError("gone")
        return evaluate(engine, *arguments, **keywords)

    monkeypatch.setattr(Engine, "evaluate", lose_the_worker)
    results = run_bench(plan_bench([mixing_path], [Workload(8, 4)], ONE), repetitions=3)
    assert len(next(results).samples_s) == 1
    with pytest.raises(WorkerLostError):
        next(results)


@pytest.mark.parametrize(("phase", "what"), [("load", "loading"), ("warm-up", "the bench"), ("run", "the bench")])
def test_a_stop_before_the_first_repetition_gives_nothing(mixing_path: Path, phase: str, what: str) -> None:
    cancel = threading.Event()

    def stop(progress: Progress) -> None:
        if progress.phase == phase:
            cancel.set()

    results = run_bench(plan_bench([mixing_path], [Workload(8, 0)], ONE), on_progress=stop, cancel=cancel)
    with pytest.raises(Cancelled, match=f"{what} was stopped"):
        next(results)
