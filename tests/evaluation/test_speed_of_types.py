"""The speed of types on this machine: measured on small models by the engine, and kept for later runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import ggufmoe
from ggufmoe.evaluation.speed_of_types import Sample, measure
from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.type_sets import FAST_TYPES
from ggufmoe.quant.type_speeds import (
    CACHED_BYTES,
    MEMORY_BYTES,
    TypeSpeeds,
    load_speeds,
    save_speeds,
    table_path,
    this_cpu,
)
from ggufmoe.work import Progress


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGUFMOE_CACHE", str(tmp_path))
    return tmp_path


def test_a_type_takes_time_for_each_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggufmoe.evaluation.speed_of_types._SAMPLED_S", 0.01)
    reports: list[Progress] = []
    threads = _n_threads()
    found = measure([GGMLType.Q4_0, GGMLType.IQ2_XXS], Sample(1 << 20, 512), on_progress=reports.append)
    assert found.keys() == {GGMLType.Q4_0, GGMLType.IQ2_XXS}
    assert all(1e-14 < seconds < 1e-6 for seconds in found.values())
    assert reports[-1].done == reports[-1].total
    end = time.monotonic() + 10
    while _n_threads() > threads and time.monotonic() < end:
        time.sleep(0.01)
    assert _n_threads() <= threads, "threads of OpenMP that stay make those of the engine sleep between matrices"


def _n_threads() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 0


def test_a_table_holds_for_this_machine_and_engine(cache: Path) -> None:
    assert load_speeds() == TypeSpeeds(this_cpu())
    seconds = {kind: (number + 1) * 1e-11 for number, kind in enumerate(FAST_TYPES)}
    known = TypeSpeeds(this_cpu(), seconds, {kind: each / 2 for kind, each in seconds.items()})
    save_speeds(known)
    assert load_speeds().missing([*FAST_TYPES, GGMLType.F16]) == (GGMLType.F16,)
    assert ggufmoe.type_speeds().seconds == pytest.approx(known.seconds)
    assert ggufmoe.type_speeds().cached_seconds == pytest.approx(known.cached_seconds)
    path = table_path()
    assert path is not None
    assert path.parent == cache
    kept = json.loads(path.read_text())
    other, no_speed = {**kept, "machine": "another"}, {**kept, "ms_per_billion": {"Q4_K": 0}}
    one_size = {name: value for name, value in kept.items() if name != "ms_per_billion_in_caches"}
    for damaged in (json.dumps(other), json.dumps(no_speed), json.dumps(one_size), "[]"):
        path.write_text(damaged)
        assert load_speeds() == TypeSpeeds(this_cpu())


def test_a_type_that_was_not_measured_takes_as_long_for_a_byte_as_q8_0() -> None:
    seconds = {GGMLType.Q8_0: 34e-12, GGMLType.Q4_K: 5e-12}
    speeds = TypeSpeeds("any", seconds, seconds)
    assert speeds.of(GGMLType.Q4_K, 10**9) == 5e-12
    assert speeds.of(GGMLType.F16, 10**9) == pytest.approx(64e-12)


def test_the_size_of_a_model_decides_how_much_its_caches_count() -> None:
    speeds = TypeSpeeds("any", {GGMLType.Q8_0: 30e-12}, {GGMLType.Q8_0: 10e-12})
    between = int((CACHED_BYTES * MEMORY_BYTES) ** 0.5 * 32 / 34)
    found = [speeds.of(GGMLType.Q8_0, n_weights) for n_weights in (10**5, between, 10**9)]
    assert found == pytest.approx([10e-12, 20e-12, 30e-12])
