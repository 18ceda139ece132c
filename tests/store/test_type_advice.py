"""Which file types fit a machine: sizes are those of the files, and the type that is taken follows from the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ggufmoe
from ggufmoe.cli.app import exit_code
from ggufmoe.convert import plan_conversions
from ggufmoe.errors import InputError
from ggufmoe.gguf.header import read_header
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native.product_speed import product_bytes_per_s, step_s
from ggufmoe.options import ContextOptions
from ggufmoe.placement import memory_speed
from ggufmoe.placement.devices import repacked_types
from ggufmoe.placement.memory_speed import SameSpeed
from ggufmoe.placement.offload import plan_offload
from ggufmoe.placement.offload_plan import HostMemory, Place
from ggufmoe.store import model_advice
from ggufmoe.store.model_store import ModelStore
from ggufmoe.store.type_advice import Machine, advise_types, take_type
from ggufmoe.store.wanted import planned_model
from ggufmoe.writing.plan import WritePlan
from tests.tiny import make_checkpoint

TYPES = ("Q8_0", "Q4_K_M", "Q2_K")


def machine(n_bytes: int = 1 << 34, bytes_per_s: float = 1e12, *gpus: Place) -> Machine:
    return Machine(gpus, HostMemory(n_bytes, n_bytes, {GGMLType.Q4_K: 8}), SameSpeed(bytes_per_s))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def plans(source: Path) -> dict[str, WritePlan]:
    return plan_conversions(source, Path("m.gguf"), TYPES)


def test_a_plan_has_the_header_of_its_file(source: Path, plans: dict[str, WritePlan], tmp_path: Path) -> None:
    ggufmoe.convert(source, tmp_path / "m.gguf", "Q8_0")
    written, planned = read_header(tmp_path / "m.gguf"), planned_model(plans["Q8_0"]).shards[0].header
    assert planned == written
    assert plans["Q8_0"].n_bytes == (tmp_path / "m.gguf").stat().st_size


def test_the_best_type_that_fits_is_taken(plans: dict[str, WritePlan]) -> None:
    advice = advise_types(plans, machine())
    assert [one.file_type for one in advice] == list(TYPES)
    assert [one.is_taken for one in advice] == [True, False, False]
    assert advice[0].n_ctx == 2048
    assert advice[0].n_bytes > advice[1].n_bytes > advice[2].n_bytes
    needed = advice[1].memory_bytes  # with 2048 tokens, which is all
    smaller = advise_types(plans, machine(int(needed / 0.8) + 10))
    assert [one.file_type for one in smaller if one.is_taken] == ["Q4_K_M"]
    assert not smaller[0].fits or smaller[0].n_ctx < 2048


def test_a_slow_memory_takes_a_smaller_type_or_the_fastest(plans: dict[str, WritePlan]) -> None:
    at_one = [one.tokens_per_s or 0 for one in advise_types(plans, machine(bytes_per_s=1e6))]
    assert at_one == sorted(at_one)
    for per_s, expected in ((8.1e6 / at_one[1], "Q4_K_M"), (1.0, "Q2_K")):
        advice = advise_types(plans, machine(bytes_per_s=per_s))
        assert [one.file_type for one in advice if one.is_taken] == [expected]


def test_the_speed_counts_the_experts_that_are_used(plans: dict[str, WritePlan]) -> None:
    (all_used, *_) = advise_types(plans, machine(bytes_per_s=1e9))
    (one_used, *_) = advise_types(plans, machine(bytes_per_s=1e9), offload=ggufmoe.OffloadOptions(n_expert_used=1))
    model = planned_model(plans["Q8_0"])
    read = sum(t.n_bytes for t in model.tensors if t.name != "token_embd.weight")
    experts = sum(t.n_bytes for t in model.tensors if "_exps" in t.name)
    n_expert, n_used = model.hyper.n_expert, model.hyper.n_expert_used
    assert all_used.tokens_per_s == pytest.approx(1e9 / 1.4 / (read - experts * (1 - n_used / n_expert)), rel=1e-3)
    assert one_used.tokens_per_s == pytest.approx(1e9 / 1.4 / (read - experts * (1 - 1 / n_expert)), rel=1e-3)


def test_a_gpu_that_holds_all_of_it(plans: dict[str, WritePlan]) -> None:
    gpu = Place("GPU0", "GPU0", 1 << 34, 1 << 34)
    (best, *_) = advise_types(plans, machine(1 << 34, 1.0, gpu))
    assert best.is_taken
    assert best.tokens_per_s is None
    assert best.gpu_bytes > 0


def test_nothing_fits(plans: dict[str, WritePlan]) -> None:
    advice = advise_types(plans, machine(1 << 10))
    assert not any(one.fits or one.is_taken for one in advice)
    with pytest.raises(InputError, match="org/name does not fit this machine's memory"):
        take_type(advice, "org/name")


def test_a_context_that_is_asked_for_must_remain(plans: dict[str, WritePlan]) -> None:
    small = machine(int(advise_types(plans, machine())[0].memory_bytes / 0.8) - 1000)
    assert [one.file_type for one in advise_types(plans, small) if one.is_taken] == ["Q4_K_M"]
    short = advise_types(plans, small, ContextOptions(n_ctx=256))
    assert [one.file_type for one in short if one.is_taken] == ["Q8_0"]


def test_plan_shows_it_and_auto_takes_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GGUFMOE_HOME", str(tmp_path))
    monkeypatch.setattr(memory_speed.MeasuredSpeeds, "_speed", lambda *_: 5e10)
    assert exit_code(["plan", str(source)]) == 0
    out = capsys.readouterr().out
    assert "> Q8_0" in out
    assert f"> is what -q auto takes: ggufmoe chat {source} -q Q8_0" in " ".join(out.split())  # a long path is wrapped
    assert exit_code(["plan", str(source), "--json", "--ram", "2M"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["fits"] for one in found["types"]] == [False] * len(found["types"])
    arguments = ["run", str(source), "-q", "auto", "hello", "--raw", "-n", "1", "-t", "1", "--quiet"]
    assert exit_code(arguments) == 0
    output = tmp_path / "by-hand.gguf"
    assert exit_code(["convert", str(source), "-q", "auto", "-o", str(output), "--quiet"]) == 0
    assert ModelStore().models()[0].path.read_bytes() == output.read_bytes()
    assert [model.name for model in ModelStore().models()] == ["tiny-Q8_0"]
    monkeypatch.setattr(model_advice, "source_advice", None)  # the second time nothing is looked at
    assert exit_code(arguments) == 0


def test_a_full_context_is_slower_and_steps_take_time(plans: dict[str, WritePlan]) -> None:
    (plain, *_) = advise_types(plans, machine(bytes_per_s=1e9))
    host = machine().host
    (stepped, *_) = advise_types(plans, Machine((), host, SameSpeed(1e9, step_s=1e-4)))
    assert plain.tokens_per_s
    assert plain.tokens_per_s_full
    assert stepped.tokens_per_s
    model = planned_model(plans["Q8_0"])
    assert 1 / stepped.tokens_per_s - 1 / plain.tokens_per_s == pytest.approx(1.4 * 30e-4 * model.hyper.n_layer)  # type: ignore[operator]
    heads = model.hyper.n_head / model.hyper.n_head_kv  # type: ignore[operator]
    kv_bytes = plan_offload(model, ContextOptions(), ggufmoe.OffloadOptions(), (), host).host.kv_bytes
    assert 1 / plain.tokens_per_s_full - 1 / plain.tokens_per_s == pytest.approx(1.4 * kv_bytes * heads / 1e9)


def test_products_are_measured_where_a_model_has_its_weights() -> None:
    for repacked in (False, GGMLType.Q4_K in repacked_types()):
        assert product_bytes_per_s(GGMLType.Q4_K, 1, repacked=repacked, n_bytes=1 << 20, least_s=0) > 1e6
    assert 0 < step_s(1, least_s=0) < 0.1
    assert memory_speed.measure_memory(1 << 20) > 0


def test_speeds_are_kept_and_measured_again_on_a_calmer_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, load = [3e9], [2.0]

    def measure(*_: object, **__: object) -> float:
        return measured[0]

    def speed() -> float:
        return memory_speed.MeasuredSpeeds(tmp_path).bytes_per_s(GGMLType.Q4_K)

    monkeypatch.setattr("ggufmoe.native.product_speed.product_bytes_per_s", measure)
    monkeypatch.setattr(memory_speed, "_load", lambda: load[0])
    assert speed() == 3e9
    measured[0] = 4e9
    assert speed() == 3e9, "as busy as before"
    load[0] = 1.0
    assert speed() == 4e9
    measured[0], load[0] = 2e9, 0.1
    assert speed() == 4e9, "the better one is kept"
    measured[0], load[0] = 5e9, 0.0
    assert speed() == 4e9, "it was calm"
    (tmp_path / "speeds.json").write_text("{")
    assert speed() == 5e9
    monkeypatch.setattr(memory_speed, "has_engine", lambda: False)
    monkeypatch.setattr(memory_speed, "measure_memory", lambda: 7e9)
    assert speed() == 7e9
