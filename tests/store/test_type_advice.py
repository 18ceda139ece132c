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
from ggufmoe.options import ContextOptions
from ggufmoe.placement import memory_speed
from ggufmoe.placement.offload_plan import HostMemory, Place
from ggufmoe.store import model_advice
from ggufmoe.store.model_store import ModelStore
from ggufmoe.store.type_advice import Machine, advise_types, take_type
from ggufmoe.store.wanted import planned_model
from ggufmoe.writing.plan import WritePlan
from tests.tiny import make_checkpoint

TYPES = ("Q8_0", "Q4_K_M", "Q2_K")


def machine(n_bytes: int = 1 << 34, bytes_per_s: float = 1e12, *gpus: Place) -> Machine:
    return Machine(gpus, HostMemory(n_bytes, n_bytes, {GGMLType.Q4_K: 8}), bytes_per_s)


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
    assert all_used.tokens_per_s == pytest.approx(1e9 / (read - experts * (1 - n_used / n_expert)), rel=1e-3)
    assert one_used.tokens_per_s == pytest.approx(1e9 / (read - experts * (1 - 1 / n_expert)), rel=1e-3)


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
    monkeypatch.setattr(memory_speed, "measure_memory", lambda: 5e10)
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


def test_the_speed_of_the_memory_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_speed.measure_memory(1 << 20) > 0
    monkeypatch.setattr(memory_speed, "measure_memory", lambda: 5e10)
    assert memory_speed.memory_bytes_per_s(tmp_path) == 5e10
    monkeypatch.setattr(memory_speed, "measure_memory", lambda: 1.0)
    assert memory_speed.memory_bytes_per_s(tmp_path) == 5e10
    (tmp_path / "memory-speed.json").write_text("{")
    assert memory_speed.memory_bytes_per_s(tmp_path) == 1.0
